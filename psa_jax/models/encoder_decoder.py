"""Encoder and decoder: a Transformer that reads one text and writes another.

As in arXiv 1706.03762, with this package's blocks: pre-norm, rotary positions
in every attention, one embedding for both texts. A decoder layer is

  x = x + SelfAttention(Norm(x))
  x = x + CrossAttention(Norm(x), memory)
  x = x + FeedForward(Norm(x))

with the encoder's normalised output as memory. All three kinds of attention
follow `attention.name`, `dense` or `topk`. `num_layers` layers each.

`start` and `advance` decode with a cache: keys and values of the memory are
made once a text, whatever the number of hypotheses that read them.

Not done: quantised training, other mechanisms.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from psa_jax.attention.context import AttentionContext
from psa_jax.attention.cross import CrossAttention, KeyValues
from psa_jax.attention.layer import Cache
from psa_jax.attention.projections import head_dim
from psa_jax.attention.rotary import Rotary, rotary
from psa_jax.config import ModelConfig
from psa_jax.models import stack
from psa_jax.models.blocks import Block, normalise, remat
from psa_jax.models.cascade import PADDING
from psa_jax.models.drop import Drop, drops, leave_out
from psa_jax.models.output import TABLE, Output
from psa_jax.models.transformer import ModelOut
from psa_jax.norm import Norm, gamma


class DecoderBlock(Block):
  """A block with cross-attention between its two halves."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    """Creates all three parts and the norm in front of each."""
    super().__init__(config, rngs=rngs)
    dtype = jnp.dtype(config.param_dtype)
    self.cross_norm = Norm(
      config.d_model, config.norm, param_dtype=dtype, rngs=rngs
    )
    self.cross = CrossAttention(config, rngs=rngs)

  def read(
    self,
    x: Float[Array, 'B T D'],
    memory: Float[Array, 'B S D'],
    lengths: Int[Array, 'B'],
    *,
    source_rope: Rotary,
    context: AttentionContext,
    drop: Drop | None,
  ) -> tuple[Float[Array, 'B T D'], dict[str, jax.Array]]:
    """The new residual stream of a whole text, and attention's scalars."""
    normed = normalise(self.attention_norm, x, context)
    attended, aux = self.attention(normed, context=context)
    x = x + leave_out(drop, attended, 0, self.config)
    cross_kv = self.cross.project_kv(memory, lengths, source_rope)
    attended, cross_aux = self.cross(
      normalise(self.cross_norm, x, context), cross_kv, context=context
    )
    x = x + leave_out(drop, attended, 2, self.config)
    fed = self.mlp(normalise(self.mlp_norm, x, context))
    return x + leave_out(drop, fed, 1, self.config), aux | cross_aux

  def extend(
    self,
    x: Float[Array, 'B W D'],
    cache: Cache,
    memory: KeyValues,
    *,
    at: Int[Array, ''],
    context: AttentionContext,
  ) -> tuple[Float[Array, 'B W D'], Cache]:
    """`read` of one more token of each of W hypotheses a row.

    Args:
      x: their residual streams.
      cache: of B * W texts.
      memory: of B texts, for all of their hypotheses.
      at: place of the token.
      context: step, and the rotary table of the place.
    """
    rows = x.reshape(-1, 1, x.shape[-1])
    attended, cache = self.attention.decode(
      normalise(self.attention_norm, rows, context),
      cache,
      at=at,
      context=context,
    )
    x = x + attended.reshape(x.shape)
    attended, _ = self.cross(
      normalise(self.cross_norm, x, context), memory, context=context
    )
    x = x + attended
    return x + self.mlp(normalise(self.mlp_norm, x, context)), cache


class Decoding(NamedTuple):
  """Hypotheses in progress.

  Attributes:
    caches: of every layer; [L, B * W, T, K, H].
    memories: of every layer; [L, B, S, K, H].
  """

  caches: Cache
  memories: KeyValues


