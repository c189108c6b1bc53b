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
      visible ones. A scalar named `loss/...` is added to the training loss.
  """

  out: Float[Array, 'B T N Hv']
  aux: dict[str, jax.Array]


class Learned(NamedTuple):
  """What a mechanism's own parameters make of a layer's input.

  Attributes:
    heads: [B, T, heads, ...] arrays that belong to query or kv heads (gates,
      keys of another branch); a mesh splits them as it splits q, k and v.
    tokens: [B, T, ...] arrays that all heads share (an indexer's keys).
    weights: arrays of any shape that hold for every token (a compression
      network, coefficients); whole on every device.
  """

  heads: dict[str, jax.Array] = {}
  tokens: dict[str, jax.Array] = {}
  weights: dict[str, jax.Array] = {}
