"""Decoder-only language model: a causal Transformer with tied output.

The embedding table is the output matrix too: its first logits lie at 0.5
around 0, so the first loss is near ln V, and a token's own logit does not
dominate.

Not done: decoding with a cache, and losses (they never hold all logits at
once, see `train.losses`).
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from psa_jax.models.transformer import Transformer


class DecoderLM(Transformer):
  """A causal Transformer; `embedding` is read by `embed` and `unembed`."""

  causal = True

  def unembed(self, hidden: Float[Array, '*B D']) -> Float[Array, '*B V']:
    """Returns f32 logits: products in the compute dtype, sums in f32."""
    dtype = self.config.compute_dtype
    rows = hidden.astype(dtype).reshape(-1, hidden.shape[-1])
    logits = jnp.einsum(
      'BD,VD->BV',
      rows,
      self.embedding[...].astype(dtype),
      preferred_element_type=jnp.float32,
    )
    return logits.reshape(*hidden.shape[:-1], -1)
