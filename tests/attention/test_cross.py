"""Cross-attention, against a plain one in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from psa_jax.attention.context import AttentionContext
from psa_jax.attention.cross import CrossAttention, KeyValues, attend_cached
from psa_jax.attention.topk import TopkConfig
from psa_jax.config import (
  AttentionConfig,
  ConfigError,
  ModelConfig,
  ScheduleConfig,
)

pytestmark = pytest.mark.tier('default')

B, T, S, N, K, H = 2, 5, 9, 4, 2, 8
LENGTHS = np.array([9, 4])


def arrays(seed=0):
  rng = np.random.default_rng(seed)
  shapes = (B, T, N, H), (B, S, K, H), (B, S, K, H)
  return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def oracle(q, k, v, keep=1.0):
  """Softmax over the best keys of every query and head, in float64."""
  q, k, v = (x.astype(np.float64) for x in (q, k, v))
  out = np.zeros(q.shape)
  for b in range(B):
    n = LENGTHS[b]
    count = max(1, int(keep * n + 1e-3))
    for t in range(T):
      for head in range(N):
        group = head // (N // K)
        scores = k[b, :n, group] @ q[b, t, head] / H**0.5
        best = np.argsort(-scores)[:count]
        p = np.exp(scores[best] - scores[best].max())
        out[b, t, head] = (p / p.sum()) @ v[b, best, group]
  return out


def attention(name, keep=1.0):
  schedule = ScheduleConfig('constant', init=keep)
  return AttentionConfig(name=name, topk=TopkConfig(keep=schedule))


@pytest.mark.parametrize(
  ('name', 'keep'), [('dense', 1.0), ('topk', 1.0), ('topk', 0.3)]
)
def test_reads_the_keys_that_count(name, keep):
  q, k, v = arrays()
  memory = KeyValues(k, v, jnp.asarray(LENGTHS))
  found = attend_cached(
    jnp.asarray(q),
    jax.tree.map(jnp.asarray, memory),
    config=attention(name, keep),
    context=AttentionContext(step=0, train=True),
  )
  np.testing.assert_allclose(found.out, oracle(q, k, v, keep), atol=2e-6)
  counts = [max(1, int(keep * n + 1e-3)) / n for n in LENGTHS]
  assert float(found.aux['cross_density']) == pytest.approx(np.mean(counts))


@pytest.mark.parametrize('name', ['dense', 'topk'])
def test_padding_moves_nothing_and_gets_no_gradient(name):
  q, k, v = map(jnp.asarray, arrays())
  noise = jnp.where(jnp.arange(S)[None, :, None, None] >= 4, 100.0, 0.0)

  def run(k, v):
    lengths = jnp.full((B,), 4, jnp.int32)
    return attend_cached(
      q,
      KeyValues(k, v, lengths),
      config=attention(name, 0.5),
      context=AttentionContext(step=0, train=True),
    ).out

  np.testing.assert_array_equal(run(k, v), run(k + noise, v + noise))
  for grad in jax.grad(lambda k, v: (run(k, v) ** 2).sum(), (0, 1))(k, v):
    assert np.abs(grad[:, 4:]).max() == 0 < np.abs(grad[:, :4]).max()


def test_other_mechanisms_are_refused():
  q, k, v = map(jnp.asarray, arrays())
  with pytest.raises(
    ConfigError, match='psa reads no other sequence.*dense or'
  ):
    attend_cached(
      q,
      KeyValues(k, v, jnp.asarray(LENGTHS)),
      config=attention('psa'),
      context=AttentionContext(step=0, train=True),
    )


def test_the_layer_is_projections_around_it():
  config = ModelConfig(
    d_model=16,
    num_heads=N,
    num_kv_heads=K,
    head_dim=H,
    biases=True,
    attention=attention('topk', 0.5),
  )
  layer = CrossAttention(config, rngs=nnx.Rngs(0))
  rng = np.random.default_rng(1)
  for name in ('bq', 'bk', 'bv', 'bo'):
    bias = getattr(layer, name)
    bias[...] = jnp.asarray(rng.normal(size=bias.shape), jnp.float32)
  x, memory = (rng.normal(size=(B, n, 16)).astype(np.float32) for n in (T, S))
  kept = layer.project_kv(jnp.asarray(memory), jnp.asarray(LENGTHS))
  out, _ = layer(
    jnp.asarray(x), kept, context=AttentionContext(step=0, train=True)
  )

  def project(x, w, b):
    return np.einsum('btd,dnh->btnh', x, np.asarray(w)) + np.asarray(b)

  q = project(x, layer.wq[...], layer.bq[...])
  k = project(memory, layer.wk[...], layer.bk[...])
  v = project(memory, layer.wv[...], layer.bv[...])
  want = oracle(q, k, v, 0.5)
  want = np.einsum('btnh,nhd->btd', want, layer.wo[...])
  want = want + np.asarray(layer.bo[...])
  np.testing.assert_allclose(out, want, atol=1e-5)
  layer.config = dataclasses.replace(
    layer.config, attention=layer.config.attention.read_by('dense')
  )
  out, aux = layer(
    jnp.asarray(x), kept, context=AttentionContext(step=0, train=True)
  )
  want = np.einsum('btnh,nhd->btd', oracle(q, k, v), layer.wo[...])
  np.testing.assert_allclose(out, want + np.asarray(layer.bo[...]), atol=1e-5)
  assert float(aux['cross_density']) == 1
