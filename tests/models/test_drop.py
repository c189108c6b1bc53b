"""Dropout and drop path in every stack of layers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from psa_jax import models
from psa_jax.attention.context import AttentionContext
from psa_jax.config import AttentionConfig, ImageConfig, ModelConfig
from psa_jax.models.drop import Drop, drops, leave_out

pytestmark = pytest.mark.tier('default')

BASE = ModelConfig(
  num_layers=3, d_model=16, num_heads=2, num_kv_heads=2, mlp_dim=24
)
KINDS = {
  'decoder_lm': {},
  'encoder': {},
  'vit': {'image': ImageConfig(size=8, channels=1, patch=4)},
  'encoder_decoder': {},
}


def forward(cfg, *, step=0, train=True):
  """The jitted output of a model, its parameters the same for every rate."""
  model = models.build(cfg, 11, rngs=nnx.Rngs(0))
  graphdef, state = nnx.split(model)
  rng = np.random.default_rng(0)
  tokens = jnp.asarray(rng.integers(0, 11, (4, 6)))
  given = {}
  if cfg.kind == 'vit':
    tokens = jnp.asarray(rng.normal(size=(4, 8, 8, 1)), jnp.float32)
  if cfg.kind == 'encoder_decoder':
    given = dict(source=tokens, source_ids=jnp.ones((4, 6), jnp.int32))

  def run(state, step):
    model = nnx.merge(graphdef, state)
    return model(
      tokens, **given, context=AttentionContext(step=step, train=train)
    ).hidden

  return jax.jit(run), (state, jnp.int32(step))


def hidden(cfg, **settings):
  run, args = forward(cfg, **settings)
  return np.asarray(run(*args))


@pytest.mark.parametrize('kind', KINDS)
def test_training_draws_by_the_step_and_evaluation_does_not(kind):
  plain = dataclasses.replace(BASE, kind=kind, **KINDS[kind])
  cfg = dataclasses.replace(plain, dropout=0.3, drop_path=0.5)
  first, again, other = (hidden(cfg, step=step) for step in (1, 1, 2))
  np.testing.assert_array_equal(first, again)
  assert np.abs(first - other).max() > 0.1
  want = hidden(plain, train=False)
  np.testing.assert_array_equal(hidden(cfg, train=False), want)


def test_without_rates_the_program_draws_nothing():
  for cfg, drawn in (
    (BASE, False),
    (dataclasses.replace(BASE, drop_path=0.1), True),
  ):
    run, args = forward(cfg)
    text = run.lower(*args).as_text()
    assert ('threefry' in text or 'rng_bit' in text or 'xor' in text) == drawn


def test_scan_loop_and_recomputation_draw_the_same():
  cfg = dataclasses.replace(BASE, dropout=0.2, drop_path=0.4)
  want = hidden(cfg, step=3)
  for change in ({'scan_layers': False}, {'remat': 'full'}):
    got = hidden(dataclasses.replace(cfg, **change), step=3)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_under_cascade_pruning():
  attention = AttentionConfig(name='cascade')
  cfg = dataclasses.replace(BASE, kind='encoder', attention=attention)
  cfg = dataclasses.replace(cfg, drop_path=0.5)
  first, other = (hidden(cfg, step=step) for step in (1, 2))
  assert np.abs(first - other).max() > 0.1


def test_rates_rise_evenly_from_0():
  found = drops(dataclasses.replace(BASE, drop_path=0.4), 5, train=True)
  assert found is not None
  np.testing.assert_allclose(found.path, [0, 0.2, 0.4], atol=1e-7)
  assert len(np.unique(jax.random.key_data(found.key), axis=0)) == 3


def test_drop_path_takes_whole_rows_and_keeps_the_mean():
  cfg = dataclasses.replace(BASE, drop_path=0.25)
  x = jnp.ones((4000, 2, 3))
  drop = Drop(jax.random.key(0), jnp.float32(0.25))
  left = np.asarray(leave_out(drop, x, 0, cfg)).reshape(4000, -1)
  assert (left == left[:, :1]).all()
  np.testing.assert_allclose(np.unique(left), [0, 4 / 3], rtol=1e-6)
  assert abs((left == 0).mean() - 0.25) < 0.03  # four standard errors
  other = np.asarray(leave_out(drop, x, 1, cfg)).reshape(4000, -1)
  assert 0.2 < (left[:, 0] != other[:, 0]).mean() < 0.6  # halves differ


def test_dropout_takes_single_numbers_and_keeps_the_mean():
  cfg = dataclasses.replace(BASE, dropout=0.2)
  drop = Drop(jax.random.key(0), jnp.float32(0))
  left = np.asarray(leave_out(drop, jnp.ones((50, 20, 10)), 0, cfg))
  np.testing.assert_allclose(np.unique(left), [0, 1.25], rtol=1e-6)
  assert abs((left == 0).mean() - 0.2) < 0.016
  assert 0.05 < (left[:, 0] == 0).mean() < 0.4