class EncoderDecoder(Output):
  """Two stacks over one vocabulary.

  Attributes:
    embedding: [V, D], for both texts.
    encoder_layers, layers: one block each whose arrays have a leading axis L.
    encoder_norm, final_norm: after the last block of each.
  """

  def __init__(self, config: ModelConfig, vocab_size: int, *, rngs: nnx.Rngs):
    """Creates the parameters; errors as in `Transformer`."""
    dtype = jnp.dtype(config.param_dtype)
    shape = (config.vocab_size or vocab_size, config.d_model)
    self.config, self.head_dim = config, head_dim(config)
    self.embedding = nnx.Param(TABLE(rngs.params(), shape, dtype))

    def norm():
      return Norm(config.d_model, config.norm, param_dtype=dtype, rngs=rngs)

    self.encoder_layers = stack.make_layers(config, rngs=rngs)
    self.encoder_norm = norm()
    make = nnx.vmap(lambda rngs: DecoderBlock(config, rngs=rngs))
    self.layers = make(rngs.split(config.num_layers))
    self.final_norm = norm()
    self.make_output(rngs=rngs)

  def __call__(
    self,
    tokens: Int[Array, 'B T'],
    *,
    source: Int[Array, 'B S'],
    source_ids: Int[Array, 'B S'],
    context: AttentionContext,
  ) -> ModelOut:
    """Reads both texts, up to the final norm.

    Args:
      tokens: of the translation, from its beginning; what is past its end is
        seen by nothing before it.
      source: of the text to translate; padding comes last.
      source_ids: 1 where there is text, 0 where there is padding.
      context: step, and the mask of the decoder's norm statistics.
    """
    memory, aux = self.encode(source, source_ids, context=context)
    lengths = (source_ids != PADDING).sum(1)
    graphdef, params, stats = nnx.split(self.layers, nnx.Param, nnx.BatchStat)
    train = context.train
    source_rope = self._rope(jnp.arange(source.shape[1]))
    context = dataclasses.replace(
      context, rope=self._rope(jnp.arange(tokens.shape[1])), causal=True
    )

    def layer(x, inputs):
      arrays, drop = inputs
      block = nnx.merge(graphdef, *arrays)
      x, aux = block.read(
        x,
        memory,
        lengths,
        source_rope=source_rope,
        context=context,
        drop=drop,
      )
      stats = nnx.as_pure(nnx.state(block, nnx.BatchStat)) if train else None
      return x, (stats, aux)

    scan = self.config.scan_layers
    layer = remat(layer, self.config.remat, in_scan=scan)
    loop = jax.lax.scan if scan else stack.unrolled
    arrays = nnx.as_pure((params, stats))
    drop = drops(self.config, context.step, train=train, stack=1)
    x, (stats, scalars) = loop(layer, self._embed(tokens), (arrays, drop))
    if train:
      nnx.update(self.layers, stats)
    means = {name: jnp.mean(values) for name, values in scalars.items()}
    # Of both self-attentions: a token of either text counts once.
    means['density'] = (means['density'] + aux['density']) / 2
    if self.config.norm.kind == 'prepbn':
      means['gamma'] = gamma(self.config.norm, context.step)
    return ModelOut(normalise(self.final_norm, x, context), means)

  def encode(
    self,
    source: Int[Array, 'B S'],
    source_ids: Int[Array, 'B S'],
    *,
    context: AttentionContext,
  ) -> tuple[Float[Array, 'B S D'], dict[str, jax.Array]]:
    """The memory, and the encoder's scalars."""
    context = dataclasses.replace(
      context,
      rope=self._rope(jnp.arange(source.shape[1])),
      segment_ids=source_ids,
      mask=source_ids != PADDING,
      causal=False,
    )
    x, aux = stack.apply_layers(
      self.encoder_layers, self.config, self._embed(source), context=context
    )
    return normalise(self.encoder_norm, x, context), aux

  def start(
    self,
    source: Int[Array, 'B S'],
    source_ids: Int[Array, 'B S'],
    *,
    hypotheses: int,
    length: int,
    context: AttentionContext,
  ) -> Decoding:
    """Reads the texts; room for so many hypotheses of `length` tokens each."""
    memory, _ = self.encode(source, source_ids, context=context)
    lengths = (source_ids != PADDING).sum(1)
    graphdef, state = nnx.split(self.layers)

    rope = self._rope(jnp.arange(source.shape[1]))

    def project_kv(arrays):
      layer = nnx.merge(graphdef, arrays)
      return layer.cross.project_kv(memory, lengths, rope)

    memories = jax.lax.map(project_kv, nnx.as_pure(state))
    L, B, _, K, H = memories.k.shape
    empty = jnp.zeros((L, B * hypotheses, length, K, H), memories.k.dtype)
    return Decoding(Cache(empty, empty), memories)

  def advance(
    self,
    decoding: Decoding,
    tokens: Int[Array, 'B W'],
    at: Int[Array, ''],
    *,
    context: AttentionContext,
  ) -> tuple[Float[Array, 'B W V'], Decoding]:
    """Logits after one more token of every hypothesis; f32."""
    graphdef, state = nnx.split(self.layers)
    context = dataclasses.replace(context, rope=self._rope(at[None]))

    def layer(x, arrays):
      state, cache, memory = arrays
      block = nnx.merge(graphdef, state)
      return block.extend(x, cache, memory, at=at, context=context)

    x, caches = jax.lax.scan(
      layer, self._embed(tokens), (nnx.as_pure(state), *decoding)
    )
    hidden = normalise(self.final_norm, x, context)
    return self.unembed(hidden), Decoding(caches, decoding.memories)

  def _embed(self, tokens: Int[Array, 'B T']) -> Float[Array, 'B T D']:
    """Looks tokens up; NaN for an id outside the vocabulary."""
    rows = jnp.take(self.embedding[...], tokens, axis=0, mode='fill')
    return rows.astype(self.config.compute_dtype)

  def _rope(self, positions: Int[Array, 'T']) -> Rotary:
    return rotary(
      positions[None], head_dim=self.head_dim, theta=self.config.rope_theta
    )
