"""A cache of keys and values in FlashQ integers.

Whole blocks of tokens are packed (`flashq.py`); the newest tokens of each row
wait in an INT8 buffer of one block, at a scale for each head that calibration
fixed (what it does not reach is clamped), and are packed by integer arithmetic
alone when the buffer is full. Rows have lengths of their own. `read` restores
the blocks of a list and no others (`flashq_attention.py`).

Heads lie in the buffers by priority, keys and values each in their own order.
Everything that comes in or goes out has heads in the model's order.

Not done: sharding over heads (the order mixes them) and removing tokens.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Int8

from psa_jax.quant import flashq
from psa_jax.quant.flashq import HIGH, LOW, Heads, Packed


class Store(NamedTuple):
  """Keys or values.

  Attributes:
    heads: order and buffer scales of the heads.
    high: the blocks of the first heads of the order, 4 bits.
    low: those of the last heads, 2 bits.
    recent: the tokens after the last whole block, in INT8.
  """

  heads: Heads
  high: Packed
  low: Packed
  recent: Int8[Array, 'B K block H']

  @property
  def block(self) -> int:
    """Tokens a block."""
    return self.recent.shape[2]

  @property
  def room(self) -> int:
    """Tokens that a row can hold."""
    return self.block * self.high.scale.shape[2]


class Cache(NamedTuple):
  """Keys, values, and how many tokens of each row are there."""

  keys: Store
  values: Store
  lengths: Int[Array, 'B']


def empty(
  batch: int,
  room: int,
  *,
  keys: Heads,
  values: Heads,
  head_dim: int,
  value_dim: int | None = None,
  low_heads: int,
  block: int = 64,
) -> Cache:
  """A cache that holds nothing yet.

  Args:
    batch: B.
    room: tokens that a row can hold, a multiple of `block`.
    keys: from `flashq.calibrate` on sampled keys.
    values: likewise on values.
    head_dim: H of the keys.
    value_dim: Hv of the values; None means H.
    low_heads: kv heads that are stored in 2 bits; half of them in the paper.
    block: tokens that share a scale, a multiple of 4.

  Raises:
    ValueError: sizes that do not fit.
  """
  count = keys.order.shape[0]
  if values.order.shape[0] != count or not 0 <= low_heads <= count:
    raise ValueError(
      f'keys have {count} heads, values {values.order.shape[0]}: need as many, '
      f'and low_heads={low_heads} of them'
    )
  if block < 4 or block % 4 or room < block or room % block:
    raise ValueError(
      f'room={room} must be a multiple of block={block}, and that of 4'
    )

  def store(heads, width):
    def packed(count, bits):
      shape = batch, count, room // block
      return Packed(
        jnp.zeros((*shape, block * bits // 8, width), jnp.uint8),
        jnp.zeros((*shape, width), jnp.uint8),
        jnp.zeros((*shape, width), jnp.int8),
        jnp.zeros(shape, jnp.float32),
      )

    recent = jnp.zeros((batch, count, block, width), jnp.int8)
    high, low = packed(count - low_heads, HIGH), packed(low_heads, LOW)
    # Arrays of its own, so that a step may donate the cache.
    return Store(jax.tree.map(jnp.copy, heads), high, low, recent)

  lengths = jnp.zeros((batch,), jnp.int32)
  return Cache(
    store(keys, head_dim), store(values, value_dim or head_dim), lengths
  )


def nbytes(cache: Cache) -> int:
  """Bytes of all buffers, scales and tables included."""
  return sum(x.nbytes for x in jax.tree.leaves(cache))


def prefill(
  cache: Cache,
  k: Float[Array, 'B T K H'],
  v: Float[Array, 'B T K Hv'],
  lengths: Int[Array, 'B'] | None = None,
) -> Cache:
  """Starts every row anew with a prompt; whole blocks take scales of their own.

  Args:
    cache: its heads are kept.
    k: keys.
    v: values.
    lengths: tokens of each row; what lies behind is not read. None means T.

  Raises:
    ValueError: more tokens than the cache has room for.
  """
  if k.shape[1] > cache.keys.room:
    raise ValueError(f'k {k.shape} does not fit room {cache.keys.room}')
  if lengths is None:
    lengths = jnp.full((k.shape[0],), k.shape[1])
  lengths = lengths.astype(jnp.int32)
  return Cache(
    _prefill(cache.keys, k, lengths),
    _prefill(cache.values, v, lengths),
    lengths,
  )


def _prefill(store, x, lengths):
  block = store.block
  real = jnp.arange(x.shape[1])[None] < lengths[:, None]
  x = jnp.where(real[..., None, None], x, 0)  # NaN would be the block's scale
  x = jnp.take(x, store.heads.order, axis=2)
  x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % block), (0, 0), (0, 0)))
  x = jnp.moveaxis(x, 2, 1)
  blocks = x.reshape(*x.shape[:2], -1, block, x.shape[-1])
  # The block that a row ends in is packed too, and packed again when full.
  ints, scale = flashq.stage_one(blocks)
  groups = _groups(store, ints, scale)
  high, low = (
    jax.tree.map(lambda old, new: old.at[:, :, : new.shape[2]].set(new), *pair)
    for pair in zip((store.high, store.low), groups, strict=True)
  )
  last = jnp.minimum(lengths // block, blocks.shape[2] - 1)
  tail = jax.vmap(lambda row, i: row[:, i])(blocks, last)
  recent = flashq.to_int8(tail, store.heads.scale[None, :, None, None])
  return store._replace(high=high, low=low, recent=recent)


def _groups(store, ints, scale):
  """The second stage of both groups of heads, from INT8 blocks."""
  count = store.high.scale.shape[1]
  return [
    Packed(*flashq.stage_two(ints[:, part], bits=bits), scale[:, part])
    for part, bits in ((slice(count), HIGH), (slice(count, None), LOW))
  ]


def append(
  cache: Cache,
  k: Float[Array, 'B T K H'],
  v: Float[Array, 'B T K Hv'],
  counts: Int[Array, 'B'] | None = None,
) -> Cache:
  """Adds the newest tokens, one after the other.

  Args:
    cache: what is there.
    k: keys of T tokens a row.
    v: values.
    counts: how many of the T tokens each row really has; None means T.

  Returns:
    The cache; a row without room drops tokens, and its length stays.
  """
  if counts is None:
    counts = jnp.full(cache.lengths.shape, k.shape[1])

  def one(cache, new):
    i, k, v = new
    active = (i < counts) & (cache.lengths < cache.keys.room)
    stores = [
      _append(store, x, cache.lengths, active)
      for store, x in ((cache.keys, k), (cache.values, v))
    ]
    return Cache(*stores, cache.lengths + active), None

  each = jnp.arange(k.shape[1]), jnp.moveaxis(k, 1, 0), jnp.moveaxis(v, 1, 0)
  return lax.scan(one, cache, each)[0]


def _append(store, x, lengths, active):
  """One token x [B, K, H] of the active rows; a full buffer is packed."""
  block, rows = store.block, jnp.arange(len(lengths))
  x = jnp.take(x, store.heads.order, axis=1)
  ints = flashq.to_int8(x, store.heads.scale[None, :, None])
  place = lengths % block
  at = jnp.where(active, place, block)  # `block` is nowhere
  recent = store.recent.at[rows, :, at].set(ints, mode='drop')
  full = active & (place == block - 1)

  def flush():
    scale = jnp.broadcast_to(store.heads.scale[None], recent.shape[:2])
    at = jnp.where(full, lengths // block, store.room)
    return [
      jax.tree.map(lambda a, b: a.at[rows, :, at].set(b, mode='drop'), *pair)
      for pair in zip(
        (store.high, store.low), _groups(store, recent, scale), strict=True
      )
    ]

  high, low = lax.cond(full.any(), flush, lambda: [store.high, store.low])
  return store._replace(high=high, low=low, recent=recent)


def read(
  store: Store, block_ids: Int[Array, 'B K M']
) -> tuple[Int8[Array, 'B K M block H'], Float[Array, 'B K M']]:
  """The listed blocks and no others, restored to INT8, with their scales.

  Args:
    store: keys or values.
    block_ids: whole blocks of each kv head; one that is not there gives some
      block that is.
  """
  order = store.heads.order
  ids = jnp.take(block_ids, order, axis=1)
  take = jax.vmap(jax.vmap(lambda x, i: jnp.take(x, i, axis=0, mode='clip')))
  count, restored = store.high.scale.shape[1], []
  for group, part, bits in (
    (store.high, slice(count), HIGH),
    (store.low, slice(count, None), LOW),
  ):
    codes, step, zero, scale = (take(x, ids[:, part]) for x in group)
    restored.append((flashq.restore(codes, step, zero, bits=bits), scale))
  ints, scale = (
    jnp.concatenate(x, axis=1) for x in zip(*restored, strict=True)
  )
  back = jnp.argsort(order)
  return jnp.take(ints, back, axis=1), jnp.take(scale, back, axis=1)


def read_recent(
  store: Store,
) -> tuple[Int8[Array, 'B K block H'], Float[Array, 'B K']]:
  """The buffer and its scales."""
  back = jnp.argsort(store.heads.order)
  recent = jnp.take(store.recent, back, axis=1)
  return recent, jnp.broadcast_to(
    store.heads.scale[back][None], recent.shape[:2]
  )
