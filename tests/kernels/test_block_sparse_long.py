"""Long contexts: a 65,536-token run against float64, and sizes past 2^31.

The oracle works on sampled rows and blocks, so it is linear in what it checks.
"""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psa_jax.kernels.block_sparse import block_sparse_attention
from tests import oracles

pytestmark = pytest.mark.tier('default')

T, H, BLOCK_Q, BLOCK_K, M = 65_536, 16, 256, 64, 24


def lists(rng):
  """24 blocks a tile: its own, the nearest before it, and random older ones."""
  tiles, own = T // BLOCK_Q, BLOCK_Q // BLOCK_K
  ids = np.full((1, 1, tiles, M), -1)
  counts = np.zeros((1, 1, tiles), int)
  for i in range(tiles):
    last = (i + 1) * own
    near = np.arange(last - 1, max(last - own - 8, 0) - 1, -1)
    far = rng.permutation(near[-1])[: M - len(near)]
    listed = np.concatenate([near, far])
    counts[0, 0, i] = len(listed)
    ids[0, 0, i, : len(listed)] = listed
  return ids, counts


def keys_of(ids, counts, tile):
  blocks = ids[0, 0, tile, : counts[0, 0, tile]]
  return (blocks[:, None] * BLOCK_K + np.arange(BLOCK_K)).reshape(-1)


def rows_of(tile):
  return tile * BLOCK_Q + np.arange(BLOCK_Q)


def tile_oracle(q, k, v, d_out, ids, counts, tile):
  """Keys, output, and the gradients from one tile of queries, in float64."""
  t, s = rows_of(tile), keys_of(ids, counts, tile)
  score = np.where(s[None] <= t[:, None], q[t] @ k[s].T * H**-0.5, -np.inf)
  p = np.exp(score - score.max(1, keepdims=True))
  p /= p.sum(1, keepdims=True)
  dp = d_out[t] @ v[s].T
  ds = p * (dp - (p * dp).sum(1, keepdims=True)) * H**-0.5
  return s, p @ v[s], ds @ k[s], ds.T @ q[t], p.T @ d_out[t]


def test_65536_tokens_against_float64():
  rng = np.random.default_rng(0)
  ids, counts = lists(rng)
  arrays = rng.normal(size=(4, T, H)).astype(np.float32)
  q, k, v, d_out = arrays.astype(np.float64)

  @jax.jit
  def run(q, k, v, d_out):
    def attend(q, k, v):
      q, k, v = (x[None, :, None] for x in (q, k, v))
      lists = jnp.asarray(ids), jnp.asarray(counts)
      out, _ = block_sparse_attention(
        q, k, v, *lists, block_q=BLOCK_Q, block_k=BLOCK_K
      )
      return out[0, :, 0]

    out, pull = jax.vjp(attend, q, k, v)
    return out, *pull(d_out)

  out, dq, dk, dv = (np.asarray(x, np.float64) for x in run(*arrays))
  for tile in (0, 1, 57, T // BLOCK_Q - 1):
    _, want, want_dq, *_ = tile_oracle(q, k, v, d_out, ids, counts, tile)
    rows = rows_of(tile)
    oracles.check_close(out[rows], want, what=f'out of tile {tile}')
    oracles.check_close(dq[rows], want_dq, gradient=True, what=f'dq of {tile}')
  used = np.arange(M) < counts[0, 0][:, None]
  for block in (0, 100, T // BLOCK_K - 1):
    want_dk, want_dv = np.zeros((2, BLOCK_K, H))
    for tile in np.flatnonzero(((ids[0, 0] == block) & used).any(1)):
      s, _, _, part_dk, part_dv = tile_oracle(q, k, v, d_out, ids, counts, tile)
      at = np.flatnonzero(s // BLOCK_K == block)
      want_dk += part_dk[at]
      want_dv += part_dv[at]
    rows = block * BLOCK_K + np.arange(BLOCK_K)
    oracles.check_close(dk[rows], want_dk, gradient=True, what=f'dk of {block}')
    oracles.check_close(dv[rows], want_dv, gradient=True, what=f'dv of {block}')


@pytest.mark.skipif(
  os.environ.get('PSA_JAX_TEST_LARGE') != '1',
  reason='needs 12 GB of memory; PSA_JAX_TEST_LARGE=1 runs it',
)
def test_more_than_2_to_31_elements():
  """The last keys of an array whose flat index does not fit in 32 bits."""
  size = 2**31 // 64 + 4096
  assert size * 64 > 2**31
  tail = 2048
  rng = np.random.default_rng(0)
  q, last = (
    jnp.asarray(rng.normal(size=(1, n, 1, 64)), jnp.bfloat16)
    for n in (64, tail)
  )
  blocks = jnp.asarray([[[[31, 30, 3, 0]]]])
  counts = jnp.asarray([[[4]]])

  @jax.jit
  def attend(q, k, ids):
    call = dict(block_q=64, block_k=64, q_offset=k.shape[1] - 64)
    return jax.value_and_grad(
      lambda q, k: (
        block_sparse_attention(q, k, k[..., :8], ids, counts, **call)[0]
        .astype(jnp.float32)
        .sum()
      ),
      argnums=0,
    )(q, k)

  long = jax.jit(
    lambda x: jnp.zeros((1, size, 1, 64), x.dtype).at[:, -tail:].set(x)
  )(last)
  got = attend(q, long, blocks + (size - tail) // 64)
  want = attend(q, last, blocks)
  for a, b in zip(got, want, strict=True):
    np.testing.assert_array_equal(a, b)
