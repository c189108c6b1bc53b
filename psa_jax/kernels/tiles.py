"""How the kernels cut queries and keys into tiles.

Kv heads of all batch rows are flattened into one axis, and the G query heads
that share a kv head are stacked as rows of one tile, so that they share the
keys that are read.
"""

from typing import NamedTuple

import jax.numpy as jnp


class Tiles(NamedTuple):
  """Sizes of one attention call; the last tile of either side is padded."""

  B: int
  T: int
  S: int
  K: int
  G: int
  block_q: int
  block_k: int

  @classmethod
  def of(cls, q, k, block_q, block_k):
    """The tiling of q [B, T, N, H] against k [B, S, K, H]."""
    B, T, N, _ = q.shape
    S, K = k.shape[1:3]
    return cls(B, T, S, K, N // K, block_q, block_k)

  @property
  def nq(self):
    """Tiles of queries a head."""
    return -(-self.T // self.block_q)

  @property
  def nk(self):
    """Blocks of keys a head."""
    return -(-self.S // self.block_k)

  @property
  def rows(self):
    """Rows of a query tile."""
    return self.G * self.block_q

  def pack_q(self, x):
    """[B, T, N, *] -> [B * K * nq, G * block_q, *]."""
    rest = x.shape[3:]
    pad = self.nq * self.block_q - self.T
    x = jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2))
    x = x.reshape(self.B, self.nq, self.block_q, self.K, self.G, *rest)
    x = jnp.moveaxis(x, (3, 1, 4, 2), (1, 2, 3, 4))
    return x.reshape(-1, self.rows, *rest)

  def unpack_q(self, x):
    """The inverse of `pack_q`."""
    rest = x.shape[2:]
    x = x.reshape(self.B, self.K, self.nq, self.G, self.block_q, *rest)
    x = jnp.moveaxis(x, (2, 4, 1, 3), (1, 2, 3, 4))
    return x.reshape(self.B, -1, self.K * self.G, *rest)[:, : self.T]

  def pack_k(self, x):
    """[B, S, K, H] -> [B * K * nk, block_k, H]."""
    pad = self.nk * self.block_k - self.S
    x = jnp.pad(x, [(0, 0), (0, pad), (0, 0), (0, 0)])
    x = x.reshape(self.B, self.nk, self.block_k, self.K, -1)
    return jnp.moveaxis(x, 3, 1).reshape(-1, self.block_k, x.shape[-1])

  def unpack_k(self, x):
    """The inverse of `pack_k`."""
    x = x.reshape(self.B, self.K, self.nk, self.block_k, -1)
    x = jnp.moveaxis(x, 1, 3).reshape(self.B, -1, self.K, x.shape[-1])
    return x[:, : self.S]

  def pack_segments(self, q_seg, kv_seg):
    """[B, T], [B, S] -> [B * nq, block_q], [B * nk, block_k]."""
    q_pad = self.nq * self.block_q - self.T
    k_pad = self.nk * self.block_k - self.S
    q_seg = jnp.pad(q_seg, ((0, 0), (0, q_pad)))
    kv_seg = jnp.pad(kv_seg, ((0, 0), (0, k_pad)))
    return q_seg.reshape(-1, self.block_q), kv_seg.reshape(-1, self.block_k)

  def q_positions(self, tile, q_offset):
    """[rows] positions of the queries of flat tile number `tile`."""
    t = (tile % self.nq) * self.block_q + jnp.arange(self.block_q)
    return jnp.tile(t + q_offset, self.G)

  def q_segments(self, q_seg, tile):
    """[rows] segments of the queries of flat tile number `tile`."""
    b = tile // (self.nq * self.K)
    return jnp.tile(q_seg[b * self.nq + tile % self.nq], self.G)
