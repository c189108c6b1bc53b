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
  block, tile = jax.lax.sort((block, tile), num_keys=1, is_stable=True)
  every = jnp.arange(blocks + 1)
  first = jax.vmap(jax.vmap(lambda x: jnp.searchsorted(x, every)))
  return Readers(first(block).astype(jnp.int32), tile.astype(jnp.int32))


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
