"""Summaries of key blocks: sum, minimum and maximum of their keys.

`pool` summarises all keys at once, for training and prefill; `empty` and
`append` keep the same summaries beside a cache that grows, in work that does
not depend on its length. Minima and maxima are those of Quest (arXiv
2406.10774).

Packed documents: a block is pooled over the keys of its last key's document.
A whole block is only scored by queries behind it, and they belong to that
document or to none of the block's.

Not done here: removing keys. A row starts anew at length 0 without clearing,
for the first key of a block replaces what was there.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Pooled(NamedTuple):
  """Block summaries in f32.

  Attributes:
    total: sum of the block's keys.
    size: how many they are.
    low: their minimum a channel, or None where only means are wanted.
    high: their maximum, or None.
  """

  total: Float[Array, 'B K Nb H']
  size: Int[Array, 'B Nb']
  low: Float[Array, 'B K Nb H'] | None
  high: Float[Array, 'B K Nb H'] | None

  @property
  def bounded(self) -> bool:
    """Whether minima and maxima are kept."""
    return self.low is not None


def pool(
  k: Float[Array, 'B S K H'],
  *,
  block_k: int,
  bounds: bool = True,
  segment_ids: Int[Array, 'B S'] | None = None,
  lengths: Int[Array, 'B'] | None = None,
) -> Pooled:
  """Summarises all keys.

  Args:
    k: keys.
    block_k: keys a block; the last block may be partial.
    bounds: keep minima and maxima too.
    segment_ids: documents of packed rows, nondecreasing.
    lengths: keys of each row; what lies behind is left out. None means S.
  """
  B, S = k.shape[:2]
  blocks = -(-S // block_k)
  pad = blocks * block_k - S
  k = jnp.pad(k.astype(jnp.float32), ((0, 0), (0, pad), (0, 0), (0, 0)))
  k = k.reshape(B, blocks, block_k, *k.shape[2:])
  if segment_ids is None and lengths is None and not pad:
    member = None
  else:
    member = _members(B, S, block_k, blocks, segment_ids, lengths)
  return _reduce(k, member, bounds)


def _members(B, S, block_k, blocks, segment_ids, lengths):
  """[B, blocks, block_k] bool: which keys a block is pooled over."""
  if lengths is None:
    lengths = jnp.full((B,), S, jnp.int32)
  pos = jnp.arange(blocks * block_k).reshape(1, blocks, block_k)
  member = pos < lengths[:, None, None]
  if segment_ids is None:
    return member
  end = jnp.minimum(pos[..., -1] + 1, lengths[:, None])
  last = jnp.take_along_axis(segment_ids, jnp.maximum(end - 1, 0), 1)
  pad = blocks * block_k - S
  segment_ids = jnp.pad(segment_ids, ((0, 0), (0, pad)))
  return member & (segment_ids.reshape(member.shape) == last[..., None])


def _reduce(k, member, bounds):
  """Pools k [B, blocks, keys, K, H] over the keys of `member`, or all."""

  def keep(x, other):
    if member is None:
      return x
    return jnp.where(member[..., None, None], x, other)

  def over_keys(x):  # [B, blocks, K, H] -> [B, K, blocks, H]
    return jnp.moveaxis(x, 2, 1)

  if member is None:
    size = jnp.full(k.shape[:2], k.shape[2], jnp.int32)
  else:
    size = member.sum(-1, dtype=jnp.int32)
  total = over_keys(keep(k, 0).sum(2))
  if not bounds:
    return Pooled(total, size, None, None)
  low = over_keys(keep(k, jnp.inf).min(2))
  high = over_keys(keep(k, -jnp.inf).max(2))
  return Pooled(total, size, low, high)


def empty(
  batch: int,
  room: int,
  kv_heads: int,
  head_dim: int,
  *,
  block_k: int,
  bounds: bool = True,
) -> Pooled:
  """The summaries of a cache that holds nothing yet.

  Args:
    batch: B.
    room: S, the keys that a row of the cache can hold.
    kv_heads: K.
    head_dim: H.
    block_k: keys a block.
    bounds: keep minima and maxima too.
  """
  blocks = -(-room // block_k)

  def keys():  # an array each, so that a step may donate them all
    return jnp.zeros((batch, kv_heads, blocks, head_dim), jnp.float32)

  size = jnp.zeros((batch, blocks), jnp.int32)
  if not bounds:
    return Pooled(keys(), size, None, None)
  return Pooled(keys(), size, keys(), keys())


def append(
  pooled: Pooled,
  new: Float[Array, 'B T K H'],
  lengths: Int[Array, 'B'],
  *,
  block_k: int,
  starts: Int[Array, 'B T'] | None = None,
  counts: Int[Array, 'B'] | None = None,
) -> Pooled:
  """Adds new keys; the work is proportional to T, not to the cache.

  Args:
    pooled: what was there before. Donate it to `jit`, or it is copied.
    new: the keys at positions `lengths[b]` to `lengths[b] + T - 1`.
    lengths: keys that each row held before.
    block_k: keys a block.
    starts: position of the first token of each new token's document; None
      means 0, one document a row.
    counts: how many of the T keys each row really takes (0 for an idle row);
      None means all.

  Returns:
    What `pool` gives for all keys so far, up to the order of the sums. Keys
    that find no room are dropped.
  """
  B, T = new.shape[:2]
  lengths = lengths.astype(jnp.int32)
  end = lengths + (T if counts is None else counts.astype(jnp.int32))
  touched = (T + block_k - 2) // block_k + 1  # blocks that T keys may reach
  block = lengths[:, None] // block_k + jnp.arange(touched)[None]
  first = jnp.maximum(block * block_k, lengths[:, None])
  stop = jnp.minimum((block + 1) * block_k, end[:, None])
  if starts is not None:  # the block's last key says which document counts
    last = jnp.clip(stop - 1 - lengths[:, None], 0, T - 1)
    begin = jnp.take_along_axis(starts.astype(jnp.int32), last, 1)
  else:
    begin = jnp.zeros_like(block)
  pos = first[..., None] + jnp.arange(min(block_k, T))[None, None]
  member = (pos >= begin[..., None]) & (pos < stop[..., None])
  at = jnp.clip(pos - lengths[:, None, None], 0, T - 1)
  keys = new.astype(jnp.float32)[jnp.arange(B)[:, None, None], at]
  added = _reduce(keys, member, pooled.bounded)
  # The first key of a block, or of a document, replaces what was there.
  old = jnp.maximum(block * block_k, begin) < lengths[:, None]
  return _put(pooled, added, block, old, first < stop)


def _put(pooled, added, block, old, some):
  """Merges `added` [B, K, n, *] into blocks `block` [B, n] where `some`."""
  row = jnp.arange(block.shape[0])[:, None]
  block = jnp.where(some, block, pooled.size.shape[1])  # dropped

  def merge(whole, part, join):
    if whole.ndim == 2:
      before = whole.at[row, block].get(mode='clip')
      part = jnp.where(old, join(before, part), part)
      return whole.at[row, block].set(part, mode='drop')
    part = jnp.moveaxis(part, 1, 2)  # as the indexed blocks, [B, n, K, H]
    before = whole.at[row, :, block].get(mode='clip')
    part = jnp.where(old[..., None, None], join(before, part), part)
    return whole.at[row, :, block].set(part, mode='drop')

  total = merge(pooled.total, added.total, jnp.add)
  size = merge(pooled.size, added.size, jnp.add)
  if not pooled.bounded:
    return Pooled(total, size, None, None)
  low = merge(pooled.low, added.low, jnp.minimum)
  high = merge(pooled.high, added.high, jnp.maximum)
  return Pooled(total, size, low, high)
