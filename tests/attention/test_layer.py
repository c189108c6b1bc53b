"""The attention layer against NumPy, and what it hands to a mechanism."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from psa_jax.attention import layer as layer_lib
from psa_jax.attention.context import AttentionContext
from psa_jax.attention.layer import SelfAttention
from psa_jax.attention.projections import head_dim
from psa_jax.attention.rotary import rotary, rotate
from psa_jax.config import ConfigError, ModelConfig
from psa_jax.types import AttnOut

CONFIG = ModelConfig(
  num_layers=3, d_model=24, num_heads=4, num_kv_heads=2, head_dim=6
)


def make_layer(**changes):
  return SelfAttention(dataclasses.replace(CONFIG, **changes), rngs=nnx.Rngs(0))


def normal(*shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def table(positions, width=6, theta=500_000.0):
  return rotary(jnp.asarray(positions), head_dim=width, theta=theta)


def turn(x, positions, theta=500_000.0):
  """RoPE with complex numbers: channel i pairs with i + H/2."""
  half = x.shape[-1] // 2
  frequency = theta ** (-np.arange(half) / half)
  spin = np.exp(1j * positions[..., None, None] * frequency)
  turned = (x[..., :half] + 1j * x[..., half:]) * spin
  return np.concatenate([turned.real, turned.imag], -1)


def oracle(layer, x, positions, segments):
  """The whole layer in NumPy float64, head by head and query by query."""
  w = {n: np.asarray(getattr(layer, n)[...], np.float64) for n in KERNELS}
  q = turn(np.einsum('btd,dnh->btnh', x, w['wq']), positions)
  k = turn(np.einsum('btd,dkh->btkh', x, w['wk']), positions)
  v = np.einsum('btd,dkh->btkh', x, w['wv'])
  group = q.shape[2] // k.shape[2]
  out = np.zeros_like(q)
  for b, t, n in np.ndindex(q.shape[:3]):
    seen = (np.arange(t + 1) <= t) & (segments[b, : t + 1] == segments[b, t])
    keys, values = k[b, : t + 1, n // group], v[b, : t + 1, n // group]
    score = keys[seen] @ q[b, t, n] / np.sqrt(q.shape[-1])
    weight = np.exp(score - score.max())
    out[b, t, n] = weight @ values[seen] / weight.sum()
  return np.einsum('btnh,nhd->btd', out, w['wo'])


KERNELS = ('wq', 'wk', 'wv', 'wo')
SEGMENTS = np.asarray([[0] * 9, [0] * 4 + [1] * 5], np.int32)
POSITIONS = np.asarray([[*range(9)], [*range(4), *range(5)]], np.int32)


@pytest.fixture
def calls(monkeypatch):
  """Replaces the mechanism by one that returns a multiple of the queries."""
  calls = []

  def attend(q, k, v, **kwargs):
    calls.append((q, k, v, kwargs))
    return AttnOut(2 * q, {'density': jnp.float32(0.25)})

  monkeypatch.setattr(layer_lib, 'attend', attend)
  return calls


@pytest.mark.parametrize('kv_heads', [1, 2, 4])
@pytest.mark.parametrize('packed', [False, True])
def test_dense_layer_equals_the_oracle(kv_heads, packed):
  layer, x = make_layer(num_kv_heads=kv_heads), normal(2, 9, 24)
  positions = POSITIONS if packed else POSITIONS[[0, 0]]
  segments = SEGMENTS if packed else np.zeros_like(SEGMENTS)
  y, aux = layer(
    jnp.asarray(x),
    context=AttentionContext(
      step=0,
      rope=table(positions),
      segment_ids=jnp.asarray(segments) if packed else None,
      train=True,
    ),
  )
  want = oracle(layer, x.astype(np.float64), positions, segments)
  np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-5)
  assert aux['density'].shape == ()


def test_every_kernel_gets_a_gradient():
  layer, x = make_layer(), jnp.asarray(normal(2, 9, 24))
  graphdef, params = nnx.split(layer, nnx.Param)

  def loss(params):
    block = nnx.merge(graphdef, params)
    y, _ = block(
      x, context=AttentionContext(step=0, rope=table(POSITIONS), train=True)
    )
    return jnp.sum(jnp.sin(y))

  grads = jax.grad(loss)(nnx.as_pure(params))
  assert set(grads) == set(KERNELS)
  assert all(np.abs(g).max() > 1e-4 for g in grads.values())


def test_one_rotary_row_serves_the_whole_batch():
  layer, x = make_layer(), jnp.asarray(normal(2, 9, 24))
  one, both = (
    layer(
      x, context=AttentionContext(step=0, rope=table(positions), train=True)
    )[0]
    for positions in (POSITIONS[:1], POSITIONS[[0, 0]])
  )
  np.testing.assert_array_equal(one, both)


def test_mechanism_gets_what_the_layer_was_given(calls):
  layer, x = make_layer(), jnp.asarray(normal(2, 9, 24))
  y, aux = layer(
    x,
    context=AttentionContext(
      step=jnp.int32(3),
      rope=table(POSITIONS),
      segment_ids=jnp.asarray(SEGMENTS),
      train=False,
    ),
  )
  (q, k, v, kwargs), *more = calls
  assert not more and aux == {'density': 0.25}
  assert q.shape == (2, 9, 4, 6)
  assert k.shape == v.shape == (2, 9, 2, 6)
  assert kwargs.pop('config') == CONFIG.attention
  context = kwargs.pop('context')
  assert (context.step, context.train, context.causal) == (3, False, True)
  np.testing.assert_array_equal(context.segment_ids, SEGMENTS)
  assert context.budget is None and kwargs == {'learned': None}
  w = {n: np.asarray(getattr(layer, n)[...], np.float64) for n in KERNELS}
  want_q = turn(np.einsum('btd,dnh->btnh', x, w['wq']), POSITIONS)
  want_k = turn(np.einsum('btd,dkh->btkh', x, w['wk']), POSITIONS)
  np.testing.assert_allclose(q, want_q, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(k, want_k, rtol=1e-4, atol=1e-5)
  want_v = np.einsum('btd,dkh->btkh', x, w['wv'])
  np.testing.assert_allclose(v, want_v, rtol=1e-4, atol=1e-5)
  want = np.einsum('btnh,nhd->btd', 2 * want_q, w['wo'])
  np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-5)


def test_bf16_activations_meet_bf16_kernels_and_f32_angles(calls):
  layer, x = make_layer(), jnp.asarray(normal(2, 9, 24), jnp.bfloat16)
  far = table(POSITIONS + 65_000)
  assert far.cos.dtype == far.sin.dtype == jnp.float32
  y, _ = layer(x, context=AttentionContext(step=0, rope=far, train=True))
  q, k, v, _ = calls[0]
  assert {a.dtype.name for a in (q, k, v, y)} == {'bfloat16'}
  assert layer.wq[...].dtype == jnp.float32
  wq = np.asarray(layer.wq[...].astype(jnp.bfloat16), np.float64)
  plain = np.einsum('btd,dnh->btnh', np.asarray(x, np.float64), wq)
  want = turn(plain, POSITIONS + 65_000)
  assert np.abs(np.asarray(q, np.float64) - want).max() < 0.03


def test_bf16_products_accumulate_in_f32():
  # Summed in bf16, ones stop at 256.
  x, w = jnp.ones((1, 1, 2048), jnp.bfloat16), nnx.Param(jnp.ones((2048, 4)))
  y = jax.jit(lambda x: layer_lib.project(x, w))(x)
  assert y.dtype == jnp.bfloat16 and np.all(np.asarray(y) == 2048)


def test_rotary_equals_complex_rotation_at_64k():
  x = normal(1, 5, 3, 64)
  positions = np.asarray([[0, 1, 500, 32_767, 65_535]])
  got = rotate(jnp.asarray(x), table(positions, width=64))
  want = turn(x.astype(np.float64), positions)
  # An f32 angle of 65,535 is off by up to 2^-8.
  np.testing.assert_allclose(got, want, atol=0.02)
  np.testing.assert_allclose(got[:, :3], want[:, :3], atol=2e-4)
  np.testing.assert_array_equal(got[:, 0], x[:, 0])


def test_rotary_keeps_lengths_and_sees_distances_only():
  q, k = normal(1, 1, 1, 16), normal(1, 1, 1, 16, seed=1)

  def score(at, back):
    one = rotate(jnp.asarray(q), table([[at]], width=16, theta=100.0))
    two = rotate(jnp.asarray(k), table([[at - back]], width=16, theta=100.0))
    np.testing.assert_allclose(
      np.linalg.norm(one), np.linalg.norm(q), rtol=1e-6
    )
    return float(jnp.sum(one * two))

  assert score(9, 4) == pytest.approx(score(700, 4), abs=1e-3)
  assert score(9, 4) != pytest.approx(score(9, 5), abs=1e-2)


def test_kernels_start_at_their_fan_in():
  config = dict(d_model=256, num_heads=8, num_kv_heads=4, head_dim=64)
  layer = make_layer(num_layers=8, **config)
  want = {'wq': 256**-0.5, 'wk': 256**-0.5, 'wv': 256**-0.5}
  want['wo'] = (8 * 64 * 2 * 8) ** -0.5
  for name, std in want.items():
    kernel = np.asarray(getattr(layer, name)[...])
    assert kernel.std() == pytest.approx(std, rel=0.03)
    assert np.abs(kernel).max() < 2.3 * std
  assert not np.array_equal(layer.wk[...], layer.wv[...])


def test_head_width():
  assert head_dim(CONFIG) == 6
  assert head_dim(dataclasses.replace(CONFIG, head_dim=72)) == 72
  assert head_dim(dataclasses.replace(CONFIG, num_heads=6, head_dim=0)) == 4


@pytest.mark.parametrize(
  'change, words',
  [
    (dict(num_kv_heads=3), 'num_heads is 4, but it must be a multiple'),
    (dict(head_dim=0, num_heads=10), 'd_model is 24, not a multiple'),
    (dict(head_dim=5), 'is 5, but RoPE needs an even'),
    (
      dict(head_dim=0, num_heads=8),
      'is 3, but RoPE needs an even',
    ),
  ],
)
def test_heads_that_do_not_fit_are_refused(change, words):
  with pytest.raises(ConfigError, match=words):
    make_layer(**change)
