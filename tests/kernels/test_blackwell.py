"""The GPU kernels on Blackwell: lowered and simulated, not run on a GPU.

Lowering generates the kernels' code for sm_100a, and so checks shapes, layouts
and how much memory there is; `tensor_memory.py` says what the simulator checks.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psa_jax.kernels import nvidia, platform
from tests import oracles
from tests.kernels import gpu_simulator, test_block_sparse
from tests.kernels import test_block_sparse_gpu as on_hopper
from tests.kernels import test_decode_gpu as decode_on_hopper
from tests.kernels.gpu_simulator import B200

# B, T, S, N, K, H, Hv, block_q, block_k, segments, q_offset, causal
CASES = on_hopper.CASES | {
  # 128 rows a warpgroup; blocks that are no multiple of 32.
  'wide tile': (1, 48, 48, 3, 1, 16, 24, 48, 16, True, 0, True),
  # Two computing warpgroups; more readers than buffers; a last part of rows.
  'large tile': (1, 48, 64, 3, 1, 24, 16, 48, 32, False, 16, True),
  'large blocks': (1, 512, 512, 8, 2, 128, 128, 128, 128, True, 0, True),
  'half blocks': (1, 480, 480, 4, 2, 128, 64, 128, 80, False, 0, True),
}


@pytest.fixture(autouse=True)
def _more_cases(monkeypatch):
  for name, shape in CASES.items():
    monkeypatch.setitem(test_block_sparse.CASES, name, shape)


@pytest.mark.tier('default')
@pytest.mark.parametrize(
  'name, window',
  [
    ('realistic', 100),
    ('wide blocks', None),
    ('large blocks', 100),
    ('half blocks', None),
    ('H = 72', None),
    ('narrow values', None),
  ],
)
def test_lowers(name, window):
  args, call, _, d_out = on_hopper.make_case(name)
  call = functools.partial(call, window=window)
  gradients = on_hopper.gradients(call, d_out)
  text = gpu_simulator.lower(B200, gradients, *args).as_text()
  for kernel in ('forward', 'query_gradient', 'key_gradients'):
    assert f'block_sparse_{kernel}' in text


@pytest.mark.tier('default')
@pytest.mark.parametrize('block_k, T, H', [(64, 1, 128), (16, 3, 128)])
def test_decoding_lowers(block_k, T, H):
  args, call, _ = decode_on_hopper.make_case(
    [700, 9], T, 1000, 16, 4, H, 64, block_k
  )
  text = gpu_simulator.lower(B200, call, *args).as_text()
  assert 'block_sparse_forward' in text


@pytest.mark.tier('ci')
@pytest.mark.parametrize(
  'name, seed, window', [('wide tile', 0, 20), ('two heads', 0, None)]
)
def test_value_and_gradients_simulated(name, seed, window):
  args, call, mask, d_out = on_hopper.make_case(name, seed)
  if window is not None:
    call = functools.partial(call, window=window)
    t = np.arange(mask.shape[2])[:, None] + call.keywords['q_offset']
    mask &= np.arange(mask.shape[3])[None] > t - window
  d_lse = np.random.default_rng(1).normal(size=d_out.shape[:-1])
  with gpu_simulator.simulated(B200):
    got = on_hopper.gradients(call, d_out, d_lse)(*args)
    jax.block_until_ready(got)
  on_hopper.check(got, args, mask, d_out, d_lse)


@pytest.mark.tier('ci')
@pytest.mark.parametrize('name, seed', [('long lists', 8), ('large tile', 0)])
def test_value_simulated(name, seed):
  args, call, mask, _ = on_hopper.make_case(name, seed)
  with gpu_simulator.simulated(B200):
    out, lse = jax.jit(call)(*args)
  want, want_lse = oracles.attention(*args, mask)
  oracles.check_close(out.astype(jnp.float32), want, 'bfloat16')
  np.testing.assert_array_equal(np.isfinite(lse), np.isfinite(want_lse))


@pytest.mark.tier('ci')
@pytest.mark.parametrize(
  'shape, window, starts',
  [
    # 64 and 128 rows.
    (([61, 0], 3, 64, 2, 1, 32, 32, 32), None, [7, 0]),
    (([61], 1, 61, 6, 2, 16, 24, 16), 20, None),
  ],
)
def test_decoding_simulated(shape, window, starts, monkeypatch):
  monkeypatch.setattr(nvidia, 'BLOCKS', 4)
  args, call, mask = decode_on_hopper.make_case(*shape, window, starts)
  with gpu_simulator.simulated(B200):
    out, lse = jax.jit(call)(*args)
  want, want_lse = oracles.attention(*args, mask)
  read = np.isfinite(want_lse)
  assert read.any()
  oracles.check_close(out.astype(jnp.float32), want, 'bfloat16')
  assert (np.asarray(lse)[~read] == -np.inf).all()
  oracles.check_close(np.asarray(lse)[read], want_lse[read], 'bfloat16')


@pytest.mark.tier('default')
def test_auto_takes_them():
  args, call, _, _ = on_hopper.make_case('two heads')
  call = functools.partial(call, implementation='auto')
  text = gpu_simulator.lower(B200, call, *args).as_text()
  assert 'block_sparse_forward' in text


@pytest.mark.parametrize(
  'rows, block_k, width, want',
  [
    (64, 64, 128, (64, 1)),
    (64, 16, 128, (128, 1)),  # half a block of 16 is too narrow
    (64, 64, 48, (128, 1)),
    (65, 64, 128, (128, 1)),
    (512, 64, 128, (128, 2)),
    (512, 128, 128, (128, 1)),
  ],
)
def test_rows_of_a_product(rows, block_k, width, want):
  q = jnp.zeros((1, width))
  with platform.target('gpu', **B200):
    cores = nvidia.Cores.for_queries(rows, block_k, q, q)
  assert (cores.rows, cores.computing) == want
  assert cores.padded(rows) % (want[0] * want[1]) == 0
