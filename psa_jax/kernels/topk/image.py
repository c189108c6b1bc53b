"""The order-preserving integer image of a number's bits.

A float's bits, read as a sign and a magnitude, order as the float does. Turned
into two's complement they order as int32, so a threshold is found by bisection
of integers: at most 32 steps, 16 for 16-bit floats. Floats that count as equal
get one image: -0.0 that of 0.0, every NaN the largest.
"""

import jax
import jax.numpy as jnp
from jax import lax

DTYPES = ('float32', 'bfloat16', 'float16', 'int32')

# Below the image of every float; of int32, that of the smallest number.
LOWEST = -(2**31)


def ordered(x: jax.Array) -> jax.Array:
  """int32 of the same shape, ordered as the entries of `x`, NaN largest."""
  if x.dtype == jnp.int32:
    return x
  bits = _bits(x.dtype)
  largest = 2 ** (bits - 1) - 1
  image = lax.bitcast_convert_type(x, jnp.dtype(f'int{bits}'))
  image = _flip(image.astype(jnp.int32), largest)
  # Both zeros have magnitude 0: the image of -0.0 is -1.
  image = jnp.where(image == -1, 0, image)
  return jnp.where(x != x, largest, image)


def restore(image: jax.Array, dtype) -> jax.Array:
  """The inverse of `ordered`, up to the sign of 0 and the bits of NaN."""
  if dtype == jnp.int32:
    return image
  bits = _bits(dtype)
  image = _flip(image, 2 ** (bits - 1) - 1).astype(jnp.dtype(f'int{bits}'))
  return lax.bitcast_convert_type(image, dtype)


def infinity(dtype) -> jax.Array:
  """+inf, or the largest int32."""
  if dtype == jnp.int32:
    return jnp.array(2**31 - 1, dtype)
  return jnp.array(jnp.inf, dtype)


def middle(low: jax.Array, high: jax.Array) -> jax.Array:
  """ceil((low + high) / 2) of int32 without overflow."""
  apart = low ^ high
  return (low & high) + (apart >> 1) + (apart & 1)


def _bits(dtype):
  return 8 * jnp.dtype(dtype).itemsize


def _flip(image, largest):
  """Sign and magnitude to two's complement and back; negatives only."""
  return image ^ ((image >> 31) & largest)
