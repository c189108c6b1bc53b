"""Bidirectional encoder: a Transformer whose tokens all see each other.

Every token sees every other one of its document. Positions are rotary, so
nothing is added to the embedding and there is no special first token; `pool`
takes the mean of the tokens.

A head of `classes` outputs reads the mean of a text (`classify`) or every token
(`label`).

Padding is what has segment id 0: no token reads it, it counts in no norm
statistics and in no mean, and cascade pruning drops it first. Without segment
ids every token is text.

Not done: segment (sentence A, sentence B) embeddings.
"""

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from psa_jax.attention.context import AttentionContext
from psa_jax.config import ModelConfig
from psa_jax.models.cascade import PADDING
from psa_jax.models.transformer import ModelOut, Transformer


class Encoder(Transformer):
  """A bidirectional Transformer.

  Attributes:
    head: [D, classes], zero-initialised, and head_bias; None without
      classes.
  """

  causal = False

  def __init__(
    self,
    config: ModelConfig,
    vocab_size: int,
    *,
    classes: int = 0,
    rngs: nnx.Rngs,
  ):
    """See `Transformer`; `classes` is the size of the head, 0 for none."""
    super().__init__(config, vocab_size, rngs=rngs)
    head = bias = None
    if classes:
      dtype = jnp.dtype(config.param_dtype)
      head = nnx.Param(jnp.zeros((config.d_model, classes), dtype))
      bias = nnx.Param(jnp.zeros((classes,), dtype))
    self.head, self.head_bias = head, bias

  def __call__(
    self,
    tokens: Int[Array, 'B T'],
    *,
    context: AttentionContext,
    positions: Int[Array, 'B T'] | None = None,
  ) -> ModelOut:
    """Runs the model up to the final norm; see `Transformer`.

    Args:
      tokens: ids.
      context: `segment_ids` are documents in runs, from 1; 0 is padding. None
        is one document a row, without padding. Without a `mask`, what is not
        padding counts in norm statistics.
      positions: see `Transformer`.
    """
    if context.mask is None and context.segment_ids is not None:
      mask = context.segment_ids != PADDING
      context = dataclasses.replace(context, mask=mask)
    return super().__call__(tokens, context=context, positions=positions)

  def classify(
    self,
    hidden: Float[Array, 'B T D'],
    segment_ids: Int[Array, 'B T'] | None = None,
  ) -> Float[Array, 'B V']:
    """Logits of every text in f32, from what `__call__` gives."""
    return self.label(pool(hidden, segment_ids)[:, None])[:, 0]

  def label(self, hidden: Float[Array, 'B W D']) -> Float[Array, 'B W V']:
    """Logits of every token in f32.

    Raises:
      ValueError: a model without a head.
    """
    if self.head is None or self.head_bias is None:
      raise ValueError('this encoder has no head; build it with classes')
    head = self.head[...].astype(jnp.float32)
    bias = self.head_bias[...].astype(jnp.float32)
    return hidden.astype(jnp.float32) @ head + bias[None, None]


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
