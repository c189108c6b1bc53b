"""The vision Transformer: patches, positions, head, what a picture may be."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from psa_jax import models
from psa_jax.attention.cascade import CascadeConfig
from psa_jax.attention.context import AttentionContext
from psa_jax.attention.topk import TopkConfig
from psa_jax.config import (
  AttentionConfig,
  ImageConfig,
  ModelConfig,
  NormConfig,
  ScheduleConfig,
)

pytestmark = pytest.mark.tier('default')

CLASSES = 5
SMALL = ModelConfig(
  kind='vit',
  num_layers=2,
  d_model=16,
  num_heads=4,
  num_kv_heads=4,
  mlp_dim=24,
  mlp='gelu',
  biases=True,
  image=ImageConfig(size=6, channels=3, patch=2),
  norm=NormConfig('layernorm'),
)


def build(**changes):
  config = dataclasses.replace(SMALL, **changes)
  return models.build(config, CLASSES, rngs=nnx.Rngs(0))


def pictures(rows=3, seed=0):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.normal(size=(rows, 6, 6, 3)), jnp.float32)


def test_patches_are_cut_row_by_row():
  """Against a loop over the picture, in float64."""
  model, x = build(), pictures()
  kernel = np.asarray(model.patches[...], np.float64)
  rng = np.random.default_rng(1)
  model.patches_bias[...] = jnp.asarray(rng.normal(size=16), jnp.float32)
  got = model.embed(x)
  assert got.shape == (3, 9, 16)
  place = 0
  for row in range(0, 6, 2):
    for column in range(0, 6, 2):
      patch = np.asarray(x, np.float64)[:, row : row + 2, column : column + 2]
      want = patch.reshape(3, -1) @ kernel
      want += np.asarray(model.patches_bias[...] + model.places[...][place])
      np.testing.assert_allclose(got[:, place], want, atol=1e-5)
      place += 1


def test_every_patch_is_seen_by_every_other():
  model, x = build(), pictures(1)

  def first(x):
    return (
      model(x, context=AttentionContext(step=0, train=False)).hidden[0, 0].sum()
    )

  slope = np.abs(jax.grad(first)(x))[0].sum(-1)
  assert (slope > 0).all()


def test_without_positions_the_order_of_patches_does_not_matter():
  model, x = build(), pictures(1)
  model.head[...] = jnp.asarray(
    np.random.default_rng(2).normal(size=(16, CLASSES)), jnp.float32
  )

  def logits(x):
    return model.classify(
      model(x, context=AttentionContext(step=0, train=False)).hidden
    )

  swapped = jnp.concatenate([x[:, 4:], x[:, 2:4], x[:, :2]], 1)
  assert np.abs(logits(x) - logits(swapped)).max() > 1e-3
  model.places[...] = jnp.zeros_like(model.places[...])
  np.testing.assert_allclose(logits(x), logits(swapped), atol=1e-5)


def test_the_head_reads_the_mean_of_the_tokens():
  model = build()
  rng = np.random.default_rng(3)
  model.head[...] = jnp.asarray(rng.normal(size=(16, CLASSES)), jnp.float32)
  model.head_bias[...] = jnp.asarray(rng.normal(size=CLASSES), jnp.float32)
  hidden = rng.normal(size=(4, 9, 16))
  want = hidden.mean(1) @ np.asarray(model.head[...], np.float64)
  want += np.asarray(model.head_bias[...])
  got = model.classify(jnp.asarray(hidden, jnp.float32))
  np.testing.assert_allclose(got, want, atol=1e-5)


HALF = ScheduleConfig(init=0.5, final=0.5)


@pytest.mark.parametrize(
  'attention',
  [
    AttentionConfig('sla'),
    AttentionConfig('topk', topk=TopkConfig(keep=HALF)),
    AttentionConfig('cascade', cascade=CascadeConfig(token_keep=0.5)),
  ],
  ids=lambda x: x.name,
)
def test_other_attention_runs_and_learns(attention):
  model = build(attention=attention)
  graphdef, params, rest = nnx.split(model, nnx.Param, ...)

  def loss(params):
    model = nnx.merge(graphdef, params, rest)
    out = model(pictures(), context=AttentionContext(step=0, train=True))
    return (out.hidden * jnp.arange(16.0)[None, None]).sum(), out.aux

  grads, aux = jax.grad(loss, has_aux=True)(params)
  assert aux['density'] < 1
  slopes = [np.abs(x).max() for x in jax.tree.leaves(grads['layers'])]
  assert np.isfinite(slopes).all() and max(slopes) > 0


def test_pictures_of_another_shape_are_refused():
  with pytest.raises(ValueError, match=r'must be \[B, 6, 6, 3\]'):
    build()(jnp.zeros((1, 8, 8, 3)), context=AttentionContext())
