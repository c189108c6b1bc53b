"""Keys as two integers, high bits and low bits, and exact products with them.

Symmetric quantisation with a scale for each head of each token, so that no
token's integers depend on later ones. The high part is an arithmetic shift; a
low part that was not read counts as the middle of its range.

Integer products are exact: f32 products where all sums stay below 2^24, int32
ones else.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, UInt

from psa_jax.config import MechanismConfig
from psa_jax.config.fields import OPTIONAL, number
from psa_jax.kernels import softmax

EXACT = 2**24  # integers up to it are exact in f32


@dataclass(frozen=True)
class OnDemandConfig(MechanismConfig):
  """Scores from the high bits of the keys (docs/mechanisms.md#on_demand).

  Attributes:
    high_bits: bits of a key channel that are always read.
    low_bits: bits that are read on demand.
    query_bits: bits of a query channel.
    threshold: a query row whose largest probability is below it reads the low
      bits too; 0 never does, above 1 always.
  """

  high_bits: int = number(6, '[2, 12]')
  low_bits: int = number(4, '[1, 8]')
  query_bits: int = number(12, '[2, 12]')
  threshold: float = number(0.1, OPTIONAL)


class SplitKeys(NamedTuple):
  """Keys as two integers; key = scale * (high * 2^low_bits + low).

  Attributes:
    high: most significant bits, signed.
    low: least significant bits, unsigned.
    scale: f32, one for each head of each token.
  """

  high: Int[Array, 'B S K H']
  low: UInt[Array, 'B S K H']
  scale: Float[Array, 'B S K']


def to_integers(
  x: Float[Array, '*S H'], bits: int
) -> tuple[Int[Array, '*S H'], Float[Array, '*S']]:
  """Symmetric int32 of `bits` bits and the f32 scale of each row of H."""
  most = 2 ** (bits - 1) - 1
  x = x.astype(jnp.float32)
  top = jnp.max(jnp.abs(x), axis=-1)
  # NaN where something is not finite, which integers cannot say.
  scale = jnp.where(top == 0, 1, jnp.where(jnp.isinf(top), jnp.nan, top / most))
  return jnp.round(x / scale[..., None]).astype(jnp.int32), scale


def split(k: Float[Array, 'B S K H'], config: OnDemandConfig) -> SplitKeys:
  """Quantises keys to `high_bits + low_bits` and splits their integers."""
  whole, scale = to_integers(k, config.high_bits + config.low_bits)
  high = jnp.right_shift(whole, config.low_bits)
  low = whole - jnp.left_shift(high, config.low_bits)
  wide = jnp.int8 if config.high_bits <= 8 else jnp.int16
  return SplitKeys(high.astype(wide), low.astype(jnp.uint8), scale)


def join(keys: SplitKeys, config: OnDemandConfig) -> Float[Array, 'B S K H']:
  """The f32 keys that both parts give together."""
  high, low = keys.high.astype(jnp.int32), keys.low.astype(jnp.int32)
  whole = jnp.left_shift(high, config.low_bits) + low
  return whole.astype(jnp.float32) * keys.scale[..., None]


def largest_sum(config, width):
  """The largest value that a sum over H integer products may have.

  Raises:
    ValueError: it leaves int32.
  """
  part = max(2 ** (config.high_bits - 1), 2**config.low_bits - 1)
  most = width * (2 ** (config.query_bits - 1) - 1) * part
  if most >= 2**31:
    raise ValueError(
      f'heads of width {width} with {config.query_bits} query bits and '
      f'{config.high_bits} + {config.low_bits} key bits leave int32; use fewer'
    )
  return most


def _dot(q, k, most):
  """Exact [R, H] x [S, H] -> f32 [R, S] (rounded once above 2^24)."""
  if most <= EXACT:
    q, k = q.astype(jnp.float32), k.astype(jnp.float32)
    return jnp.einsum('rh,sh->rs', q, k, precision=lax.Precision.HIGHEST)
  q, k = q.astype(jnp.int32), k.astype(jnp.int32)
  return softmax.dot('rh,sh->rs', q, k, jnp.int32).astype(jnp.float32)


def scores(
  q: Int[Array, 'R H'],
  q_scale: Float[Array, 'R'],
  high: Int[Array, 'S H'],
  low: UInt[Array, 'S H'] | None,
  k_scale: Float[Array, 'S'],
  *,
  config: OnDemandConfig,
) -> Float[Array, 'R S']:
  """Scores of one head; without `low` by the high bits alone.

  Args:
    q: integer queries.
    q_scale: their scales, with the factor on the scores in them.
    high: high parts of the keys.
    low: low parts, or None.
    k_scale: scales of the keys.
    config: bits.
  """
  most = largest_sum(config, q.shape[-1])
  s = _dot(q, high, most) * 2.0**config.low_bits
  if low is None:
    middle = (2**config.low_bits - 1) / 2
    s = s + middle * q.sum(-1).astype(jnp.float32)[:, None]
  else:
    s = s + _dot(q, low, most)
  return s * q_scale[:, None] * k_scale[None]
