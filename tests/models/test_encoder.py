"""The bidirectional encoder: what it sees, padding, and the pooled vector."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from psa_jax import models
from psa_jax.attention.context import AttentionContext
from psa_jax.attention.psa import PsaConfig
from psa_jax.config import AttentionConfig, ConfigError, ModelConfig
from psa_jax.models import encoder as encoder_lib
from tests import oracles
from tests.models import cascade_oracle
from tests.models.test_cascade import compiled

pytestmark = pytest.mark.tier('default')

V, T = 28, 12
CONFIG = ModelConfig(
  kind='encoder',
  num_layers=2,
  d_model=16,
  num_heads=4,
  num_kv_heads=2,
  mlp_dim=24,
  attention=AttentionConfig('dense', implementation='reference'),
)
SEGMENTS = jnp.asarray([[1] * T, [1] * 8 + [0] * 4], jnp.int32)


def tokens(seed=0):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.integers(0, V, (2, T)), jnp.int32)


@pytest.fixture(scope='module')
def model():
  return models.build(CONFIG, V, rngs=nnx.Rngs(0))


@pytest.fixture(scope='module')
def hidden(model):
  graphdef, state = nnx.split(model)

  @compiled
  def run(state, batch, segments):
    model = nnx.merge(graphdef, state)
    return model(
      batch, context=AttentionContext(step=0, train=False, segment_ids=segments)
    ).hidden

  return lambda batch, segments=SEGMENTS: run(state, batch, segments)


def test_equals_the_oracle_without_pruning(model, hidden):
  params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
  params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  for b in range(2):
    want, *_ = cascade_oracle.row(
      params, np.asarray(tokens()[b]), np.asarray(SEGMENTS[b]),
      shares=(1024,) * 2, head_counts=(2, 2), causal=False, statistics=None,
    )  # fmt: skip
    real = np.asarray(SEGMENTS[b] > 0)
    got = hidden(tokens())[b]
    oracles.check_close(got[real], want[real], gradient=True)


def test_every_token_sees_every_other_one_but_no_padding(hidden):
  want = hidden(tokens())
  for t in range(T):
    got = hidden(tokens().at[:, t].set((tokens()[:, t] + 5) % V))
    moved = np.asarray(got != want).any(-1)
    assert moved[0].all()
    assert moved[1, :8].all() == moved[1, :8].any() == (t < 8)


def test_packed_documents_do_not_mix(hidden):
  segments = jnp.asarray([[1] * 5 + [2] * 7] * 2, jnp.int32)
  want = hidden(tokens(), segments)
  got = hidden(tokens().at[:, :5].set(3), segments)
  np.testing.assert_array_equal(got[:, 5:], want[:, 5:])
  assert (got[:, :5] != want[:, :5]).any()


def test_pool_is_the_mean_of_the_tokens():
  x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 5, 4)), jnp.float32)
  ids = jnp.asarray([[1] * 5, [1, 1, 0, 0, 0], [0] * 5], jnp.int32)
  x = x.at[1, 2:].set(jnp.nan)
  got = encoder_lib.pool(x, ids)
  np.testing.assert_allclose(got[0], x[0].mean(0), rtol=1e-6)
  np.testing.assert_allclose(got[1], x[1, :2].mean(0), rtol=1e-6)
  assert not got[2].any()
  np.testing.assert_array_equal(encoder_lib.pool(x[:1]), x[:1].mean(1))


def test_a_causal_mechanism_is_refused():
  attention = AttentionConfig('psa', psa=PsaConfig())
  with pytest.raises(ConfigError, match='psa, which is causal, but .*encoder'):
    dataclasses.replace(CONFIG, attention=attention)


def test_companions_of_another_shape_are_refused(model):
  with pytest.raises((ValueError, TypeError), match='segment_ids'):
    model(
      tokens(),
      context=AttentionContext(
        step=0, train=False, segment_ids=SEGMENTS[:, :3]
      ),
    )


def test_a_vocabulary_that_is_too_small_is_refused():
  cfg = dataclasses.replace(CONFIG, vocab_size=20)
  with pytest.raises(ConfigError, match='vocab_size=20 cannot hold the 28'):
    models.build(cfg, V, rngs=nnx.Rngs(0))
