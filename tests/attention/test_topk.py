"""Top-k attention as a mechanism: counts, schedules, coefficients, decoding."""

import dataclasses

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from psa_jax.attention import attend as library_attend
from psa_jax.attention import topk as module
from psa_jax.attention.context import AttentionContext
from psa_jax.attention.layer import SelfAttention
from psa_jax.attention.rotary import rotary
from psa_jax.attention.topk import TopkConfig
from psa_jax.config import AttentionConfig, ModelConfig, ScheduleConfig
from psa_jax.types import Learned
from tests import oracles

pytestmark = pytest.mark.tier('default')

B, T, N, K, H, HV = 2, 40, 4, 2, 8, 12
CUBIC = (0.3, 0.8, -0.2, 0.05)


def settings(keep=0.25, **kw):
  return AttentionConfig(
    name='topk', topk=TopkConfig(keep=ScheduleConfig(init=keep), **kw)
  )


def arrays(t=T, seed=0):
  rng = np.random.default_rng(seed)
  shapes = (B, t, N, H), (B, t, K, H), (B, t, K, HV)
  return tuple(jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes)


def oracle(q, k, v, keep, coeffs, *, causal=True, segments=None, clamp=0.0):
  """Output and density, one query at a time."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  out, kept, shares = np.zeros((*q.shape[:3], v.shape[-1])), 0, []
  for b, t, n in np.ndindex(*q.shape[:3]):
    own = np.ones(q.shape[1], bool)
    if segments is not None:
      own = segments[b] == segments[b][t]
    if causal:
      own = own & (np.arange(q.shape[1]) <= t)
    keys = np.flatnonzero(own)
    g = n // (q.shape[2] // k.shape[2])
    s = k[b, keys, g] @ q[b, t, n] * q.shape[-1] ** -0.5
    kept = max(1, int(keep * keys.size + 1e-9))
    shares.append(kept / keys.size)
    best = np.argsort(-s, kind='stable')[:kept]
    c = np.clip(s[best], -clamp, clamp) if clamp else s[best]
    e = np.polyval(coeffs[::-1], c)
    p = np.exp(e - e.max())
    out[b, t, n] = p @ v[b, keys[best], g] / p.sum()
  return out, np.mean(shares)


@pytest.mark.parametrize('causal', [True, False])
@pytest.mark.parametrize('cut', [False, True])
@pytest.mark.parametrize('keep', [0.25, 0.6, 1e-4])
def test_the_ratio_is_of_the_visible_keys(keep, cut, causal):
  """Not of S: an early query would else keep everything it sees."""
  q, k, v = arrays()
  seg = np.stack([np.arange(T) >= 13, np.arange(T) >= 21]).astype(np.int32)
  out, aux = library_attend(
    q,
    k,
    v,
    config=settings(keep, coefficients=CUBIC, clamp=2.0),
    context=AttentionContext(
      step=0, segment_ids=jnp.asarray(seg) if cut else None, causal=causal
    ),
  )
  want, density = oracle(
    q,
    k,
    v,
    keep,
    CUBIC,
    causal=causal,
    segments=seg if cut else None,
    clamp=2.0,
  )
  oracles.check_close(out, want)
  np.testing.assert_allclose(aux['density'], density, 1e-5)


@pytest.mark.parametrize('keep', [0.1, 0.29, 0.7, 0.25, 1 / 3, 0.57])
def test_counts_are_exact_in_f32(keep):
  """`int(0.29 * 100)` is 28; the ratio of a whole number is meant."""
  n = np.arange(1, 3000)
  from fractions import Fraction

  exact = Fraction(keep).limit_denominator(1000)
  want = [max(1, int(x) * exact.numerator // exact.denominator) for x in n]
  got = module.kept_counts(jnp.asarray(n), jnp.float32(keep))
  np.testing.assert_array_equal(got, want)
  assert (module.kept_counts(jnp.arange(5), 1.0) == jnp.arange(5)).all()


def test_the_bound_of_the_engine_is_never_below_a_count():
  for keep in (1.0, 0.25, 0.7, 1e-4):
    cfg = settings(keep).topk
    for n in (1, 3, 10, 1000):
      most = module.most_kept(cfg, n)
      assert int(module.kept_counts(jnp.int32(n), jnp.float32(keep))) <= most
  cfg = dataclasses.replace(settings(0.1).topk, eval_keep=0.9)
  assert module.most_kept(cfg, 1000) == 901
  assert module.keep_at(cfg, 0, True) == jnp.float32(0.1)
  assert module.keep_at(cfg, 0, False) == jnp.float32(0.9)


def test_coefficients_are_ascending_and_default_to_the_softmax():
  """(0, 1, 0, 0) would be s^2 if the highest power came first."""
  q, k, v = arrays()
  config = settings(1.0)
  assert config.topk.coefficients == module.SOFTMAX == (0, 1, 0, 0)
  want = oracles.attention(q, k, v, oracles.causal_mask(B, K, T, T))[0]
  oracles.check_close(
    library_attend(
      q, k, v, config=config, context=AttentionContext(step=0)
    ).out,
    want,
  )


def test_mix_moves_from_the_softmax_to_the_coefficients():
  mix = ScheduleConfig(kind='linear', init=0.0, final=1.0, begin=2, length=4)
  cfg = settings(coefficients=CUBIC, mix=mix).topk
  at = [np.asarray(module.coefficients_at(cfg, s, None)) for s in range(8)]
  np.testing.assert_array_equal(at[0], np.float32(module.SOFTMAX))
  np.testing.assert_array_equal(at[2], at[0])
  np.testing.assert_allclose(at[4], np.add(module.SOFTMAX, CUBIC) / 2, 1e-6)
  np.testing.assert_array_equal(at[6], np.float32(CUBIC))
  np.testing.assert_array_equal(at[7], at[6])


def model(**kw):
  return ModelConfig(
    d_model=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    attention=settings(**kw),
  )


def test_learned_coefficients_belong_to_the_layer():
  layer = SelfAttention(model(), rngs=nnx.Rngs(0))
  assert layer.mechanism is None, 'nothing to learn by default'
  layer = SelfAttention(
    model(learnable=True, coefficients=CUBIC), rngs=nnx.Rngs(0)
  )
  x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 9, 16)), jnp.float32)
  rope = rotary(jnp.arange(9)[None], head_dim=4, theta=100.0)
  graph, params = nnx.split(layer, nnx.Param)

  def loss(params):
    y, _ = nnx.merge(graph, params)(
      x, context=AttentionContext(step=0, rope=rope, train=True)
    )
    return jnp.sin(5 * y).sum()

  grads = nnx.as_pure(jax.grad(loss)(params))
  coefficients = grads['mechanism']['coefficients']
  assert coefficients.shape == (4,) and coefficients[0] == 0
  assert (np.abs(coefficients[1:]) > 1e-6).all()


def test_learned_coefficients_take_the_place_of_the_configured():
  q, k, v = arrays()
  learned = Learned(weights={'coefficients': jnp.asarray(CUBIC)})
  want, _ = oracle(q, k, v, 0.25, CUBIC)
  run = library_attend(
    q,
    k,
    v,
    config=settings(learnable=True),
    learned=learned,
    context=AttentionContext(step=0),
  )
  oracles.check_close(run.out, want)
  fixed = library_attend(
    q,
    k,
    v,
    config=settings(),
    learned=learned,
    context=AttentionContext(step=0),
  )
  oracles.check_close(fixed.out, oracle(q, k, v, 0.25, module.SOFTMAX)[0])
  own = module.coefficients_of(model(learnable=True), rngs=nnx.Rngs(0))
  assert own is not None
  start = own(None, rope=None).weights['coefficients']
  np.testing.assert_array_equal(start, np.float32(module.SOFTMAX))


def test_sparsify_keeps_the_largest_channels_with_a_straight_gradient():
  x = np.random.default_rng(0).normal(size=(2, 3, 10)).astype(np.float32)
  x[0, 0] = [1, -1, 1, -1, 1, -1, 1, -1, 1, -1]  # ties go to the first
  got = np.asarray(module.sparsify(jnp.asarray(x), keep=0.3))
  for row, kept in zip(x.reshape(-1, 10), got.reshape(-1, 10), strict=True):
    best = np.argsort(-np.abs(row), kind='stable')[:3]
    want = np.zeros(10, np.float32)
    want[best] = row[best]
    np.testing.assert_array_equal(kept, want)
  weights = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)

  def loss(x):
    return (module.sparsify(x, keep=0.3) * weights).sum()

  np.testing.assert_array_equal(jax.grad(loss)(jnp.asarray(x)), weights)
  same = jnp.asarray(x)
  assert module.sparsify(same, keep=1.0) is same
  assert (np.asarray(module.sparsify(same, keep=1e-3)) != 0).sum() == 6
  half = module.sparsify(same.astype(jnp.bfloat16), keep=0.3)
  assert ((np.asarray(half, np.float32) != 0) == (got != 0)).all()


def test_sparsify_reaches_queries_and_keys():
  q, k, v = arrays()
  for name in ('sparsify_q', 'sparsify_k'):
    config = settings(**{name: 0.5})
    thin = [
      module.sparsify(x, keep=0.5) if name.endswith(letter) else x
      for x, letter in ((q, 'q'), (k, 'k'))
    ]
    want, _ = oracle(*thin, v, 0.25, module.SOFTMAX)
    oracles.check_close(
      library_attend(
        q, k, v, config=config, context=AttentionContext(step=0)
      ).out,
      want,
    )


@pytest.mark.parametrize('cut', [False, True])
def test_decoding_is_prefill_token_by_token(cut):
  """Ragged rows, several tokens at a time, a cache with garbage behind.

  What evaluation keeps, not what training does.
  """
  q, k, v = arrays()
  config = settings(
    0.9, eval_keep=0.3, coefficients=CUBIC, clamp=2.0, sparsify_k=0.5
  )
  begins = np.stack([np.arange(T) >= 13, np.arange(T) >= 21])
  seg = jnp.asarray(begins.astype(np.int32)) if cut else None
  want = library_attend(
    q,
    k,
    v,
    config=config,
    context=AttentionContext(step=0, segment_ids=seg, train=False),
  ).out
  room = [(0, 0), (0, 7), (0, 0), (0, 0)]
  cache = [jnp.pad(x, room, constant_values=3e4) for x in (k, v)]
  decode = jax.jit(
    lambda q, lengths, starts: module.decode(
      q, *cache, config=config, lengths=lengths, step=0, starts=starts
    )
  )
  for new in (1, 3):
    for t in range(new, T - 5):
      lengths = np.array([t, t + 5])
      at = lengths[:, None] - new + np.arange(new)
      own = begins[[[0], [1]], at]
      if cut and (own != own[:, :1]).any():
        continue  # new tokens of two documents
      starts = np.where(own[:, -1], [13, 21], 0) if cut else None
      row = np.arange(B)[:, None]
      out = decode(q[row, at], jnp.asarray(lengths), starts)
      oracles.check_close(out, want[row, at], what=str(lengths))


def test_decoding_an_idle_row_gives_zero():
  q, k, v = arrays()
  lengths = jnp.asarray([0, 2])
  out = module.decode(
    q[:, :3], k, v, config=settings(), lengths=lengths, step=0
  )
  assert (np.asarray(out[0]) == 0).all() and (np.asarray(out[1, 0]) == 0).all()
  assert (np.asarray(out[1, 1:]) != 0).any()


def weights_oracle(x, top_k, coeffs, clamp=0.0):
  """Dense [rows, n] weights of `sparse_poly_softmax`."""
  x = np.asarray(x, np.float64)
  dense = np.zeros_like(x)
  for row, out, count in zip(x, dense, top_k, strict=True):
    best = np.argsort(-row, kind='stable')[:count]
    best = best[row[best] > -np.inf]
    if best.size:
      c = np.clip(row[best], -clamp, clamp) if clamp else row[best]
      e = np.polyval(coeffs[::-1], c)
      out[best] = np.exp(e - e.max()) / np.exp(e - e.max()).sum()
  return dense


def dense_weights(found, n):
  dense = np.zeros((len(found.weights), n + 1))
  np.put_along_axis(
    dense, np.asarray(found.indices), np.asarray(found.weights), 1
  )
  return dense[:, :n]


@pytest.mark.parametrize('implementation', ['reference', 'xla'])
@hypothesis.given(
  seed=st.integers(0, 2**31), n=st.integers(1, 40), spread=st.integers(1, 40)
)
@hypothesis.settings(max_examples=10)
def test_sparse_poly_softmax_equals_sorting(implementation, seed, n, spread):
  """On every input: few distinct values make ties, -inf is masked."""
  rng = np.random.default_rng(seed)
  x = rng.integers(-spread, spread, (5, 40)).astype(np.float32) / 8
  x[rng.random(x.shape) < 0.2] = -np.inf
  x[4] = -np.inf
  counts = np.array([n, 1, 40, 0, n])
  found = module.sparse_poly_softmax(
    jnp.asarray(x),
    jnp.asarray(counts),
    CUBIC,
    clamp=2.0,
    max_k=40,
    implementation=implementation,
  )
  want = weights_oracle(x, counts, CUBIC, clamp=2.0)
  np.testing.assert_allclose(dense_weights(found, 40), want, 1e-5, 1e-7)
  assert ((dense_weights(found, 40) == 0) == (want == 0)).all()


def test_sparse_poly_softmax_gradients_and_widths():
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(3, 20)), jnp.float32).at[0, 3].set(-jnp.inf)
  found = module.sparse_poly_softmax(x, 6, CUBIC)
  assert found.weights.shape == found.indices.shape == (3, 6)
  assert (np.diff(found.indices) > 0).all()
  d_w = rng.normal(size=(3, 6)).astype(np.float32)

  def loss(x, coeffs):
    return (module.sparse_poly_softmax(x, 6, coeffs).weights * d_w).sum()

  dx, da = jax.grad(loss, (0, 1))(x, jnp.asarray(CUBIC))
  assert np.isfinite(dx).all() and da[0] == 0
  outside = np.ones((3, 21), bool)
  np.put_along_axis(outside, np.asarray(found.indices), False, 1)
  assert (np.asarray(dx)[outside[:, :20]] == 0).all()

  # Central differences in float64.
  def at(x, coeffs):
    dense = weights_oracle(x, [6] * 3, coeffs)
    kept = np.take_along_axis(dense, np.asarray(found.indices), 1)
    return (kept * d_w.astype(np.float64)).sum()

  base_x, h = np.asarray(x, np.float64), 1e-6
  for r, c in ((0, 5), (1, 2), (2, 19), (2, 0)):
    step = np.zeros_like(base_x)
    step[r, c] = h
    slope = (at(base_x + step, CUBIC) - at(base_x - step, CUBIC)) / (2 * h)
    np.testing.assert_allclose(dx[r, c], slope, rtol=1e-3, atol=1e-5)
  for i in range(1, 4):
    step = np.eye(4)[i] * h
    slope = at(base_x, CUBIC + step) - at(base_x, CUBIC - step)
    np.testing.assert_allclose(da[i], slope / (2 * h), rtol=1e-3, atol=1e-5)
