"""Top-k attention against its definition in NumPy loops, float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psa_jax.config import ConfigError
from psa_jax.kernels.topk_attention import topk_attention, xla
from tests import oracles

B, T, K, H, HV = 2, 40, 2, 8, 12
CUBIC = (0.3, 0.8, -0.2, 0.05)
SOFTMAX = (0.0, 1.0, 0.0, 0.0)


@pytest.fixture(params=['one tile', 'many tiles'])
def tiles(request, monkeypatch):
  """Tiles of 8 rows cut the queries into several, in four parts."""
  if request.param == 'many tiles':
    monkeypatch.setattr(xla, 'TILE_SCORES', 1)
    monkeypatch.setattr(xla, 'MIN_ROWS', 8)


def arrays(group=2, t=T, seed=0, h=H):
  rng = np.random.default_rng(seed)
  shapes = (B, t, K * group, h), (B, t, K, h), (B, t, K, HV)
  return tuple(jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes)


def visible(t=T, documents=False):
  """Begin and end [B, T], causal; and counts of every kind."""
  end = np.tile(np.arange(1, t + 1), (B, 1))
  begin = np.zeros_like(end)
  if documents:
    begin[0, 13:], begin[1, 21:] = 13, 21
  rng = np.random.default_rng(3)
  counts = rng.integers(1, end - begin + 1)
  counts[:, 7] = 0
  counts[:, 8] = (end - begin)[:, 8]
  return begin, end, counts


@functools.partial(
  jax.jit,
  static_argnames=('causal', 'clamp', 'max_count', 'implementation', 'tiles'),
)
def _run(q, k, v, coeffs, begin, end, counts, *, tiles, **kw):
  del tiles  # a part of the trace
  rows = (jnp.asarray(x, jnp.int32) for x in (begin, end, counts))
  names = dict(zip(('begin', 'end', 'counts'), rows, strict=True))
  coeffs = jnp.stack([jnp.asarray(a, jnp.float32) for a in coeffs])
  return topk_attention(q, k, v, coeffs, **names, **{'causal': True} | kw)


def run(*args, **kw):
  return _run(*args, tiles=(xla.TILE_SCORES, xla.MIN_ROWS), **kw)


def oracle(q, k, v, coeffs, begin, end, counts, d_out, clamp=0.0):
  """Output and gradients in q, k, v and the coefficients, row by row."""
  q, k, v, d_out = (np.asarray(x, np.float64) for x in (q, k, v, d_out))
  a0, a1, a2, a3 = coeffs
  group, scale = q.shape[2] // k.shape[2], q.shape[-1] ** -0.5
  out = np.zeros((*q.shape[:3], v.shape[-1]))
  dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
  da = np.zeros(4)
  for b, t, n in np.ndindex(*q.shape[:3]):
    g, keys = n // group, np.arange(begin[b, t], end[b, t])
    raw = k[b, keys, g] @ q[b, t, n] * scale
    keys = keys[np.argsort(-raw, kind='stable')[: counts[b, t]]]
    if not keys.size:
      continue
    s = k[b, keys, g] @ q[b, t, n] * scale
    c = np.clip(s, -clamp, clamp) if clamp else s
    e = a0 + a1 * c + a2 * c**2 + a3 * c**3
    p = np.exp(e - e.max())
    p /= p.sum()
    out[b, t, n] = p @ v[b, keys, g]
    dp = v[b, keys, g] @ d_out[b, t, n]
    de = p * (dp - p @ dp)
    da += [0, de @ c, de @ c**2, de @ c**3]
    ds = de * (a1 + 2 * a2 * c + 3 * a3 * c**2) * scale
    if clamp:
      ds = ds * (np.abs(s) <= clamp)
    dq[b, t, n] = ds @ k[b, keys, g]
    dk[b, keys, g] += ds[:, None] * q[b, t, n]
    dv[b, keys, g] += p[:, None] * d_out[b, t, n]
  return out, (dq, dk, dv, da)


def check(args, coeffs, rows, **kw):
  """Value and every gradient of one implementation against the oracle."""
  rng = np.random.default_rng(1)
  q, k, v = args
  d_out = rng.normal(size=(*q.shape[:3], v.shape[-1])).astype(np.float32)
  kw = {'causal': True, **kw}

  @jax.jit
  def value_and_grads(q, k, v, coeffs):
    def loss(*args):
      out = run(*args, *rows, **kw)
      return (out * d_out).sum(), out

    return jax.grad(loss, (0, 1, 2, 3), has_aux=True)(q, k, v, coeffs)

  grads, out = value_and_grads(q, k, v, jnp.asarray(coeffs, jnp.float32))
  want, want_grads = oracle(
    q, k, v, coeffs, *rows, d_out, clamp=kw.get('clamp', 0.0)
  )
  oracles.check_close(out, want)
  for got, grad in zip(grads[:3], want_grads, strict=False):
    oracles.check_close(got, grad, gradient=True)
  # Sums over all pairs, which cancel: their own size is no measure.
  np.testing.assert_allclose(grads[3], want_grads[3], rtol=1e-3, atol=1e-3)
  assert grads[3][0] == 0, 'the constant moves no weight; noise is no gradient'


@pytest.mark.parametrize(
  'coeffs, clamp, documents',
  [
    pytest.param(SOFTMAX, 0.0, False, marks=pytest.mark.tier('default')),
    pytest.param(CUBIC, 0.0, True, marks=pytest.mark.tier('default')),
    (CUBIC, 0.7, True),
  ],
)
def test_value_and_gradients_are_the_definition(
  coeffs, clamp, documents, tiles
):
  check(arrays(), coeffs, visible(documents=documents), clamp=clamp)


def test_the_reference_is_the_definition():
  rows = visible(documents=True)
  check(arrays(), CUBIC, rows, clamp=0.7, implementation='reference')


@pytest.mark.tier('default')
@pytest.mark.parametrize('group, t, h', [(1, 17, 9), (3, 33, 72), (16, 9, 4)])
def test_odd_shapes(group, t, h):
  check(arrays(group, t, h=h), CUBIC, visible(t))


@pytest.mark.tier('default')
def test_bidirectional(tiles):
  begin, end, counts = visible()
  check(arrays(), CUBIC, (begin, np.full_like(end, T), counts), causal=False)


@pytest.mark.tier('default')
def test_ties_go_to_the_first_keys(tiles):
  """Small whole numbers, whose scores are exact and often equal."""
  q, k, v = arrays(h=16)
  q, k = (jnp.round(x) for x in (q, k))
  check((q, k, v), CUBIC, visible())
  # All scores equal: the output is the mean of the first `count` values.
  begin, end, counts = visible()
  out = run(0 * q, k, v, SOFTMAX, begin, end, counts)
  for b, t in ((0, 30), (1, 39), (0, 8)):
    want = np.asarray(v)[b, : counts[b, t]].mean(0).repeat(2, 0)
    np.testing.assert_allclose(out[b, t], want, 1e-5)


@pytest.mark.tier('default')
def test_a_query_that_keeps_nothing_gives_zero(tiles):
  begin, end, counts = visible()
  out = run(*arrays(), CUBIC, begin, end, counts)
  assert (np.asarray(out[:, 7]) == 0).all()
  empty = run(*arrays(), CUBIC, end, end, counts)
  assert (np.asarray(empty) == 0).all()


@pytest.mark.tier('default')
def test_raw_scores_choose_whatever_the_polynomial_makes_of_them():
  """An even polynomial turns the order round; -s^2 must not choose."""
  q, k, v = arrays()
  begin, end, counts = visible()
  counts = np.minimum(counts, 3)
  check((q, k, v), (0, 0, 1, 0), (begin, end, counts))
  check((q, k, v), (0, 0, -1, 0), (begin, end, counts))


def test_masked_keys_weigh_nothing_under_clamp_and_even_powers():
  """-1e30 squared is the largest of all, and clamped it is merely small.

  So what lies behind `end` must not be seen through the polynomial: values
  there are large, and one weight that is not exactly 0 shows.
  """
  q, k, v = arrays()
  begin, end, counts = visible()
  end, counts = np.minimum(end, 20), np.minimum(counts, 20)
  late = (jnp.arange(T) >= 20)[None, :, None, None]
  poisoned = jnp.where(late, 1e4, v)
  for coeffs, clamp in (((0, 0, 1, 0), 0.0), (CUBIC, 0.5)):
    rows = begin, end, counts
    got = run(q, k, poisoned, coeffs, *rows, clamp=clamp)
    np.testing.assert_array_equal(got, run(q, k, v, coeffs, *rows, clamp=clamp))


def test_a_bound_on_the_counts_changes_nothing_but_the_search():
  q, k, v = arrays()
  begin, end, counts = visible()
  counts = np.minimum(counts, 4)
  want = run(q, k, v, CUBIC, begin, end, counts)
  got = run(q, k, v, CUBIC, begin, end, counts, max_count=4)
  np.testing.assert_array_equal(got, want)
  capped = run(q, k, v, CUBIC, begin, end, counts + 9, max_count=4)
  sure = np.minimum(counts + 9, np.minimum(end - begin, 4))
  np.testing.assert_array_equal(capped, run(q, k, v, CUBIC, begin, end, sure))


@pytest.mark.tier('default')
@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_low_precision(dtype):
  q, k, v = (x.astype(dtype) for x in arrays())
  rows = visible()
  out = run(q, k, v, CUBIC, *rows)
  assert out.dtype == jnp.dtype(dtype)
  want, _ = oracle(q, k, v, CUBIC, *rows, np.zeros(out.shape))
  oracles.check_close(out, want, dtype)
  grad = jax.grad(lambda q: run(q, k, v, CUBIC, *rows).sum().astype(float))(q)
  assert grad.dtype == jnp.dtype(dtype) and np.isfinite(grad).all()


def test_nothing_quadratic_is_kept_for_the_backward_pass():
  """Residuals of T tokens: arrays of T, none with an axis of T beside it."""
  t = 512
  q, k, v = arrays(1, t)
  rows = visible(t)
  _, pull = jax.vjp(lambda *a: run(*a, CUBIC, *rows), q, k, v)
  shapes = [x.shape for x in jax.tree.leaves(pull)]
  assert all(np.prod(s) <= B * t * 2 * HV for s in shapes), shapes


def test_what_does_not_fit_is_refused():
  q, k, v = arrays()
  begin, end, counts = visible()
  with pytest.raises(ValueError, match='causal=True is for queries'):
    run(q[:, :3], k, v, CUBIC, begin[:, :3], end[:, :3], counts[:, :3])
  with pytest.raises(ValueError, match='clamp=-1.0'):
    run(q, k, v, CUBIC, begin, end, counts, clamp=-1.0)
  with pytest.raises(ConfigError, match="unknown implementation 'cudnn'"):
    run(q, k, v, CUBIC, begin, end, counts, implementation='cudnn')
