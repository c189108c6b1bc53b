"""Decoder-only language model: a causal Transformer with an output matrix.

The embedding table is the output matrix too, unless `tie_embeddings` is off:
its first logits lie at 0.5 around 0, so the first loss is near ln V, and a
token's own logit does not dominate.

Not done: decoding with a cache, and losses (they never hold all logits at
once, see `train.losses`).
"""

from flax import nnx

from psa_jax.config import ModelConfig
from psa_jax.models.output import Output
from psa_jax.models.transformer import Transformer


class DecoderLM(Transformer, Output):
  """A causal Transformer over a vocabulary."""

  causal = True

  def __init__(self, config: ModelConfig, vocab_size: int, *, rngs: nnx.Rngs):
    """See `Transformer`."""
    super().__init__(config, vocab_size, rngs=rngs)
    self.make_output(rngs=rngs)
