"""The GPU kernels of block-list attention on Hopper; what they refuse.

Nothing here runs on a GPU; `test_on_gpu.py` does. Lowering generates the
kernels' code for sm_90a; the simulator runs it with products of its own (see
`kernels/wgmma.py`). Blackwell is in `test_blackwell.py`.
"""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psa_jax.kernels import platform
from psa_jax.kernels.block_sparse import (
  block_sparse_attention,
  lists,
  pallas_gpu_backward,
)
from tests import oracles
from tests.kernels import gpu_simulator, test_block_sparse

# B, T, S, N, K, H, Hv, block_q, block_k, segments, q_offset, causal
CASES = {
  # Two computing warpgroups; padded rows, S and widths; half a piece of keys.
  'ragged': (1, 40, 50, 2, 1, 24, 16, 40, 32, True, 10, True),
  # More rows that read a block than there are buffers, in two key parts.
  'many readers': (1, 96, 96, 3, 1, 16, 32, 96, 96, False, 0, True),
  # Read and written where they are, in several copies.
  'whole tiles': (1, 96, 96, 2, 1, 16, 16, 32, 32, False, 0, True),
  'two heads': (1, 16, 32, 2, 2, 16, 16, 16, 32, False, 16, True),
  # Longer lists than there are buffers, and an empty one.
  'long lists': (1, 16, 80, 2, 2, 16, 16, 16, 16, False, 64, True),
  'realistic': (2, 512, 512, 8, 2, 128, 128, 128, 64, True, 0, True),
  'wide blocks': (1, 256, 256, 4, 2, 128, 64, 64, 128, False, 0, False),
}


@pytest.fixture(autouse=True)
def _more_cases(monkeypatch):
  for name, shape in CASES.items():
    monkeypatch.setitem(test_block_sparse.CASES, name, shape)


def make_case(name, seed=0, dtype=jnp.bfloat16):
  """As there, on the GPU kernels."""
  args, call, mask, d_out = test_block_sparse.make_case(name, seed, dtype)
  return args, functools.partial(call, implementation='pallas_gpu'), mask, d_out


def gradients(call, d_out, d_lse=0.0):
  """A function of q, k, v: gradients, output and log-sum-exp."""

  def loss(*args):
    out, lse = call(*args)
    some = jnp.isfinite(lse)
    lse_part = jnp.where(some, jnp.where(some, lse, 0) * d_lse, 0).sum()
    return (out.astype(jnp.float32) * d_out).sum() + lse_part, (out, lse)

  return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))


@pytest.mark.tier('default')
@pytest.mark.parametrize(
  'name', ['realistic', 'wide blocks', 'H = 72', 'narrow values']
)
def test_lowers_for_hopper(name):
  args, call, _, d_out = make_case(name)
  lowered = gpu_simulator.lower(
    gpu_simulator.H100, gradients(call, d_out), *args
  )
  text = lowered.as_text()
  for kernel in ('forward', 'query_gradient', 'key_gradients'):
    assert f'block_sparse_{kernel}' in text


@pytest.mark.tier('default')
def test_lowers_with_a_window():
  args, call, _, d_out = make_case('realistic', dtype=jnp.float16)
  call = functools.partial(call, window=100)
  lowered = gpu_simulator.lower(
    gpu_simulator.H100, gradients(call, d_out), *args
  )
  assert 'block_sparse_key_gradients' in lowered.as_text()


def check(got, args, mask, d_out, d_lse, dtype='bfloat16'):
  grads, (out, lse) = got
  want, want_lse = oracles.attention(*args, mask)
  some = np.isfinite(want_lse)
  assert some.any()
  oracles.check_close(out.astype(jnp.float32), want, dtype, what='out')
  assert (np.asarray(lse)[~some] == -np.inf).all()
  assert (np.asarray(out, np.float32)[~some] == 0).all()
  oracles.check_close(np.asarray(lse)[some], want_lse[some], dtype, what='lse')
  want = oracles.attention_grads(*args, mask, d_out, np.where(some, d_lse, 0))
  for grad, wanted, x, what in zip(grads, want, args, 'qkv', strict=True):
    assert grad.dtype == x.dtype
    grad = grad.astype(jnp.float32)
    oracles.check_close(grad, wanted, dtype, gradient=True, what=f'd{what}')


