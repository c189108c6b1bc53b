"""Operations of a forward pass, against XLA's count and by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from psa_jax import models
from psa_jax.attention.context import AttentionContext
from psa_jax.config import AttentionConfig, ImageConfig, ModelConfig
from psa_jax.eval import flops

pytestmark = pytest.mark.tier('default')

T = 64
BASE = ModelConfig(
  num_layers=2,
  d_model=64,
  num_heads=2,
  num_kv_heads=1,
  mlp_dim=128,
  scan_layers=False,  # XLA counts the body of a scan once
  attention=AttentionConfig('dense', implementation='reference'),
)
KINDS = {
  'decoder_lm': {},
  'encoder': {},
  'encoder_decoder': {},
  'vit': {'image': ImageConfig(size=32, channels=3, patch=4)},
}


def counts(kind):
  """XLA's count of one window, and ours."""
  cfg = dataclasses.replace(BASE, kind=kind, **KINDS[kind])
  classes = 5 if kind == 'encoder' else 0
  model = models.build(cfg, 50, classes=classes, rngs=nnx.Rngs(0))
  graphdef, state = nnx.split(model)
  ids = jnp.ones((1, T), jnp.int32)

  def run(state):
    model = nnx.merge(graphdef, state)
    call = dict(context=AttentionContext(train=False))
    if kind == 'vit':
      return model.classify(model(jnp.ones((1, 32, 32, 3)), **call).hidden)
    if kind == 'encoder_decoder':
      call |= dict(source=ids, source_ids=ids)
    hidden = model(ids, **call).hidden
    return model.classify(hidden) if classes else model.unembed(hidden)

  cost = jax.jit(run).lower(state).compile().cost_analysis()
  params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
  read = {'density': 1.0, 'cross_density': 1.0}
  return cost['flops'], flops.forward(cfg, params, T, read)


@pytest.mark.parametrize('kind', KINDS)
def test_is_what_xla_counts(kind):
  xla, ours = counts(kind)
  if kind == 'decoder_lm':  # the reference computes what it masks, too
    ours += BASE.num_layers * BASE.num_heads * 32 * 4 * (T**2 - T) / 2
  if kind == 'encoder_decoder':
    ours += BASE.num_layers * BASE.num_heads * 32 * 4 * (T**2 - T) / 2
  # XLA adds norms, softmax and activations, a tenth at these sizes.
  assert 0.8 * xla < ours <= xla


def test_what_is_not_read_is_not_counted():
  cfg = dataclasses.replace(BASE, kind='encoder')
  model = models.build(cfg, 50, rngs=nnx.Rngs(0))
  params = nnx.to_pure_dict(nnx.state(model, nnx.Param))

  def count(tokens=T, **scalars):
    return flops.forward(cfg, params, tokens, scalars)

  pairs = 4 * 2 * 64 * T**2  # 2 layers, N * H = 64
  assert count(density=1.0) - count(density=0.25) == 0.75 * pairs
  linear = count(density=0.0)
  assert count(density=0.0, kept_tokens=0.5) == linear / 2
  weights = 2 * (64 * 64 * 2 + 2 * 64 * 32 + 3 * 64 * 128)
  assert linear == 2 * weights * T
