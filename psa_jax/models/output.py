"""The output matrix of a model that predicts tokens."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from psa_jax.attention.projections import bias_of, fan_in
from psa_jax.config import ModelConfig

# Initial values of the table: entries start with a standard deviation of
# 0.5 / sqrt(D), so that the blocks outweigh the embedding in the residual
# stream and, where it is the output matrix too, logits start at 0.5 around 0.
TABLE = fan_in(1, 0, scale=0.25)


class Output(nnx.Module):
  """Adds `unembed` to a model that has an `embedding` and a `config`.

  Attributes:
    embedding: [V, D].
    unembedding: [V, D], the output matrix; None where the embedding is.
    unembedding_bias: [V]; None unless `biases` is on.
  """

  config: ModelConfig
  embedding: nnx.Param

  def make_output(self, *, rngs: nnx.Rngs) -> None:
    """Creates the parameters; the embedding is there already."""
    config, shape = self.config, self.embedding.shape
    table = None
    if not config.tie_embeddings:
      dtype = jnp.dtype(config.param_dtype)
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
