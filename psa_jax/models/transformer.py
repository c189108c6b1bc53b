"""What every Transformer is: an embedding, L blocks, a final norm.

`Backbone` is the last two; `Transformer` reads tokens of a vocabulary.

The running statistics that the layers moved are written to the module; a
caller under `jax.jit` has to return them in turn (see `stack.py`).
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from psa_jax.attention.context import AttentionContext
from psa_jax.attention.projections import head_dim
from psa_jax.attention.rotary import rotary
from psa_jax.config import ConfigError, ModelConfig
from psa_jax.models import stack
from psa_jax.models.blocks import normalise
from psa_jax.models.output import TABLE
from psa_jax.norm import Norm, gamma


class ModelOut(NamedTuple):
  """What a model returns.

  Attributes:
    hidden: [B, T, D] after the final norm, for `unembed`.
    aux: f32 scalars averaged over layers, at least attention's `density`;
      with PRepBN also the `gamma` that this step used.
  """

  hidden: Float[Array, 'B T D']
  aux: dict[str, jax.Array]


class Backbone(nnx.Module):
  """Blocks and final norm; a subclass says who sees whom.

  Attributes:
    causal: whether a token sees only what is before it.
    layers: one `Block` whose arrays have a leading axis of length L.
    final_norm: norm after the last block.
  """

  causal: bool

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    """Creates the parameters.

    Raises:
      ConfigError: heads that do not fit.
    """
    self.config = config
    self.head_dim = head_dim(config)
    self.layers = stack.make_layers(config, rngs=rngs)
    self.final_norm = Norm(
      config.d_model,
      config.norm,
      param_dtype=jnp.dtype(config.param_dtype),
      rngs=rngs,
    )

  def forward(
    self, x: Float[Array, 'B T D'], *, context: AttentionContext
  ) -> ModelOut:
    """Runs embedded tokens through the blocks and the final norm.

    Args:
      x: embedded tokens.
      context: what varies by call; whether it is causal is the model's to say.
    """
    context = dataclasses.replace(context, causal=self.causal)
    x, aux = stack.apply_layers(self.layers, self.config, x, context=context)
    if self.config.norm.kind == 'prepbn':
      aux['gamma'] = gamma(self.config.norm, context.step)
    return ModelOut(normalise(self.final_norm, x, context), aux)


class Transformer(Backbone):
  """A Transformer over tokens of a vocabulary.

  Attributes:
    embedding: [V, D], read by `embed`.
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
    shape = (config.vocab_size or vocab_size, config.d_model)
    dtype = jnp.dtype(config.param_dtype)
    self.embedding = nnx.Param(TABLE(rngs.params(), shape, dtype))
    super().__init__(config, rngs=rngs)

  def __call__(
    self,
    tokens: Int[Array, 'B T'],
    *,
    context: AttentionContext,
    positions: Int[Array, 'B T'] | None = None,
  ) -> ModelOut:
    """Runs the model up to the final norm.

    Args:
      tokens: ids; one outside the vocabulary gives NaN.
      context: step, documents, mask and budget; its rotary table is made here.
      positions: rotary positions; None counts from 0 in every row.

    Raises:
      ValueError: companions whose shape is not that of `tokens`.
    """
    for name, companion in (
      ('positions', positions),
      ('segment_ids', context.segment_ids),
      ('mask', context.mask),
    ):
      if companion is not None and companion.shape != tokens.shape:
        raise ValueError(
          f'{name} {companion.shape} must have the shape of tokens '
          f'{tokens.shape}'
        )
    if positions is None:
      positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    rope = rotary(
      positions, head_dim=self.head_dim, theta=self.config.rope_theta
    )
    return self.forward(
      self.embed(tokens), context=dataclasses.replace(context, rope=rope)
    )

  def embed(self, tokens: Int[Array, 'B T']) -> Float[Array, 'B T D']:
    """Looks tokens up; NaN for an id outside the vocabulary."""
    rows = jnp.take(self.embedding[...], tokens, axis=0, mode='fill')
    return rows.astype(self.config.compute_dtype)