@pytest.mark.tier('ci')
@pytest.mark.parametrize(
  'name, seed, window',
  [
    ('ragged', 3, None),
    ('many readers', 0, 50),
    ('two heads', 0, None),
  ],
)
def test_value_and_gradients_simulated(name, seed, window):
  args, call, mask, d_out = make_case(name, seed)
  if window is not None:
    call = functools.partial(call, window=window)
    t = np.arange(mask.shape[2])[:, None] + call.keywords['q_offset']
    mask &= np.arange(mask.shape[3])[None] > t - window
  d_lse = np.random.default_rng(1).normal(size=d_out.shape[:-1])
  with gpu_simulator.simulated(gpu_simulator.H100):
    got = gradients(call, d_out, d_lse)(*args)
    jax.block_until_ready(got)
  check(got, args, mask, d_out, d_lse)


@pytest.mark.tier('ci')
def test_blocks_with_many_readers_are_dealt_out_simulated(monkeypatch):
  monkeypatch.setattr(pallas_gpu_backward, 'FEWEST_READERS', 2)
  args, call, mask, d_out = make_case('whole tiles', 10)
  ids, counts = (call.keywords[f'block_{x}'] for x in ('ids', 'counts'))
  readers = lists.transpose(ids, counts, 3)
  assert (jnp.diff(readers.offsets) > 2).any()  # of three tiles
  with gpu_simulator.simulated(gpu_simulator.H100):
    got = gradients(call, d_out)(*args)
    jax.block_until_ready(got)
  check(got, args, mask, d_out, 0.0)


@pytest.mark.tier('ci')
def test_long_and_empty_lists_simulated():
  args, call, mask, _ = make_case('long lists', 8)
  assert sorted(call.keywords['block_counts'].reshape(-1)) == [0, 5]
  with gpu_simulator.simulated(gpu_simulator.H100):
    out, lse = jax.jit(call)(*args)
  want, want_lse = oracles.attention(*args, mask)
  oracles.check_close(out.astype(jnp.float32), want, 'bfloat16')
  np.testing.assert_array_equal(np.isfinite(lse), np.isfinite(want_lse))


@pytest.mark.parametrize(
  'target, change, reason',
  [
    (('cpu', '', 0), {}, 'written for NVIDIA GPUs and this is cpu'),
    (('gpu', 'NVIDIA A100', 80), {}, 'NVIDIA A100 has compute capability 8.0'),
    (('gpu', 'NVIDIA RTX', 120), {}, 'NVIDIA RTX has compute capability 12.0'),
    (('gpu', 'B200', 100), dict(dtype=jnp.float32), 'float32 would be rounded'),
    (('gpu', 'H100', 90), dict(dtype=jnp.float32), 'float32 would be rounded'),
    (('gpu', 'H100', 90), dict(block_k=24), 'block_k=24 is not a multiple'),
    (('gpu', 'H100', 90), dict(block_k=256), 'block_k=256 is not a multiple'),
    (('gpu', 'H100', 90), dict(H=160), 'heads of width 160'),
  ],
)
def test_refusals_name_the_reason(target, change, reason):
  dtype = change.pop('dtype', jnp.bfloat16)
  H, block_k = change.get('H', 64), change.get('block_k', 64)
  x = jnp.zeros((1, 64, 1, H), dtype)
  ids = jnp.zeros((1, 1, 1, 1), jnp.int32)
  platform_name, kind, capability = target
  with platform.target(platform_name, kind=kind, capability=capability):
    with pytest.raises(ValueError, match=reason):
      block_sparse_attention(
        x,
        x,
        x,
        ids,
        ids[..., 0],
        block_q=64,
        block_k=block_k,
        implementation='pallas_gpu',
      )


@pytest.mark.tier('default')
def test_auto_takes_it_on_hopper_and_says_why_not_before(caplog):
  args, call, mask, _ = test_block_sparse.make_case('plain')
  half = [x.astype(jnp.bfloat16) for x in args]
  call = functools.partial(call, block_k=64, block_q=64)
  lists = dict(
    block_ids=jnp.zeros((2, 1, 1, 1), jnp.int32),
    block_counts=jnp.ones((2, 1, 1), jnp.int32),
  )
  call = functools.partial(call, **lists)
  text = gpu_simulator.lower(gpu_simulator.H100, call, *half).as_text()
  assert 'block_sparse_forward' in text
  monkey = pytest.MonkeyPatch()
  monkey.setattr(platform, '_SAID', set())
  with platform.target('gpu', kind='NVIDIA A100', capability=80):
    with caplog.at_level(logging.WARNING, 'psa_jax'):
      got = call(*half)
      call(*half)
  monkey.undo()
  lines = [x.message for x in caplog.records if 'pallas_gpu' in x.message]
  assert len(lines) == 1 and 'passed over for xla' in lines[0], lines
  for a, b in zip(got, call(*half, implementation='xla'), strict=True):
    np.testing.assert_array_equal(a, b)
