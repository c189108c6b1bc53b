"""Where the rows of query tiles lie in the global memory of a GPU.

Row `(g, t)` of a tile is query `t` of head `g` of a group. Mostly the rows that
a block of threads copies are whole runs of one head's queries, which it can
read from [B, T, N, *] as the caller has them. Else they were packed before:
[tiles, rows, *], with padding.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from psa_jax.kernels import nvidia
from psa_jax.kernels.tiles import Tiles

LINES = 8  # rows of a tile in shared memory that lie together


class QueryRows(NamedTuple):
  """How queries, and what belongs to them, are given to a kernel.

  Attributes:
    tiles: the tiling.
    rows: of a query tile, padding included.
    packed: whether arrays are [tiles, rows, *] and not [B, T, N, *].
  """

  tiles: Tiles
  rows: int
  packed: bool

  @classmethod
  def of(cls, tiles: Tiles, rows: int, *pieces: int) -> 'QueryRows':
    """Those of a call.

    Args:
      tiles: the tiling.
      rows: of a query tile, padding included.
      *pieces: rows that are copied together, of each kernel.
    """
    block_q = tiles.block_q
    whole = rows == tiles.rows and tiles.T % block_q == 0
    runs = all(
      n % block_q == 0 and block_q % LINES == 0 or block_q % n == 0
      for n in pieces
    )
    return cls(tiles, rows, not (whole and runs))

  @property
  def number(self) -> int:
    """Query tiles of all heads."""
    return self.tiles.B * self.tiles.K * self.tiles.nq

  def pack(self, x: jax.Array) -> jax.Array:
    """[B, T, N, *] as the kernel reads it."""
    return self.pack_always(x) if self.packed else x

  def pack_always(self, x: jax.Array, value=0) -> jax.Array:
    """[B, T, N, *] -> [tiles, rows, *]."""
    return nvidia.pad_axis(self.tiles.pack_q(x), 1, self.rows, value)

  def unpack(self, x: jax.Array) -> jax.Array:
    """The inverse of `pack`."""
    return self.unpack_always(x) if self.packed else x

  def unpack_always(self, x: jax.Array) -> jax.Array:
    """The inverse of `pack_always`."""
    return self.tiles.unpack_q(x[:, : self.tiles.rows])

  def shape(self, width: int) -> tuple[int, ...]:
    """Of an array with so many channels, as the kernel reads or writes it."""
    if self.packed:
      return self.number, self.rows, width
    return self.tiles.B, self.tiles.T, self.tiles.K * self.tiles.G, width

  def copies(self, size: int) -> int:
    """How many copies `size` rows of a tile take."""
    return 1 if self.packed else max(1, size // self.tiles.block_q)

  def slices(self, array, shared, head, i, first, size: int):
    """(global, shared) memory of each copy.

    Args:
      array: of `shape`, in global memory.
      shared: [size, *].
      head: kv head of all batch rows, `b * K + head`.
      i: query tile of the head.
      first: row of the tile.
      size: rows, one of `pieces`.
    """
    if self.packed:
      tile = head * self.tiles.nq + i
      return [(array.at[tile, pl.ds(first, size)], shared)]
    K, G, block_q = (
      jnp.int32(x) for x in (self.tiles.K, self.tiles.G, self.tiles.block_q)
    )
    batch, head = lax.div(head, K), lax.rem(head, K)
    n = self.copies(size)
    step = size // n
    pairs = []
    for at in range(0, size, step):
      g = lax.div(first + at, block_q)
      t = i * block_q + lax.rem(first + at, block_q)
      source = array.at[batch, pl.ds(t, step), head * G + g]
      pairs.append((source, shared if n == 1 else shared.at[pl.ds(at, step)]))
    return pairs
