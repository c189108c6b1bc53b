"""The kernels on a real NVIDIA GPU; skipped where there is none.

  JAX_PLATFORMS=cuda,cpu python -m pytest -n 8 tests/kernels/test_on_gpu.py

What the simulator leaves out is here: the layouts of registers, the products
themselves, and a thousand blocks of threads at a time. `make test` sets
JAX_PLATFORMS to cpu if nobody else did.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psa_jax.kernels import platform
from psa_jax.kernels.block_sparse import block_sparse_attention
from psa_jax.kernels.decode import decode_attention
from psa_jax.kernels.dense import dense_attention
from tests import oracles
from tests.kernels import (
  test_block_sparse,
  test_block_sparse_gpu,
  test_decode_gpu,
)

pytestmark = pytest.mark.skipif(
  jax.default_backend() != 'gpu', reason='there is no GPU'
)

PORTABLE = {
  name: shape
  for name, shape in test_block_sparse.CASES.items()
  if shape[8] % 16 == 0
}
CASES = {
  **PORTABLE,
  **test_block_sparse_gpu.CASES,
  # More lists than an H100 has multiprocessors; one and two of 64 rows.
  'many tiles': (2, 1024, 1024, 8, 4, 64, 64, 16, 64, False, 0, True),
  'tiles of 256': (1, 600, 600, 4, 4, 64, 64, 256, 64, True, 0, True),
  'tile of 16': (1, 250, 250, 2, 2, 128, 128, 16, 32, False, 0, True),
  'blocks of 128': (1, 512, 512, 2, 1, 128, 128, 64, 128, False, 0, True),
  'blocks of 48': (1, 300, 300, 2, 1, 48, 80, 64, 48, True, 0, True),
}


@pytest.fixture(autouse=True)
def _more_cases(monkeypatch):
  for name, shape in CASES.items():
    monkeypatch.setitem(test_block_sparse.CASES, name, shape)


def hopper_or_newer():
  if platform.current().capability not in (90, 100):
    pytest.skip('its kernels are for Hopper and Blackwell')


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
@pytest.mark.parametrize('window', [None, 50])
@pytest.mark.parametrize('name', list(CASES))
def test_value_and_gradients(name, window, dtype):
  hopper_or_newer()
  args, call, mask, d_out = test_block_sparse_gpu.make_case(
    name, 3, jnp.dtype(dtype)
  )
  if window is not None:
    if not call.keywords['causal']:
      pytest.skip('a window goes with causality')
    call = functools.partial(call, window=window)
    t = np.arange(mask.shape[2])[:, None] + call.keywords['q_offset']
    mask &= np.arange(mask.shape[3])[None] > t - window
  d_lse = np.random.default_rng(1).normal(size=d_out.shape[:-1])
  run = test_block_sparse_gpu.gradients(call, d_out, d_lse)
  got = jax.block_until_ready(run(*args))
  test_block_sparse_gpu.check(got, args, mask, d_out, d_lse, dtype)
  for x, again in zip(
    jax.tree.leaves(got), jax.tree.leaves(run(*args)), strict=True
  ):
    np.testing.assert_array_equal(np.asarray(x), np.asarray(again))


@pytest.mark.parametrize(
  'block_q, N, K, H', [(64, 16, 4, 128), (256, 2, 2, 64)]
)
def test_65536_tokens_against_xla(block_q, N, K, H):
  """Every element of the whole size, against f32 products of XLA."""
  hopper_or_newer()
  T, M, block_k = 65_536, 24, 64
  rng = np.random.default_rng(0)
  tiles = T // block_q
  last = (np.arange(tiles) + 1) * (block_q // block_k) - 1
  near = np.maximum(last[:, None] - np.arange(M // 2), 0)
  far = rng.random((K, tiles, M - M // 2)) * np.maximum(last - M, 1)[:, None]
  ids = np.concatenate([np.broadcast_to(near, (K, *near.shape)), far], -1)
  ids = np.sort(ids.astype(np.int32), -1)[..., ::-1]
  # A list names a block once: what repeats goes behind the count.
  first = np.concatenate(
    [np.ones_like(ids[..., :1], bool), ids[..., 1:] != ids[..., :-1]], -1
  )
  ids = np.take_along_axis(ids, np.argsort(~first, -1, kind='stable'), -1)
  lists = jnp.asarray(ids[None]), jnp.asarray(first.sum(-1)[None])

  def run(implementation, dtype):
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = (1, T, N, H), (1, T, K, H), (1, T, K, H), (1, T, N, H)
    q, k, v, d_out = (
      jax.random.normal(key, shape, jnp.bfloat16).astype(dtype)
      for key, shape in zip(keys, shapes, strict=True)
    )
    attend = functools.partial(
      block_sparse_attention,
      block_q=block_q,
      block_k=block_k,
      implementation=implementation,
    )

    @jax.jit
    def both(q, k, v, d_out):
      (out, lse), pull = jax.vjp(lambda *x: attend(*x, *lists), q, k, v)
      return out, lse, *pull((d_out, jnp.zeros_like(lse)))

    return [np.asarray(x, np.float32) for x in both(q, k, v, d_out)]

  got = run('pallas_gpu', jnp.bfloat16)
  with jax.default_matmul_precision('highest'):
    want = run('xla', jnp.float32)
  names = 'out', 'lse', 'dq', 'dk', 'dv'
  for one, other, what in zip(got, want, names, strict=True):
    gradient = what.startswith('d')
    oracles.check_close(one, other, 'bfloat16', gradient=gradient, what=what)


DECODES = {
  'ragged': (([700, 9, 0, 1000], 1, 1000, 16, 4, 128, 64, 64), None, None),
  'few queries': (([300, 5], 3, 320, 4, 2, 64, 64, 16), None, [7, 0]),
  'window': (([950], 1, 960, 6, 2, 128, 128, 128), 200, None),
  'wide group': (([500, 490], 20, 512, 16, 1, 64, 128, 32), None, None),
}


@pytest.mark.parametrize('name', list(DECODES))
def test_decodes(name):
  hopper_or_newer()
  shape, window, starts = DECODES[name]
  args, call, mask = test_decode_gpu.make_case(*shape, window, starts)
  out, lse = jax.jit(call)(*args)
  want, want_lse = oracles.attention(*args, mask)
  read = np.isfinite(want_lse)
  oracles.check_close(out.astype(jnp.float32), want, 'bfloat16')
  assert (np.asarray(lse)[~read] == -np.inf).all()
  oracles.check_close(np.asarray(lse)[read], want_lse[read], 'bfloat16')


def test_decode_over_a_long_cache():
  hopper_or_newer()
  B, S, N, K, H, block_k, M = 8, 65_536, 16, 4, 128, 64, 24
  rng = np.random.default_rng(0)
  keys = jax.random.split(jax.random.key(0), 3)
  shapes = (B, 1, N, H), (B, S, K, H), (B, S, K, H)
  q, k, v = (
    jax.random.normal(key, shape, jnp.bfloat16)
    for key, shape in zip(keys, shapes, strict=True)
  )
  ids = np.stack([rng.permutation(S // block_k)[:M] for _ in range(B * K)])
  call = functools.partial(
    decode_attention,
    block_ids=jnp.asarray(ids.reshape(B, K, M)),
    block_counts=jnp.asarray(rng.integers(0, M + 1, (B, K))),
    lengths=jnp.asarray(rng.integers(1, S + 1, B)),
    block_k=block_k,
  )
  out, lse = jax.jit(functools.partial(call, implementation='pallas_gpu'))(
    q, k, v
  )
  with jax.default_matmul_precision('highest'):
    f32 = (x.astype(jnp.float32) for x in (q, k, v))
    want, want_lse = jax.jit(functools.partial(call, implementation='xla'))(
      *f32
    )
  some = np.isfinite(want_lse)
  assert some.any()
  oracles.check_close(np.asarray(out, np.float32), want, 'bfloat16')
  np.testing.assert_array_equal(np.isfinite(lse), some)
  oracles.check_close(np.asarray(lse)[some], want_lse[some], 'bfloat16')


@pytest.mark.parametrize('causal', [True, False])
@pytest.mark.parametrize('H', [64, 128])
def test_dense_by_cudnn(causal, H):
  """With a gradient of the log-sum-exp, which is ours."""
  rng = np.random.default_rng(0)
  B, T, N, K = 2, 256, 4, 2

  def normal(*shape):
    return jnp.asarray(rng.normal(size=shape), jnp.bfloat16)

  args = normal(B, T, N, H), normal(B, T, K, H), normal(B, T, K, H)
  d_out = np.asarray(normal(B, T, N, H), np.float64)
  d_lse = rng.normal(size=(B, T, N))
  mask = np.ones((B, K, T, T), bool)
  if causal:
    mask = oracles.causal_mask(B, K, T, T)
  call = functools.partial(
    dense_attention, causal=causal, implementation='cudnn'
  )
  got = test_block_sparse_gpu.gradients(call, d_out, d_lse)(*args)
  test_block_sparse_gpu.check(got, args, mask, d_out, d_lse)


@pytest.mark.parametrize('name', list(test_block_sparse.CASES))
def test_xla_in_f32(name):
  """The portable path, with f32 products: a GPU rounds them to tf32."""
  args, call, mask, d_out = test_block_sparse.make_case(name)
  d_lse = np.random.default_rng(1).normal(size=d_out.shape[:-1])
  with jax.default_matmul_precision('highest'):
    run = test_block_sparse_gpu.gradients(
      functools.partial(call, implementation='xla'), d_out, d_lse
    )
    got = run(*args)
  test_block_sparse_gpu.check(got, args, mask, d_out, d_lse, 'float32')


def test_auto_takes_the_kernel_of_this_gpu():
  hopper_or_newer()
  args, call, *_ = test_block_sparse.make_case('realistic', dtype=jnp.bfloat16)
  text = jax.jit(call).lower(*args).as_text()
  assert 'block_sparse_forward' in text
