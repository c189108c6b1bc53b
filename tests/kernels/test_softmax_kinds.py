"""The approximate softmaxes against their definitions, in NumPy float64."""

import functools
import itertools
import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from psa_jax.kernels import arguments as arguments_lib
from psa_jax.kernels import platform, softmax
from psa_jax.kernels.block_sparse import (
  block_sparse_attention,
  pallas_tpu_backward,
  pallas_tpu_walk,
)
from tests import oracles
from tests.kernels.test_block_sparse import CASES, make_case

KINDS = ('polynomial', 'sas')
CUBIC = (0.1, 0.8, 0.15, 0.02)  # a0 to a3
CLAMP = 1.5
TABLE = [math.exp(-i) for i in range(7)]


def sas(x):
  """TurboAttention's table and cubic, entry by entry."""
  if x < -6:
    return 0.0
  i = math.floor(-x)
  t = -x - i
  return TABLE[i] * (-0.1025 * t**3 + 0.46247 * t**2 - 0.99205 * t + 0.99961)


def sas_slope(x):
  if x < -6:
    return 0.0
  i = math.floor(-x)
  t = -x - i
  return -TABLE[i] * (-0.3075 * t**2 + 0.92494 * t - 0.99205)


def cubic(s, coefficients=CUBIC):
  s = np.clip(s, -CLAMP, CLAMP)
  return sum(a * s**i for i, a in enumerate(coefficients))


def cubic_slope(s):
  inside = np.abs(s) <= CLAMP
  return inside * sum(i * a * s ** max(i - 1, 0) for i, a in enumerate(CUBIC))


def rows(q, k, mask):
  """(b, t, n, kv head, keys read, raw scores) of every query that reads."""
  for b, t, n in np.ndindex(q.shape[:3]):
    g = n // (q.shape[2] // k.shape[2])
    keys = np.flatnonzero(mask[b, g, t])
    if keys.size:
      yield b, t, n, g, keys, k[b, keys, g] @ q[b, t, n] * q.shape[-1] ** -0.5


