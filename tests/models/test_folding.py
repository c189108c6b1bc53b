"""Folded models against the ones that they were."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from psa_jax import models
from psa_jax.attention.cascade import CascadeConfig
from psa_jax.attention.context import AttentionContext
from psa_jax.attention.hybrid import HybridConfig
from psa_jax.attention.psa import PsaConfig
from psa_jax.attention.topk import TopkConfig
from psa_jax.config import (
  AttentionConfig,
  ConfigError,
  ImageConfig,
  ModelConfig,
  NormConfig,
  QuantConfig,
  ScheduleConfig,
)
from psa_jax.models.folding import fold

pytestmark = pytest.mark.tier('default')

V, T, STEP = 20, 24, 100


def half():
  return ScheduleConfig(init=0.5, final=0.5)


ATTENTION = {
  'dense': AttentionConfig('dense'),
  'psa': AttentionConfig(
    'psa', psa=PsaConfig(block_q=4, block_k=4, window=4, keep=half())
  ),
  'topk': AttentionConfig('topk', topk=TopkConfig(keep=half())),
  'hybrid': AttentionConfig(
    'hybrid', hybrid=HybridConfig(block_q=4, block_k=4, window=4)
  ),
  'sla': AttentionConfig('sla'),
  'cascade': AttentionConfig(
    'cascade', cascade=CascadeConfig(token_keep=0.5, window=4)
  ),
}


def config(**changes):
  norm = NormConfig(
    'prepbn', decay_steps=STEP, scale_init=1.0, eta_init=1.0, base='layernorm'
  )
  small = ModelConfig(
    num_layers=2,
    d_model=16,
    num_heads=4,
    num_kv_heads=2,
    mlp_dim=24,
    norm=norm,
  )
  return dataclasses.replace(small, **changes)


def trained(cfg, size=0.3):
  """A model none of whose arrays is what it began as."""
  model = models.build(cfg, V, rngs=nnx.Rngs(0))
  rng = np.random.default_rng(1)

  def moved(path, x):
    noise = rng.normal(size=x.shape)
    var = path[-1].key == 'var'
    return x + jnp.asarray(size * (np.abs(noise) if var else noise), x.dtype)

  graphdef, params, rest = nnx.split(model, nnx.Param, ...)
  trees = (nnx.to_pure_dict(x) for x in (params, rest))
  return graphdef, *(jax.tree.map_with_path(moved, x) for x in trees)


def rebuilt(folded):
  """The folded model, built as any other: its arrays are all that fit."""
  abstract = nnx.eval_shape(
    lambda: models.build(folded.config, V, rngs=nnx.Rngs(0))
  )
  graphdef, params, rest = nnx.split(abstract, nnx.Param, ...)
  for state, arrays in (
    (params, folded.params),
    (rest, folded.model_state),
  ):
    want = jax.tree.map(lambda x: (x.shape, x.dtype), nnx.to_pure_dict(state))
    got = jax.tree.map(lambda x: (x.shape, x.dtype), arrays)
    assert got == want
  return graphdef, folded.params, folded.model_state


def logits(parts):
  """A jitted function of arrays and tokens."""
  graphdef, *arrays = parts

  @jax.jit
  def run(arrays, tokens):
    model = nnx.merge(graphdef, *arrays)
    out = model(tokens, context=AttentionContext(step=STEP, train=False))
    return model.unembed(out.hidden)

  return run, arrays


def tokens():
  rng = np.random.default_rng(2)
  return jnp.asarray(rng.integers(0, V, (3, T)), jnp.int32)


def check(cfg):
  """Equal logits; no mean, variance or root of one is left to compute."""
  before = trained(cfg)
  folded = fold(cfg, *before[1:], step=STEP)
  assert folded.config.norm.kind == 'none'
  (run, old), (run_folded, new) = logits(before), logits(rebuilt(folded))
  want, got = run(old, tokens()), run_folded(new, tokens())
  assert np.abs(want).max() > 0.1
  scale = np.abs(want).max()
  np.testing.assert_allclose(got / scale, want / scale, atol=1e-5)
  text = [
    f.lower(x, tokens()).compile().as_text()
    for f, x in ((run, old), (run_folded, new))
  ]
  assert ['rsqrt' in x for x in text] == [True, False]


@pytest.mark.parametrize('attention', list(ATTENTION))
def test_folded_equals_unfolded(attention):
  check(config(attention=ATTENTION[attention]))


@pytest.mark.parametrize('kind', ['batchnorm', 'repbn'])
def test_other_norms_fold(kind):
  check(config(norm=NormConfig(kind, scale_init=1.0, eta_init=1.0)))


@pytest.mark.parametrize('tied', [True, False])
@pytest.mark.parametrize('mlp', ['swiglu', 'gelu'])
def test_biases_that_are_there_already(mlp, tied):
  check(config(biases=True, mlp=mlp, tie_embeddings=tied))


@pytest.mark.parametrize('attention', ['dense', 'sla', 'topk', 'cascade'])
def test_a_vision_transformer(attention):
  attention = ATTENTION[attention]
  if attention.name == 'cascade':
    cascade = CascadeConfig(token_keep=0.5)
    attention = AttentionConfig('cascade', cascade=cascade)
  cfg = config(
    kind='vit',
    biases=True,
    mlp='gelu',
    num_kv_heads=4,
    image=ImageConfig(size=8, channels=1, patch=2),
    attention=attention,
  )
  before = trained(cfg, size=0.1)
  folded = fold(cfg, *before[1:], step=STEP)
  rng = np.random.default_rng(3)
  x = jnp.asarray(rng.normal(size=(3, 8, 8, 1)), jnp.float32)

  def logits(parts):
    graphdef, *arrays = parts

    def run(arrays, x):
      model = nnx.merge(graphdef, *arrays)
      return model.classify(
        model(x, context=AttentionContext(step=STEP, train=False)).hidden
      )

    compiled = jax.jit(run).lower(arrays, x).compile()
    return compiled(arrays, x), 'rsqrt' in compiled.as_text()

  (want, roots), (got, none) = logits(before), logits(rebuilt(folded))
  assert np.abs(want).max() > 0.1 and roots and not none
  np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize('biases', [True, False])
@pytest.mark.parametrize('attention', ['dense', 'topk'])
def test_an_encoder_decoder_reads_and_writes_the_same(attention, biases):
  cfg = config(
    kind='encoder_decoder', attention=ATTENTION[attention], biases=biases
  )
  before = trained(cfg, size=0.2)
  folded = fold(cfg, *before[1:], step=STEP)
  ids = (jnp.arange(T)[None] < jnp.asarray([[T], [9], [1]])).astype(jnp.int32)
  source = tokens()[:, ::-1] * ids

  def logits(parts):
    graphdef, *arrays = parts

    def run(arrays, source, ids, tokens):
      model = nnx.merge(graphdef, *arrays)
      context = AttentionContext(step=STEP, train=False)
      out = model(
        tokens,
        source=source,
        source_ids=ids,
        context=context,
      )
      # Decoding takes another way through the same arrays.
      decoding = model.start(
        source, ids, hypotheses=1, length=4, context=context
      )

      def write(decoding, at):
        row = jax.lax.dynamic_slice_in_dim(tokens, at, 1, 1)
        one, decoding = model.advance(decoding, row, at, context=context)
        return decoding, one

      written = jax.lax.scan(write, decoding, jnp.arange(3))[1]
      return model.unembed(out.hidden), written

    compiled = jax.jit(run).lower(arrays, source, ids, tokens()).compile()
    found = compiled(arrays, source, ids, tokens())
    return *found, 'rsqrt' in compiled.as_text()

  *want, roots = logits(before)
  *got, none = logits(rebuilt(folded))
  assert roots and not none
  for x, y in zip(got, want, strict=True):
    scale = np.abs(y).max()
    assert scale > 0.1
    np.testing.assert_allclose(x / scale, y / scale, atol=1e-5)


def test_the_arrays_that_were_given_stay():
  cfg = config()
  _, params, state = trained(cfg)
  names = [jax.tree.structure(x) for x in (params, state)]
  fold(cfg, params, state, step=STEP)
  assert [jax.tree.structure(x) for x in (params, state)] == names


@pytest.mark.parametrize(
  ('changes', 'step', 'words'),
  [
    ({'norm': NormConfig('rmsnorm')}, STEP, 'rmsnorm does not fold'),
    ({}, 50, 'at step 50 PRepBN is still 50% layernorm; it folds from step'),
    ({'attention': AttentionConfig('nsa')}, STEP, 'attention nsa has'),
    ({'attention': AttentionConfig('dsa')}, STEP, 'attention dsa has'),
    ({'quant': QuantConfig(enabled=True)}, STEP, 'turn it off to fold'),
    ({'kind': 'encoder'}, STEP, 'an encoder without a head'),
  ],
)
def test_refusals_say_why(changes, step, words):
  with pytest.raises(ConfigError, match=words):
    fold(config(**changes), {}, {}, step=step)
