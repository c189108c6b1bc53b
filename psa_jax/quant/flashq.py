"""FlashQ: keys and values in 8, then 4 or 2 bits, packed.

TurboAttention, arXiv 2412.08585. A block of tokens of one head is stored in two
stages:

1. symmetric INT8 with one f32 scale a block, x = scale * y, |y| <= 119;
2. asymmetric INT4 or INT2 with an integer step and zero for each channel,
   y = step * code + zero, in integer arithmetic both ways.

Why 119: with n = 2^bits - 1 and step = ceil(range / n) a restored value exceeds
the largest one by at most min(n - 1, step / 2), which is 8 for 4 bits (steps
reach 16) and 2 for 2 bits. So what is restored always fits an int8.

Heads of low priority take 2 bits, the others 4. Priority is the range of the
head's values times the standard deviation, over channels, of the channels'
ranges: a head with outlier channels loses most. How many heads are low is
static, so that the buffers are really smaller; which ones is an array.

The paper's body could not be read in full: 119, the buffer's shared scale (see
`flashq_cache.py`) and the priority follow secondary sources. Not done: integer
products with queries and probabilities.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int8, UInt8

LIMIT = 119
HIGH, LOW = 4, 2  # bits


class Heads(NamedTuple):
  """Which head lies where; made from a sample by `calibrate`.

  Attributes:
    order: kv heads by falling priority; the last ones are stored in 2 bits.
    scale: f32 scale of tokens that wait in the buffer, of head `order[i]`.
  """

  order: Int[Array, 'K']
  scale: Float[Array, 'K']


class Packed(NamedTuple):
  """Blocks of heads of one width.

  Attributes:
    codes: 8 / bits tokens a byte; byte i of a block of n bytes holds the
      tokens i, i + n, ... from its lowest bits up.
    step: of each channel of a block.
    zero: likewise, the smallest value.
    scale: of each block.
  """

  codes: UInt8[Array, 'B K blocks n H']
  step: UInt8[Array, 'B K blocks H']
  zero: Int8[Array, 'B K blocks H']
  scale: Float[Array, 'B K blocks']


def priority(x: Float[Array, 'B T K H']) -> Float[Array, 'K']:
  """How much each head would lose in 2 bits, from sampled keys or values."""
  x = x.astype(jnp.float32)
  low, high = x.min((0, 1)), x.max((0, 1))
  return (high.max(-1) - low.min(-1)) * jnp.std(high - low, axis=-1)


def calibrate(x: Float[Array, 'B T K H']) -> Heads:
  """Ranks the heads of sampled keys or values and takes their scales."""
  order = jnp.argsort(-priority(x), stable=True).astype(jnp.int32)
  top = jnp.abs(x.astype(jnp.float32)).max((0, 1, 3))
  return Heads(order, _scale(top)[order])


def to_int8(
  x: Float[Array, '*S'], scale: Float[Array, '*#S']
) -> Int8[Array, '*S']:
  """The first stage at a given scale, of the shape of `x` or with axes of 1.

  What the scale does not reach is clamped.
  """
  y = jnp.round(x.astype(jnp.float32) / scale)
  return jnp.clip(y, -LIMIT, LIMIT).astype(jnp.int8)


def stage_one(
  x: Float[Array, '*S block H'],
) -> tuple[Int8[Array, '*S block H'], Float[Array, '*S']]:
  """Symmetric INT8 with a scale for each block."""
  scale = _scale(jnp.abs(x.astype(jnp.float32)).max((-2, -1)))
  return to_int8(x, scale[..., None, None]), scale


def _scale(top):
  # NaN of what is not finite, for integers cannot say it.
  return jnp.where(top == 0, 1, top / LIMIT)


def stage_two(
  y: Int8[Array, '*S block H'], *, bits: int
) -> tuple[UInt8[Array, '*S n H'], UInt8[Array, '*S H'], Int8[Array, '*S H']]:
  """Packed codes, step and zero of each channel; integers throughout."""
  wide, most = y.astype(jnp.int32), 2**bits - 1
  zero = wide.min(-2)
  spread = wide.max(-2) - zero
  step = jnp.maximum((spread + most - 1) // most, 1)
  above, twice = wide - zero[..., None, :], 2 * step[..., None, :]
  codes = (2 * above + step[..., None, :]) // twice  # round half up
  packed = pack(codes.astype(jnp.uint8), bits=bits)
  return packed, step.astype(jnp.uint8), zero.astype(jnp.int8)


def restore(
  codes: UInt8[Array, '*S n H'],
  step: UInt8[Array, '*S H'],
  zero: Int8[Array, '*S H'],
  *,
  bits: int,
) -> Int8[Array, '*S block H']:
  """The INT8 block of packed codes; integers throughout."""
  codes = unpack(codes, bits=bits).astype(jnp.int16)
  step, zero = (x.astype(jnp.int16)[..., None, :] for x in (step, zero))
  return (codes * step + zero).astype(jnp.int8)


def pack(
  codes: UInt8[Array, '*S block H'], *, bits: int
) -> UInt8[Array, '*S n H']:
  """8 / bits tokens a byte; the block is a multiple of that."""
  parts = jnp.split(codes, 8 // bits, axis=-2)
  packed = jnp.zeros_like(parts[0])
  for i, part in enumerate(parts):
    packed = packed | jnp.left_shift(part, bits * i)
  return packed


def unpack(
  packed: UInt8[Array, '*S n H'], *, bits: int
) -> UInt8[Array, '*S block H']:
  """The inverse of `pack`."""
  mask = 2**bits - 1
  parts = [jnp.right_shift(packed, bits * i) & mask for i in range(8 // bits)]
  return jnp.concatenate(parts, axis=-2)
