"""Block lists themselves: their transpose, and a check of what they promise.

The transpose says which query tiles read a key block. Kernels that sum the
gradients of keys and values a key block at a time walk it, and need no atomic
additions.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

LARGEST = jnp.iinfo(jnp.int32).max  # that a block and a tile fit into together


class Readers(NamedTuple):
  """The query tiles that read each key block, in compressed rows.

  Block `j` is read by `tiles[..., offsets[..., j] : offsets[..., j + 1]]`, in
  ascending order.

  Attributes:
    offsets: `R` is the number of key blocks + 1.
    tiles: `E` is the room of the lists, Tb * M; entries past the last offset
      may hold anything.
  """

  offsets: Int[Array, 'B K R']
  tiles: Int[Array, 'B K E']


def transpose(
  block_ids: Int[Array, 'B K Tb M'],
  block_counts: Int[Array, 'B K Tb'],
  blocks: int,
) -> Readers:
  """Inverts block lists.

  Args:
    block_ids: see `api.block_sparse_attention`.
    block_counts: likewise.
    blocks: number of key blocks.
  """
  B, K, tiles, M = block_ids.shape
  used = jnp.arange(M)[None, None, None] < block_counts[..., None]
  block = jnp.where(used, block_ids, blocks).reshape(B, K, -1)
  tile = jnp.broadcast_to(jnp.arange(tiles)[:, None], (tiles, M)).reshape(-1)
  tile = jnp.broadcast_to(tile[None, None], block.shape)
  ends = jnp.arange(blocks + 1)
  if (blocks + 1) * tiles <= LARGEST:
    # One number sorts several times faster than a pair does.
    pair = jnp.sort(block * tiles + tile, axis=-1)
    return Readers(_search(pair, ends * tiles, 'left'), pair % tiles)
  block, tile = jax.lax.sort((block, tile), num_keys=1, is_stable=True)
  return Readers(_search(block, ends, 'left'), tile.astype(jnp.int32))


class Shares(NamedTuple):
  """Readers dealt out, so that nobody walks through many of them alone.

  A block with too many readers (a sink has all tiles) is split: its readers
  are in the first `E` shares, several a block, and the share that is its own
  is empty. Then comes a share for each block.

  Attributes:
    block: the key block of each share.
    first: of its readers, in `Readers.tiles`.
    count: how many they are.
    extra: `E`.
  """

  block: Int[Array, 'B K I']
  first: Int[Array, 'B K I']
  count: Int[Array, 'B K I']
  extra: int


def share_out(readers: Readers, tiles: int, most: int) -> Shares:
  """Splits what is read by more than `most` tiles.

  Args:
    readers: of key blocks.
    tiles: of queries, the most readers that a block can have.
    most: readers of a share.
  """
  counts = jnp.diff(readers.offsets)
  B, K, blocks = counts.shape
  every = jnp.broadcast_to(jnp.arange(blocks, dtype=jnp.int32), counts.shape)
  if tiles <= most:
    return Shares(every, readers.offsets[..., :-1], counts, 0)
  # A split block has more readers than `most`, and at most one share that is
  # less than half full.
  extra = 2 * (readers.tiles.shape[-1] // most)
  split = _split(counts, most)
  ends = jnp.cumsum(split, -1)
  block = _search(ends, jnp.arange(extra), 'right')
  there = block < blocks
  block = jnp.minimum(block, blocks - 1)

  def of(x):
    return jnp.take_along_axis(x, block, -1)

  nth = jnp.arange(extra)[None, None] - of(ends - split)
  size = -(-of(counts) // jnp.maximum(of(split), 1))
  begin = nth * size
  count = jnp.where(there, jnp.clip(of(counts) - begin, 0, size), 0)
  parts = (
    (block, every),
    (of(readers.offsets) + begin, readers.offsets[..., :-1]),
    (count, jnp.where(split > 0, 0, counts)),
  )
  block, first, count = (
    jnp.concatenate(x, -1).astype(jnp.int32) for x in parts
  )
  return Shares(block, first, count, extra)


def join_shares(whole, partial, readers: Readers, tiles: int, most: int):
  """Adds the shares of split blocks up, always in the same order.

  Args:
    whole: results [B, Nb, rows, K, H], of which those of split blocks are
      replaced.
    partial: [B, K, E, rows, H], the extra shares' results.
    readers: see `share_out`.
    tiles: likewise.
    most: likewise.
  """
  split = _split(jnp.diff(readers.offsets), most)
  B, K, blocks = split.shape
  room = jnp.arange(readers.tiles.shape[-1] // most)
  # The split blocks; past the last one a number that is no block's.
  block = _search(jnp.cumsum(split > 0, -1), room, 'right')
  there = jnp.minimum(block, blocks - 1)
  ends, n = (
    jnp.take_along_axis(x, there, -1) for x in (jnp.cumsum(split, -1), split)
  )

  def add(total, nth):
    at = jnp.clip(ends - n + nth, 0, partial.shape[2] - 1)
    part = jnp.take_along_axis(partial, at[..., None, None], 2)
    return total + jnp.where((nth < n)[..., None, None], part, 0)

  total = jnp.zeros((*block.shape, *partial.shape[3:]), partial.dtype)
  for nth in range(-(-tiles // most)):
    total = add(total, nth)
  b, h = (jnp.arange(n) for n in (B, K))
  return whole.at[b[:, None, None], block, :, h[None, :, None]].set(
    total.astype(whole.dtype), mode='drop', unique_indices=True
  )


def _split(counts, most: int):
  """How many extra shares each block has."""
  return jnp.where(counts > most, -(-counts // most), 0)


def _search(rows, values, side):
  """Where `values` would be in each of the sorted rows [B, K, *]."""

  def one(row):
    return jnp.searchsorted(row, values, side=side, method='scan_unrolled')

  return jax.vmap(jax.vmap(one))(rows).astype(jnp.int32)


def check(block_ids, block_counts, blocks: int) -> None:
  """Refuses lists with a block twice, or outside [0, blocks).

  Raises:
    ValueError: names the batch row, kv head and query tile of the first one.
  """
  ids, counts = np.asarray(block_ids), np.asarray(block_counts)
  for at in np.ndindex(counts.shape):
    read = ids[at][: counts[at]]
    where = 'the list of batch row {}, kv head {}, query tile {}'.format(*at)
    if counts[at] < 0 or counts[at] > ids.shape[-1]:
      raise ValueError(
        f'{where} has count {counts[at]}, not in [0, {ids.shape[-1]}]'
      )
    if ((read < 0) | (read >= blocks)).any():
      raise ValueError(f'{where} names a block outside [0, {blocks}): {read}')
    if len(np.unique(read)) < len(read):
      raise ValueError(f'{where} names a block twice: {read}')


def check_when_run(block_ids, block_counts, blocks: int) -> None:
  """`check` at run time, inside a traced program."""
  jax.debug.callback(
    functools.partial(check, blocks=blocks), block_ids, block_counts
  )
