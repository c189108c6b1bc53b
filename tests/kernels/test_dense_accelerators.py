"""Dense attention by what JAX ships for accelerators, with none at hand.

Splash attention runs in Pallas' interpreter against the float64 definition.
cuDNN has none: a stand-in with cuDNN's gaps takes its place for what is added
here, and the real call is lowered for CUDA. That either compiles for a real
machine is checked by experiments/aot.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as fused

from psa_jax.kernels import platform
from psa_jax.kernels.dense import cudnn, dense_attention, pallas_tpu, reference
from tests import oracles

pytestmark = pytest.mark.tier('default')

# name: B, T, S, N, K, H, Hv, segments, q_offset, causal
CASES = {
  'odd lengths': (1, 300, 300, 4, 2, 16, 24, False, 0, True),
  'documents': (2, 77, 77, 3, 1, 24, 16, True, 0, True),
  'prefill chunk': (1, 130, 290, 2, 1, 16, 16, True, 130, True),
  'odd chunk': (1, 24, 61, 2, 2, 16, 16, False, 37, True),
  'bidirectional': (1, 30, 300, 2, 1, 72, 16, False, 0, False),
  'past the keys': (1, 140, 30, 2, 1, 16, 16, False, 8, True),
}
TPU = platform.Target('tpu', 'v5e')
HOPPER = platform.Target('gpu', 'H100', 90)


def normal(rng, *shape, dtype=jnp.float32):
  return jnp.asarray(rng.normal(size=shape), dtype)


def shapes(T=256, N=4, K=2, H=64, Hv=None, dtype='bfloat16', S=None):
  """Abstract q, k, v."""
  S, Hv = S or T, Hv or H
  make = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.dtype(dtype))
  return make((1, T, N, H)), make((1, S, K, H)), make((1, S, K, Hv))


def with_gradients(call, d_out, d_lse):
  """(q, k, v) -> gradients, (out, lse)."""

  def loss(*args):
    out, lse = call(*args)
    total = (out.astype(jnp.float32) * d_out).sum() + (lse * d_lse).sum()
    return total, (out, lse)

  return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))


def check(call, arrays, mask, d_out, d_lse, dtype='float32'):
  """Value and gradients of `call` against the oracle."""
  grads, (out, lse) = with_gradients(call, d_out, d_lse)(*arrays)
  want, want_lse = oracles.attention(*arrays, mask)
  oracles.check_close(out, want, dtype, what='out')
  oracles.check_close(lse, want_lse, dtype, what='lse')
  want = oracles.attention_grads(*arrays, mask, d_out, d_lse)
  for got, grad, what in zip(grads, want, 'qkv', strict=True):
    oracles.check_close(got, grad, dtype, gradient=True, what=f'd{what}')


@pytest.fixture
def small_tiles(monkeypatch):
  """So that full, partial and empty tiles all occur."""
  monkeypatch.setattr(pallas_tpu, 'BLOCK', 128)
  monkeypatch.setattr(pallas_tpu, 'BLOCK_WIDE', 128)


@pytest.mark.parametrize('name', list(CASES))
def test_splash_value_and_gradients(name, small_tiles):
  B, T, S, N, K, H, Hv, cut, offset, causal = CASES[name]
  rng = np.random.default_rng(0)
  arrays = (
    normal(rng, B, T, N, H),
    normal(rng, B, S, K, H),
    normal(rng, B, S, K, Hv),
  )
  segments, pair = {}, None
  if cut:
    seg = np.sort(rng.integers(0, 3, size=(B, max(S, offset + T))), 1)
    pair = seg[:, offset : offset + T], seg[:, :S]
    segments = dict(
      q_segment_ids=jnp.asarray(pair[0]), kv_segment_ids=jnp.asarray(pair[1])
    )
  mask = np.ones((B, K, T, S), bool)
  if causal:
    mask = oracles.causal_mask(B, K, T, S, pair, offset)
  call = functools.partial(
    dense_attention, causal=causal, q_offset=offset, **segments
  )
  with platform.target('tpu', kind='v5e', interpret=True):
    d_out, d_lse = normal(rng, B, T, N, Hv), normal(rng, B, T, N)
    check(call, arrays, mask, d_out, d_lse)


def test_splash_in_bfloat16(small_tiles):
  rng = np.random.default_rng(0)
  arrays = [normal(rng, 1, 200, n, 32, dtype=jnp.bfloat16) for n in (2, 1, 1)]
  mask = oracles.causal_mask(1, 1, 200, 200)
  with platform.target('tpu', interpret=True):
    check(
      dense_attention,
      arrays,
      mask,
      normal(rng, 1, 200, 2, 32),
      normal(rng, 1, 200, 2),
      'bfloat16',
    )


def test_splash_query_that_sees_nothing_gives_zero():
  rng = np.random.default_rng(0)
  arrays = [normal(rng, 1, 8, 1, 16) for _ in range(3)]
  ids = jnp.arange(8)[None]
  call = functools.partial(
    dense_attention,
    q_segment_ids=ids,
    kv_segment_ids=jnp.where(ids < 4, ids, ids + 100),
  )
  ones = jnp.ones((1, 8, 1, 16)), jnp.zeros((1, 8, 1))
  with platform.target('tpu', interpret=True):
    grads, (out, lse) = with_gradients(call, *ones)(*arrays)
  assert (out[:, 4:] == 0).all() and (lse[:, 4:] == -jnp.inf).all()
  assert (out[:, :4] == arrays[2][:, :4]).all()
  assert all((grad[:, 4:] == 0).all() for grad in grads)


@pytest.mark.parametrize(
  'T, S, offset', [(512, 512, 0), (256, 512, 256), (256, 768, 130)]
)
def test_tiles_of_the_small_mask_are_those_of_the_whole(T, S, offset):
  q = jax.ShapeDtypeStruct((1, 4, T, 64), jnp.bfloat16)
  k = jax.ShapeDtypeStruct((1, 2, S, 64), jnp.bfloat16)

  def kernel(shrink):
    spec = cudnn_spec(q_offset=offset)
    static = pallas_tpu.Static(spec, T, S, 128, 256, False)
    with pytest.MonkeyPatch.context() as patch:
      if not shrink:
        patch.setattr(pallas_tpu, '_shrink', lambda *_: 1)
      return pallas_tpu._kernel(static, q, k)

  assert pallas_tpu._shrink(128, 256, offset) > 1 or offset == 130
  small, whole = kernel(True), kernel(False)
  for name in ('fwd_mask_info', 'dq_mask_info', 'dkv_mask_info'):
    pairs = zip(getattr(small, name), getattr(whole, name), strict=True)
    for got, want in pairs:
      np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize('dtype, H', [('bfloat16', 128), ('float32', 72)])
@pytest.mark.parametrize('cut', [False, True])
def test_splash_lowers_for_tpu(dtype, H, cut):
  q, k, v = shapes(T=300, H=H, dtype=dtype)
  ids = jnp.zeros((1, 300), int) if cut else None
  call = functools.partial(
    dense_attention, q_segment_ids=ids, kv_segment_ids=ids
  )
  ones = jnp.ones((1, 300, 4, H)), jnp.ones((1, 300, 4))
  with platform.target('tpu', kind='v5e'):
    traced = with_gradients(call, *ones).trace(q, k, v)
  text = traced.lower(lowering_platforms=('tpu',)).as_text()
  assert text.count('@tpu_custom_call') == 3


def test_auto_takes_splash_on_tpu_and_xla_where_it_is_refused():
  with platform.target('tpu', kind='v5e'):
    yes = jax.jit(dense_attention).trace(*shapes())
    no = jax.jit(dense_attention).trace(*shapes(dtype='float16'))
  assert 'pallas_call' in str(yes.jaxpr)
  assert 'pallas_call' not in str(no.jaxpr)


@pytest.mark.parametrize(
  'where, dtype, said',
  [
    (TPU._replace(platform='cpu'), 'bfloat16', 'needs a TPU'),
    (TPU._replace(kind='TPU v3'), 'bfloat16', 'v4 or newer'),
    (TPU, 'float16', "not ['float16']"),
    (TPU, 'bfloat16', None),
  ],
)
def test_splash_says_why_not(where, dtype, said):
  got = pallas_tpu.refusal(where, *shapes(dtype=dtype), None, spec=None)
  assert got is None if said is None else said in got


def cudnn_spec(**changes):
  from psa_jax.kernels.dense import api

  settings = dict(causal=True, q_offset=0, scale=0.125)
  return api.Spec(**settings | changes)


@pytest.mark.parametrize(
  'where, arguments, spec, said',
  [
    (TPU, {}, {}, 'NVIDIA'),
    (HOPPER._replace(capability=70), {}, {}, 'Ampere'),
    (HOPPER._replace(interpret=True), {}, {}, 'simulator'),
    (HOPPER, {'dtype': 'float32'}, {}, "not ['float32']"),
    (HOPPER, {'H': 60}, {}, 'not 60 and 60'),
    (HOPPER, {'Hv': 32}, {}, 'not 64 and 32'),
    (HOPPER._replace(capability=80), {'H': 256}, {}, 'up to 128'),
    (HOPPER, {}, {'q_offset': 3}, 'q_offset'),
    (HOPPER, {'H': 256}, {}, None),
  ],
)
def test_cudnn_says_why_not(where, arguments, spec, said, monkeypatch):
  monkeypatch.setattr(fused, 'check_cudnn_version', lambda: 91000)
  args = *shapes(**arguments), None
  got = cudnn.refusal(where, *args, spec=cudnn_spec(**spec))
  assert got is None if said is None else said in got


def test_cudnn_is_refused_with_segments_and_where_it_is_not_installed(
  monkeypatch,
):
  def missing():
    raise RuntimeError('cuDNN is not detected.')

  monkeypatch.setattr(fused, 'check_cudnn_version', missing)
  args = shapes()
  got = cudnn.refusal(HOPPER, *args, (0, 0), spec=cudnn_spec())
  assert got and 'segment' in got
  got = cudnn.refusal(HOPPER, *args, None, spec=cudnn_spec())
  assert got and 'jax[cuda13]' in got


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_cudnn_lowers_for_cuda(dtype, monkeypatch):
  monkeypatch.setattr(fused, 'check_cudnn_version', lambda: 91000)
  call = functools.partial(dense_attention, implementation='cudnn')

  def calls(d_lse):
    run = with_gradients(call, jnp.ones((1, 256, 4, 64)), d_lse)
    with platform.target('gpu', kind='H100', capability=90):
      traced = run.trace(*shapes(dtype=dtype))
    text = traced.lower(lowering_platforms=('cuda',)).as_text()
    return text.count('__cudnn$fmhaSoftmax('), text.count(
      '__cudnn$fmhaSoftmaxBackward('
    )

  assert calls(jnp.ones((1, 256, 4))) == (2, 2)


def stand_in(q, k, v, *, scale, mask_type, return_residual):
  """Has no gradient of the log-sum-exp, as cuDNN."""
  assert return_residual
  spec = cudnn_spec(causal=mask_type == fused.MaskType.CAUSAL, scale=scale)
  out, lse = reference.dense_attention(q, k, v, None, spec=spec)
  return out, jax.lax.stop_gradient(jnp.moveaxis(lse, 1, 2))


@pytest.mark.parametrize('causal', [True, False])
def test_gradient_of_the_log_sum_exp_is_added_to_cudnn(causal, monkeypatch):
  monkeypatch.setattr(fused, 'dot_product_attention', stand_in)
  rng = np.random.default_rng(0)
  arrays = [normal(rng, 2, 9, n, 8) for n in (4, 2, 2)]
  mask = np.ones((2, 2, 9, 9), bool)
  if causal:
    mask = oracles.causal_mask(2, 2, 9, 9)
  spec = cudnn_spec(causal=causal, scale=8**-0.5)
  check(
    lambda *args: cudnn.dense_attention(*args, None, spec=spec),
    arrays,
    mask,
    normal(rng, 2, 9, 4, 8),
    normal(rng, 2, 9, 4),
  )