def oracle(name, q, k, v, mask, d_out, d_lse):
  """Output, lse, and gradients; SAS holds its row maximum constant."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  out, lse = np.zeros(d_out.shape), np.full(d_lse.shape, -np.inf)
  dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
  d_cubic = np.zeros(4)
  for b, t, n, g, keys, raw in rows(q, k, mask):
    s = cubic(raw) if name == 'polynomial' else raw
    x = s - s.max()
    if name == 'sas':
      w, slope = np.vectorize(sas)(x), np.vectorize(sas_slope)(x)
    else:
      w = slope = np.exp(x)
    p, slope = w / w.sum(), slope / w.sum()
    out[b, t, n] = p @ v[b, keys, g]
    lse[b, t, n] = s.max() + np.log(w.sum())
    dp = v[b, keys, g] @ d_out[b, t, n]
    ds = slope * (dp - p @ dp + d_lse[b, t, n])
    if name == 'polynomial':
      clipped = np.clip(raw, -CLAMP, CLAMP)
      d_cubic += [(ds * clipped**i).sum() for i in range(4)]
      ds = ds * cubic_slope(raw)
    ds = ds * q.shape[-1] ** -0.5
    dq[b, t, n] += ds @ k[b, keys, g]
    dk[b, keys, g] += ds[:, None] * q[b, t, n]
    dv[b, keys, g] += p[:, None] * d_out[b, t, n]
  return out, lse, (dq, dk, dv), d_cubic


def arguments(name):
  """Keywords of the call; coefficients apart, which have a gradient."""
  if name == 'polynomial':
    return {'softmax': softmax.Kind(name, CLAMP)}, jnp.asarray(CUBIC)
  return {'softmax': name}, None


def _pairs():
  """Every case with one kind and implementation, one case with all four.

  The others are of the tier `all`: with the exact softmax every case runs in
  both implementations.
  """
  for i, case in enumerate(CASES):
    for j, pair in enumerate(itertools.product(KINDS, ('xla', 'reference'))):
      often = case == 'odd lengths' or j == i % 4
      tier = pytest.mark.tier('default' if often else 'all')
      quick = case == 'odd lengths' and pair[1] == 'xla'
      yield pytest.param(case, *pair, marks=() if quick else tier)


@pytest.mark.parametrize(('case', 'name', 'implementation'), list(_pairs()))
def test_value_and_gradients(case, name, implementation):
  check(case, name, implementation)


@pytest.mark.tier('default')
@pytest.mark.parametrize('name', KINDS)
@pytest.mark.parametrize(
  'case', ['odd lengths', 'wide values', 'prefill chunk', 'bidirectional']
)
def test_on_a_tpu(case, name):
  with platform.target('tpu', interpret=True):
    check(case, name, 'pallas_tpu')


@pytest.mark.tier('default')
@pytest.mark.parametrize('name', KINDS)
def test_on_a_tpu_in_many_chunks(name, monkeypatch):
  """The passes over a list are of several chunks, and pieces of rows."""
  monkeypatch.setattr(pallas_tpu_walk, 'CHUNK_KEYS', 128)
  monkeypatch.setattr(pallas_tpu_walk, 'PIECE_ROWS', 64)
  monkeypatch.setattr(pallas_tpu_backward, 'CHUNK_ROWS', 128)
  monkeypatch.setitem(
    CASES, 'many', (1, 200, 600, 8, 2, 16, 16, 32, 64, True, 400, True)
  )
  with platform.target('tpu', interpret=True):
    check('many', name, 'pallas_tpu')


@pytest.mark.tier('ci')
@pytest.mark.parametrize('name', KINDS)
def test_on_a_tpu_without_races(name):
  """Reads of memory that nothing wrote give NaN here."""
  simulator = pltpu.InterpretParams(detect_races=True)
  with platform.target('tpu', interpret=simulator):
    check('narrow values', name, 'pallas_tpu')
  assert not interpret_pallas_call.races.races_found


@pytest.mark.tier('default')
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('name', KINDS)
def test_lowers_for_tpu(name, dtype):
  shapes = (1, 4096, 8, 64), (1, 4096, 2, 64), (1, 4096, 2, 64)
  args = [jax.ShapeDtypeStruct(x, dtype) for x in shapes]
  lists = (1, 2, 32, 8), (1, 2, 32)
  args += [jax.ShapeDtypeStruct(x, jnp.int32) for x in lists]
  keywords, coefficients = arguments(name)

  def loss(q, k, v, coefficients, ids, counts):
    out, lse = block_sparse_attention(
      q, k, v, ids, counts, block_q=128, block_k=64, coefficients=coefficients,
      **keywords,
    )  # fmt: skip
    return out.astype(jnp.float32).sum() + lse.sum()

  args.insert(3, coefficients)
  which = (0, 1, 2) if coefficients is None else (0, 1, 2, 3)
  with platform.target('tpu', kind='v5e'):
    step = jax.jit(jax.grad(loss, which)).trace(*args)
    lowered = step.lower(lowering_platforms=('tpu',))
  assert lowered.as_text().count('tpu_custom_call') == 3


def test_a_gpu_kernel_refuses_it_by_name():
  args, call, _, _ = make_case('plain')
  call = functools.partial(call, implementation='pallas_gpu', softmax='sas')
  with platform.target('gpu', kind='NVIDIA H100', capability=90):
    with pytest.raises(ValueError, match='exact, not sas'):
      call(*args)


def check(case, name, implementation):
  """Value, log-sum-exp and all gradients against the oracle."""
  args, call, mask, d_out = make_case(case)
  # Scores on both sides of the clamp and of SAS's cut-off.
  args = (6 * args[0], *args[1:])
  keywords, coefficients = arguments(name)
  call = functools.partial(call, implementation=implementation, **keywords)
  d_lse = np.random.default_rng(1).normal(size=d_out.shape[:-1])

  def loss(q, k, v, coefficients):
    out, lse = call(q, k, v, coefficients=coefficients)
    some = jnp.isfinite(lse)
    of_lse = jnp.where(some, jnp.where(some, lse, 0) * d_lse, 0).sum()
    return (out * d_out).sum() + of_lse, (out, lse)

  which = (0, 1, 2) if coefficients is None else (0, 1, 2, 3)
  step = jax.jit(jax.grad(loss, which, has_aux=True))
  (*grads,), (out, lse) = step(*args, coefficients)
  read = oracles_read(args, mask)
  want, want_lse, want_grads, d_cubic = oracle(
    name, *args, mask, d_out, np.where(read, d_lse, 0)
  )
  oracles.check_close(out, want, what='out')
  np.testing.assert_array_equal(np.isfinite(lse), read)
  oracles.check_close(np.asarray(lse)[read], want_lse[read], what='lse')
  for got, grad, what in zip(grads[:3], want_grads, 'qkv', strict=True):
    oracles.check_close(got, grad, gradient=True, what=f'd{what}')
  if coefficients is not None:
    # That of a0 is 0 but for the log-sum-exp's.
    oracles.check_close(grads[3], d_cubic, gradient=True, what='coefficients')


def oracles_read(args, mask):
  """[B, T, N] bool: which queries read anything."""
  group = args[0].shape[2] // args[1].shape[2]
  return np.repeat(mask.any(-1), group, 1).transpose(0, 2, 1)


@pytest.mark.tier('default')
@hypothesis.given(
  x=st.lists(st.floats(-40, 0, width=32), min_size=1, max_size=20)
)
def test_sas_is_its_table_and_cubic(x):
  got = softmax.sas(jnp.asarray(x, jnp.float32))
  want = np.vectorize(sas)(np.asarray(x, np.float32).astype(np.float64))
  np.testing.assert_allclose(got, want, rtol=2e-6, atol=1e-9)


def test_sas_is_within_its_published_error_down_to_the_cut_off():
  x = np.linspace(-6, 0, 60_001)
  error = np.abs(
    np.asarray(softmax.sas(jnp.asarray(x, jnp.float32))) - np.exp(x)
  )
  assert 3.8e-4 < error.max() < 4e-4
  # Relative to e^x the error is largest at the end of every unit.
  assert (error / np.exp(x)).max() < 1.1e-3
  # A score that rounding puts above the maximum is one at the maximum.
  assert softmax.sas(jnp.float32(1e-6)) == softmax.sas(jnp.float32(0))
  below = softmax.sas(jnp.asarray([-6.0, -6.0001, -7.0, -1e30, -np.inf]))
  assert below[0] > 0.002 and not below[1:].any()


def test_sas_drops_more_the_longer_the_row():
  """The warning of the specification: 12 % at 8k for sigma 2."""
  rng, dropped = np.random.default_rng(0), []
  for length in (256, 8192):
    s = 2 * rng.normal(size=(16, length))
    x = s - s.max(1, keepdims=True)
    dropped.append(((x < -6) * np.exp(x)).sum(1) / np.exp(x).sum(1))
  assert dropped[0].mean() < 0.05 < 0.1 < dropped[1].mean() < 0.15


def test_the_derivative_of_sas_leaves_out_little():
  """Against differences of the function itself, maximum and all."""
  rng, h = np.random.default_rng(3), 1e-6
  for _ in range(20):
    s, v = 2 * rng.normal(size=50), rng.normal(size=50)

    def out(s, v=v):
      w = np.vectorize(sas)(s - s.max())
      return w @ v / w.sum()

    x = s - s.max()
    near = np.abs(x - np.round(x)) < 1e-5  # a jump lies within h
    w, slope = np.vectorize(sas)(x), np.vectorize(sas_slope)(x)
    grad = slope / w.sum() * (v - out(s))
    basis = np.eye(50)
    whole = [(out(s + h * e) - out(s - h * e)) / (2 * h) for e in basis]
    other = ~near & (x < 0)
    np.testing.assert_allclose(grad[other], np.asarray(whole)[other], atol=1e-6)
    # The largest score carries the sum of all slopes, which nearly cancels.
    top = np.argmax(s)
    assert abs(grad[top] - whole[top]) < 0.02 * np.abs(v).max()


def test_a_plain_polynomial_is_the_exact_softmax():
  args, call, mask, _ = make_case('plain')
  kind = softmax.Kind('polynomial', clamp=1e4)
  out, lse = call(*args, softmax=kind, coefficients=jnp.asarray([0, 1.0, 0, 0]))
  want, want_lse = call(*args)
  np.testing.assert_allclose(out, want, atol=1e-6)
  np.testing.assert_array_equal(lse == -jnp.inf, want_lse == -jnp.inf)


def test_refusals_name_the_mend():
  args, call, _, _ = make_case('plain')
  with pytest.raises(ValueError, match=r"unknown softmax 'soft'; choose from"):
    call(*args, softmax='soft')
  with pytest.raises(ValueError, match='takes 4 coefficients'):
    call(*args, softmax='polynomial')
  with pytest.raises(ValueError, match='nothing else takes any'):
    call(*args, coefficients=jnp.ones(4))
  with pytest.raises(ValueError, match=r'coefficients \(3,\) must be \(4,\)'):
    arguments_lib.softmax_kind('polynomial', jnp.ones(3))
  with pytest.raises(ValueError, match='clamp=0.0 must be above 0'):
    softmax.Kind('polynomial', clamp=0.0)
