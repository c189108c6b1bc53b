"""Decoder-only language model: a causal Transformer with an output matrix.

The embedding table is the output matrix too, unless `tie_embeddings` is off:
its first logits lie at 0.5 around 0, so the first loss is near ln V, and a
token's own logit does not dominate.

Not done: decoding with a cache, and losses (they never hold all logits at
once, see `train.losses`).
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from psa_jax.attention.projections import bias_of
from psa_jax.config import ModelConfig
from psa_jax.models.transformer import TABLE, Transformer


class DecoderLM(Transformer):
  """A causal Transformer over a vocabulary.

  Attributes:
    unembedding: [V, D], the output matrix; None where the embedding is.
    unembedding_bias: [V]; None unless `biases` is on.
  """

  causal = True

  def __init__(self, config: ModelConfig, vocab_size: int, *, rngs: nnx.Rngs):
    """See `Transformer`."""
    super().__init__(config, vocab_size, rngs=rngs)
    shape, dtype = self.embedding.shape, jnp.dtype(config.param_dtype)
    table = None
    if not config.tie_embeddings:
      table = nnx.Param(TABLE(rngs.params(), shape, dtype))
    self.unembedding = table
    self.unembedding_bias = bias_of(config, shape[0])

  def unembed(self, hidden: Float[Array, '*B D']) -> Float[Array, '*B V']:
    """Returns f32 logits: products in the compute dtype, sums in f32."""
    dtype = self.config.compute_dtype
    rows = hidden.astype(dtype).reshape(-1, hidden.shape[-1])
    tied = self.unembedding is None
    table = self.embedding if tied else self.unembedding
    logits = jnp.einsum(
      'BD,VD->BV',
      rows,
      table[...].astype(dtype),
      preferred_element_type=jnp.float32,
    )
    if self.unembedding_bias is not None:
      logits = logits + self.unembedding_bias[...].astype(jnp.float32)[None]
    return logits.reshape(*hidden.shape[:-1], -1)
