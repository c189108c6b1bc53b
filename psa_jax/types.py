"""The letters of the code base and the few array aliases shared by all of it.

The letters are those of `jax.nn.dot_product_attention`; einsum strings and
jaxtyping annotations use them everywhere:

  B  batch            T  query length      S  key length
  N  query heads      K  kv heads          G  group, N // K
  H  head dim         D  model dim         F  mlp dim
  V  vocabulary       L  layers            M  width of a block list
"""

from typing import NamedTuple

import jax
from jaxtyping import Array, Float

Scalar = jax.Array | float | int


class AttnOut(NamedTuple):
  """What an attention mechanism returns.

  Attributes:
    out: [B, T, N, Hv] attention output in the dtype of `v`.
    aux: f32 scalars that the trainer logs, averaged over layers. Every
      mechanism reports `density`: key-query pairs it reads as a share of the
      causally visible ones.
  """

  out: Float[Array, 'B T N Hv']
  aux: dict[str, jax.Array]
