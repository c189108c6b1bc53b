"""Sets of positions as bits of uint32 words, and their compaction.

Thirty-two positions a word make counting and prefix sums thirty times smaller
than the row.

Two steps have a form of their own for TPUs. CPUs pack through bytes, which XLA
turns into wide vector code (counting by a packed mask and popcount takes 0.9
ms at [64, 65536], by a sum of int32 2.3 to 5 ms); TPUs pack by a product with
powers of two, since they move lanes slowly and multiply fast. CPUs find the
word of a slot by a scatter of 1 a word; on TPUs scatters and gathers go element
by element, and comparing every slot with every word is cheaper.
"""

import jax
import jax.numpy as jnp
from jax import lax

from psa_jax.kernels import platform

BITS = 32
LANES = 128


def pack(mask: jax.Array) -> jax.Array:
  """[R, n] bool -> [R, ceil(n / 32)] uint32, position 0 in the lowest bit."""
  R, n = mask.shape
  if platform.current().platform == 'tpu':
    return _pack_by_product(mask)[:, : -(-n // BITS)]
  mask = jnp.pad(mask, ((0, 0), (0, -n % BITS))).reshape(R, -1, 8)
  packed = jnp.zeros(mask.shape[:2], jnp.uint8)
  for bit in range(8):
    packed = packed | (mask[:, :, bit].astype(jnp.uint8) << bit)
  return lax.bitcast_convert_type(packed.reshape(R, -1, 4), jnp.uint32)


def sizes(words: jax.Array) -> jax.Array:
  """How many bits of each word are set, int32."""
  return lax.population_count(words).astype(jnp.int32)


def total(words: jax.Array) -> jax.Array:
  """[R, words] -> how many positions of each row, int32 [R]."""
  return sizes(words).sum(-1)


def compact(words: jax.Array, width: int, filler: int) -> jax.Array:
  """The first `width` positions of each row, ascending.

  Args:
    words: [R, words].
    width: columns of the result.
    filler: what stands behind the last position.

  Returns:
    int32 [R, width].
  """
  end = jnp.cumsum(sizes(words), -1)
  find = _find_by_scatter
  if platform.current().platform == 'tpu':
    find = _find_by_product
  word, bits, first = find(words, end, width)
  slots = jnp.arange(width, dtype=jnp.int32)[None]
  position = word * BITS + nth_bit(bits, slots - first)
  return jnp.where(slots < end[:, -1:], position, filler)


def nth_position(words: jax.Array, rank: jax.Array) -> jax.Array:
  """Position of the set bit number `rank` [R], from 0, of each row; int32.

  Anything for a rank that is negative or too large.
  """
  end = jnp.cumsum(sizes(words), -1)
  word = (end <= rank[:, None]).sum(-1, dtype=jnp.int32)[:, None]
  word = jnp.minimum(word, words.shape[1] - 1)
  bits = jnp.take_along_axis(words, word, 1)
  first = jnp.take_along_axis(end - sizes(words), word, 1)
  return (word * BITS + nth_bit(bits, rank[:, None] - first))[:, 0]


def nth_bit(words: jax.Array, rank: jax.Array) -> jax.Array:
  """Index of the set bit number `rank`, from 0; some index if there is none."""
  index = jnp.zeros_like(rank)
  for half in (16, 8, 4, 2, 1):
    lower = (words >> index.astype(jnp.uint32)) & jnp.uint32((1 << half) - 1)
    below = sizes(lower)
    index = jnp.where(rank >= below, index + half, index)
    rank = jnp.where(rank >= below, rank - below, rank)
  return index


def _pack_by_product(mask):
  """Sixteen powers of two add up exactly in f32, and each is exact in bf16."""
  R, n = mask.shape
  mask = jnp.pad(mask, ((0, 0), (0, -n % LANES))).reshape(R, -1, LANES)
  lane = jnp.arange(LANES)[:, None]
  half = jnp.arange(LANES // 16)[None]
  powers = jnp.where(lane // 16 == half, 2.0 ** (lane % 16), 0.0)
  halves = jnp.einsum(
    'RcL,Lh->hRc',
    mask.astype(jnp.float32),
    powers,
    precision=lax.Precision.DEFAULT,
  ).astype(jnp.uint32)
  words = halves[0::2] | (halves[1::2] << 16)
  return words.transpose(1, 2, 0).reshape(R, -1)


def _find_by_scatter(words, end, width):
  """Of the survivor of each slot: its word's index, bits and first slot.

  The word is the last one that starts at or before the slot, so its index is
  the number of those minus one: a histogram of the starts and its prefix sum.
  """
  R = len(words)
  start = end - sizes(words)
  row = jnp.arange(R, dtype=jnp.int32)[:, None] * (width + 1)
  at = (row + jnp.minimum(start, width)).reshape(-1)
  starts = jnp.zeros(R * (width + 1), jnp.int32)
  starts = starts.at[at].add(
    1, mode='promise_in_bounds', indices_are_sorted=True
  )
  word = jnp.cumsum(starts.reshape(R, -1)[:, :width], -1) - 1
  bits = jnp.take_along_axis(words, word, 1, mode='promise_in_bounds')
  first = jnp.take_along_axis(start, word, 1, mode='promise_in_bounds')
  return word, bits, first


def _find_by_product(words, end, width):
  """As `_find_by_scatter`, without a gather.

  Four words are a group. A matrix of 0 and 1 says which group holds which
  slot; its product with the bytes of the groups' words is exact in bf16, as
  every sum has one term.
  """
  R = len(words)
  words = jnp.pad(words, ((0, 0), (0, -words.shape[1] % 4)))
  # By the last end: below, a group ends where its fourth word does.
  end = jnp.pad(end, ((0, 0), (0, -end.shape[1] % 4)), mode='edge')
  words, end = words.reshape(R, -1, 4), end.reshape(R, -1, 4)
  start = end - sizes(words)
  slots = jnp.arange(width, dtype=jnp.int32)[None, None]
  holds = (start[..., :1] <= slots) & (slots < end[..., 3:])
  index = jnp.arange(words.shape[1], dtype=jnp.uint32)[None, :, None]
  index = jnp.broadcast_to(index, (R, words.shape[1], 1))
  table = jnp.concatenate([words, start.astype(jnp.uint32), index], -1)
  byte = 8 * jnp.arange(4, dtype=jnp.uint32)
  table = (table[..., None] >> byte.reshape(1, 1, 1, 4)) & 255
  of_slot = jnp.einsum(
    'Rcs,Rcwb->wbRs',
    holds.astype(jnp.float32),
    table.astype(jnp.float32),
    precision=lax.Precision.DEFAULT,
  ).astype(jnp.uint32)
  of_slot = (of_slot << byte.reshape(1, 4, 1, 1)).sum(1, dtype=jnp.uint32)
  first = of_slot[4:8].astype(jnp.int32)
  later = [first[i] <= slots[0] for i in (1, 2, 3)]

  def pick(choices):
    chosen = choices[0]
    for late, choice in zip(later, choices[1:], strict=True):
      chosen = jnp.where(late, choice, chosen)
    return chosen

  word = 4 * of_slot[8].astype(jnp.int32) + sum(x.astype(int) for x in later)
  return word, pick(of_slot[:4]), pick(first)
