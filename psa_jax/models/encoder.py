"""Bidirectional encoder: embedding, L pre-norm blocks, a vector a row.

The blocks are those of the decoder LM with every token seeing every other one
of its document. Positions are rotary, so nothing is added to the embedding and
there is no special first token; `pool` takes the mean of the tokens.

Padding is what has segment id 0: no token reads it, it counts in no norm
statistics and in no mean, and cascade pruning drops it first. Without segment
ids every token is text.

Not done: segment (sentence A, sentence B) embeddings, and losses.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Shaped

from psa_jax.attention.projections import fan_in, head_dim
from psa_jax.attention.rotary import rotary
from psa_jax.config import ConfigError, ModelConfig
from psa_jax.models import stack
from psa_jax.models.cascade import PADDING
from psa_jax.models.decoder_lm import ModelOut
from psa_jax.norm import Norm, gamma
from psa_jax.types import Scalar


class Encoder(nnx.Module):
  """A bidirectional Transformer.

  Attributes:
    embedding: [V, D].
    layers: one `Block` whose arrays have a leading axis of length L.
    final_norm: norm after the last block.
  """

  def __init__(self, config: ModelConfig, vocab_size: int, *, rngs: nnx.Rngs):
    """Creates the parameters.

    Args:
      config: the model.
      vocab_size: V of the tokenizer; `config.vocab_size` overrides it.
      rngs: the stream `params` draws the initial values.

    Raises:
      ConfigError: heads that do not fit, or a vocabulary that does not hold
        the tokenizer's.
    """
    if vocab_size < 1 or 0 < config.vocab_size < vocab_size:
      raise ConfigError(
        f'model.vocab_size={config.vocab_size} cannot hold the {vocab_size} '
        'ids of the tokenizer; set it to 0'
      )
    self.config = config
    self.head_dim = head_dim(config)
    dtype = jnp.dtype(config.param_dtype)
    shape = (config.vocab_size or vocab_size, config.d_model)
    self.embedding = nnx.Param(
      fan_in(1, 0, scale=0.25)(rngs.params(), shape, dtype)
    )
    self.layers = stack.make_layers(config, rngs=rngs)
    self.final_norm = Norm(
      config.d_model, config.norm, param_dtype=dtype, rngs=rngs
    )

  def __call__(
    self,
    tokens: Int[Array, 'B T'],
    *,
    step: Scalar,
    positions: Int[Array, 'B T'] | None = None,
    segment_ids: Int[Array, 'B T'] | None = None,
    mask: Shaped[Array, 'B T'] | None = None,
    train: bool,
    mechanism: str | None = None,
  ) -> ModelOut:
    """Runs the model up to the final norm.

    Args:
      tokens: ids; one outside the vocabulary gives NaN.
      step: optimiser step, which drives every schedule.
      positions: rotary positions; None counts from 0 in every row.
      segment_ids: documents in runs, from 1; 0 is padding. None is one
        document a row, without padding.
      mask: tokens that count in norm statistics; None counts all that are not
        padding.
      train: move running statistics and follow the training schedules.
      mechanism: overrides the configured attention mechanism.

    Raises:
      ValueError: companions whose shape is not that of `tokens`.
    """
    for name, companion in (
      ('positions', positions),
      ('segment_ids', segment_ids),
      ('mask', mask),
    ):
      if companion is not None and companion.shape != tokens.shape:
        raise ValueError(
          f'{name} {companion.shape} must have the shape of tokens '
          f'{tokens.shape}'
        )
    if positions is None:
      positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    if mask is None and segment_ids is not None:
      mask = segment_ids != PADDING
    x, aux = stack.apply_layers(
      self.layers,
      self.config,
      self.embed(tokens),
      step=step,
      rope=rotary(
        positions, head_dim=self.head_dim, theta=self.config.rope_theta
      ),
      segment_ids=segment_ids,
      mask=mask,
      train=train,
      mechanism=mechanism,
      causal=False,
    )
    if self.config.norm.kind == 'prepbn':
      aux['gamma'] = gamma(self.config.norm, step)
    hidden = self.final_norm(x, step=step, train=train, mask=mask)
    return ModelOut(hidden, aux)

  def embed(self, tokens: Int[Array, 'B T']) -> Float[Array, 'B T D']:
    """Looks tokens up; NaN for an id outside the vocabulary."""
    rows = jnp.take(self.embedding[...], tokens, axis=0, mode='fill')
    return rows.astype(self.config.compute_dtype)


def pool(
  hidden: Float[Array, 'B T D'],
  segment_ids: Int[Array, 'B T'] | None = None,
) -> Float[Array, 'B D']:
  """Mean of the tokens of every row in f32; 0 for a row of padding.

  Args:
    hidden: output of the encoder.
    segment_ids: 0 is padding; None has none.
  """
  hidden = hidden.astype(jnp.float32)
  if segment_ids is None:
    return hidden.mean(1)
  real = segment_ids != PADDING
  total = jnp.where(real[..., None], hidden, 0).sum(1)
  return total / jnp.maximum(real.sum(1), 1)[:, None]
