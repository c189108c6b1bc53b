"""A Transformer: its sizes, norm, attention and precision."""

from collections.abc import Iterator
from dataclasses import dataclass

from psa_jax.config.attention import AttentionConfig, names
from psa_jax.config.fields import (
  COUNT,
  OPTIONAL,
  POSITIVE,
  PROBABILITY,
  REAL,
  Section,
  choice,
  number,
  section,
)


@dataclass(frozen=True)
class NormConfig(Section):
  """Which normalisation, and how PRepBN moves (docs/mechanisms.md#prepbn).

  Attributes:
    kind: which normalisation every layer uses; `none` is for models whose
      norms are folded into their weights, and no model learns with it.
    base_eps: added to the variance by RMSNorm and LayerNorm, alone or as the
      base of PRepBN. SLAB's vision models have 1e-6.
    bn_eps: added to the variance by the batch norm; theirs is 1e-5.
    momentum: weight of the old running statistics, as in Flax.
    warmup_steps: optimiser steps of pure base norm (gamma = 1) first.
    decay_steps: optimiser steps over which gamma falls from 1 to 0 (`T`).
    statistics: `batch` normalises by the batch in training (in a causal model
      this leaks a little of the future); `running` normalises by the running
      statistics, which the batch only updates.
    base: the norm that PRepBN starts from.
    scale_init, eta_init: initial batch-norm scale and RepBN eta (decoder LM:
      0 and 0; vision: 1 and 1).
  """

  kind: str = choice(
    'rmsnorm', 'rmsnorm', 'layernorm', 'batchnorm', 'repbn', 'prepbn', 'none'
  )
  base_eps: float = number(1e-6, POSITIVE)
  bn_eps: float = number(1e-5, POSITIVE)
  momentum: float = number(0.9, PROBABILITY)
  warmup_steps: int = number(0, OPTIONAL)
  decay_steps: int = number(1000, OPTIONAL)
  statistics: str = choice('batch', 'batch', 'running')
  base: str = choice('rmsnorm', 'rmsnorm', 'layernorm')
  scale_init: float = number(0.0, REAL)
  eta_init: float = number(0.0, REAL)

  def check(self, path: str) -> Iterator[str]:
    """Gamma ends below step 2^31."""
    last = self.warmup_steps + self.decay_steps
    if last >= 2**31:
      yield (
        f'{path}warmup_steps and decay_steps end at step {last}, but steps are '
        'below 2^31'
      )


@dataclass(frozen=True)
class QuantConfig(Section):
  """Progressive quantisation in training (docs/mechanisms.md#quantisation).

  Attributes:
    enabled: quantise q, k and v by the schedule below.
    levels: bits, falling; the last one is the floor.
    warmup_steps: optimiser steps in full precision first.
    quantization_interval: steps that each level lasts.
    granularity: what shares a scale in q, k and v: one `head` of a token, or
      all heads of a `token`.
    weights: also quantise the weights of attention and SwiGLU, with a scale
      an output channel.
    activations: also quantise what these weights multiply, with a scale a
      token.
    eval_bits: bits outside training; 0 means the schedule's at the step being
      evaluated.
  """

  enabled: bool = False
  levels: tuple[int, ...] = number((16, 8, 6, 4), '[2, 16]')
  warmup_steps: int = number(1000, OPTIONAL)
  quantization_interval: int = number(1000, COUNT)
  granularity: str = choice('head', 'head', 'token')
  weights: bool = False
  activations: bool = False
  eval_bits: int = number(0, '0 or [2, 16]', runtime=True)

  def check(self, path: str) -> Iterator[str]:
    """Bits only fall, and the last level is reached below step 2^31."""
    levels = self.levels
    falls = all(a > b for a, b in zip(levels, levels[1:], strict=False))
    if not levels or not falls:
      yield (
        f'{path}levels is {levels}, but it must have an entry and fall strictly'
      )
    last = self.warmup_steps + len(levels) * self.quantization_interval
    if last >= 2**31:
      yield (
        f'{path}warmup_steps and quantization_interval end at step {last}, '
        'but steps are below 2^31'
      )


