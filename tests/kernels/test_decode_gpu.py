"""Decoding on Hopper GPUs: dealt-out lists, lowered and simulated."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psa_jax.kernels import nvidia, platform
from psa_jax.kernels.decode import decode_attention
from psa_jax.kernels.decode import pallas_gpu as decode_gpu
from tests import oracles
from tests.kernels import gpu_simulator


def make_case(lengths, T, S, N, K, H, Hv, block_k, window=None, starts=None):
  """(q, k, v), the call, and the mask [B, K, T, S]; garbage after counts."""
  rng = np.random.default_rng(0)
  B, blocks = len(lengths), -(-S // block_k)

  def normal(*shape):
    return jnp.asarray(rng.normal(size=shape), jnp.bfloat16)

  args = normal(B, T, N, H), normal(B, S, K, H), normal(B, S, K, Hv)
  ids = np.stack([rng.permutation(blocks) for _ in range(B * K)])
  ids = ids.reshape(B, K, blocks)
  counts = rng.integers(1, blocks + 1, size=(B, K))
  mask = np.zeros((B, K, T, S), bool)
  first = np.zeros(B, int) if starts is None else starts
  for b, h, t in np.ndindex(B, K, T):
    last = lengths[b] - T + t
    for j in ids[b, h, : counts[b, h]]:
      for s in range(j * block_k, min((j + 1) * block_k, S)):
        near = window is None or s > last - window
        mask[b, h, t, s] = first[b] <= s <= last and near
  past = np.arange(blocks) >= counts[..., None]
  call = functools.partial(
    decode_attention,
    block_ids=jnp.asarray(np.where(past, 10**6, ids)),
    block_counts=jnp.asarray(counts),
    lengths=jnp.asarray(lengths),
    block_k=block_k,
    window=window,
    starts=None if starts is None else jnp.asarray(starts),
    implementation='pallas_gpu',
  )
  return args, call, mask


@pytest.mark.tier('default')
@pytest.mark.parametrize('block_k, T', [(64, 1), (16, 3), (128, 20)])
def test_lowers_for_hopper(block_k, T):
  args, call, _ = make_case([700, 9], T, 1000, 16, 4, 128, 64, block_k)
  text = gpu_simulator.lower(gpu_simulator.H100, call, *args).as_text()
  assert 'block_sparse_forward' in text


@pytest.mark.tier('ci')
@pytest.mark.parametrize(
  'shape, window, starts',
  [
    (([61, 0], 3, 64, 2, 1, 16, 24, 16), None, [7, 0]),
    (([61], 1, 61, 6, 2, 16, 16, 32), 20, None),
  ],
)
def test_simulated(shape, window, starts, monkeypatch):
  monkeypatch.setattr(nvidia, 'BLOCKS', 4)  # two or so a list
  args, call, mask = make_case(*shape, window, starts)
  with gpu_simulator.simulated(gpu_simulator.H100):
    out, lse = jax.jit(call)(*args)
  assert out.dtype == jnp.bfloat16 and lse.dtype == jnp.float32
  want, want_lse = oracles.attention(*args, mask)
  read = np.isfinite(want_lse)
  assert read.any()
  oracles.check_close(out.astype(jnp.float32), want, 'bfloat16')
  assert (np.asarray(lse)[~read] == -np.inf).all()
  oracles.check_close(np.asarray(lse)[read], want_lse[read], 'bfloat16')


@pytest.mark.parametrize('M, parts', [(1, 1), (5, 2), (7, 3), (6, 6)])
def test_lists_are_dealt_out_evenly(M, parts):
  rng = np.random.default_rng(0)
  ids = np.stack([rng.permutation(M) for _ in range(4)]).reshape(2, 2, M)
  for count in range(M + 1):
    counts = np.full((2, 2), count)
    short, share = decode_gpu.deal(
      jnp.asarray(ids), jnp.asarray(counts), parts=parts
    )
    assert share.shape == (2, 2, parts)
    assert share.max() - share.min() <= 1
    for at in np.ndindex(2, 2):
      dealt = [short[at][p, : share[at][p]] for p in range(parts)]
      assert sorted(np.concatenate(dealt)) == sorted(ids[at][:count])


def test_refused_before_hopper():
  args, call, _ = make_case([9], 1, 64, 2, 1, 16, 16, 16)
  with platform.target('gpu', kind='NVIDIA A100', capability=80):
    with pytest.raises(ValueError, match='compute capability 8.0'):
      call(*args)