@dataclass(frozen=True)
class ImageConfig(Section):
  """What a picture is to a vision Transformer.

  Attributes:
    size: rows and columns of pixels.
    channels: numbers a pixel.
    patch: rows and columns of a token; divides `size`.
  """

  size: int = number(28, COUNT)
  channels: int = number(1, COUNT)
  patch: int = number(4, COUNT)


@dataclass(frozen=True)
class ModelConfig(Section):
  """A Transformer.

  Attributes:
    kind: architecture: a causal language model, a bidirectional encoder, a
      vision Transformer, or both of the first two for translation, with
      `num_layers` each.
    image: of `vit`.
    vocab_size: 0 means the tokenizer's.
    biases: linear layers add a bias.
    tie_embeddings: a language model's output matrix is its embedding.
    mlp: `swiglu` (gated), or `gelu`, the two layers of a vision Transformer.
    head_dim: width of one head; 0 means d_model // num_heads.
    dropout, drop_path: rates of what training leaves out (`models/drop.py`).
    remat: `none`; `full` recomputes everything in the backward pass;
      `attention` keeps attention's outputs and recomputes the rest.
    compute_dtype: dtype of matrix products; softmax, norms and
      accumulations stay f32.
  """

  kind: str = choice(
    'decoder_lm', 'decoder_lm', 'encoder', 'vit', 'encoder_decoder'
  )
  num_layers: int = number(2, COUNT)
  d_model: int = number(128, COUNT)
  num_heads: int = number(2, COUNT)
  num_kv_heads: int = number(1, COUNT)
  head_dim: int = number(0, OPTIONAL)
  mlp_dim: int = number(384, COUNT)
  vocab_size: int = number(0, OPTIONAL)
  dropout: float = number(0.0, PROBABILITY)
  drop_path: float = number(0.0, PROBABILITY)
  biases: bool = False
  tie_embeddings: bool = True
  mlp: str = choice('swiglu', 'swiglu', 'gelu')
  rope_theta: float = number(500_000.0, '(1, inf)')
  image: ImageConfig = ImageConfig()
  norm: NormConfig = NormConfig()
  attention: AttentionConfig = section(lambda: AttentionConfig('dense'))
  quant: QuantConfig = QuantConfig()
  compute_dtype: str = choice('float32', 'float32', 'bfloat16')
  param_dtype: str = choice('float32', 'float32', 'bfloat16')
  remat: str = choice('none', 'none', 'full', 'attention')
  scan_layers: bool = True

  @property
  def causal(self) -> bool:
    """Whether a token sees only what is before it, in every attention."""
    return self.kind == 'decoder_lm'

  def check(self, path: str) -> Iterator[str]:
    """Sizes fit each other, and the attention fits the kind of model."""
    yield from self._check_heads(path)
    attention, kind = self.attention, self.kind
    if kind == 'encoder_decoder':
      if not attention.mechanism.reads_cross:
        yield (
          f'{path}attention.name is {attention.name}, but an encoder_decoder '
          f'takes {" or ".join(names(reads_cross=True))}'
        )
      if self.quant.enabled:
        yield f'{path}quant.enabled is on, but an encoder_decoder has none'
    elif attention.mechanism.causal_only and not self.causal:
      yield (
        f'{path}attention.name is {attention.name}, which is causal, but '
        f'{path}kind={kind} reads both ways; take one of '
        f'{", ".join(names(causal_only=False))}'
      )
    where = f'{path}attention.{attention.mechanism.section}.'
    yield from attention.mechanism_config.check_model(where, self)

  def _check_heads(self, path: str) -> Iterator[str]:
    if self.num_heads % self.num_kv_heads:
      yield (
        f'{path}num_heads is {self.num_heads}, but it must be a '
        f'multiple of {path}num_kv_heads, which is {self.num_kv_heads}'
      )
    if not self.head_dim and self.d_model % self.num_heads:
      yield (
        f'{path}d_model is {self.d_model}, not a multiple of '
        f'{path}num_heads, which is {self.num_heads}; '
        f'set {path}head_dim'
      )
      return
    width = self.head_dim or self.d_model // self.num_heads
    if width % 2:
      yield (
        f'the head dimension is {width}, but RoPE needs an even one; set '
        f'{path}head_dim'
      )
