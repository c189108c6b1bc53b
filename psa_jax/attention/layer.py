"""Self-attention layer: projections, rotary positions, one mechanism call.

The mechanism is looked up by name behind `attention.base.attend`, so the
layer knows nothing of block lists or budgets. Queries come in groups of
G = N // K heads that share a key and value head (GQA, arXiv 2305.13245);
keys and values are never repeated in memory.

Rotary positions (RoPE, arXiv 2104.09864, equation 34) in the half-split
layout of GPT-NeoX and Llama: channels i and i + H/2 turn together by
`position * theta^(-2 i / H)`. Angles and the rotation are f32 whatever the
compute dtype; a bf16 angle is off by whole turns at position 65,536.

Not done: cross-attention, and the cache of decoding.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from psa_jax.attention import base
from psa_jax.attention.cascade import Importance, Pruning, head_importance
from psa_jax.config import ConfigError, ModelConfig
from psa_jax.quant.progressive import OFF, Quantizer
from psa_jax.types import Scalar


class Rotary(NamedTuple):
  """Cosines and sines of the rotary angles; B is 1 where rows agree."""

  cos: Float[Array, 'B T H/2']
  sin: Float[Array, 'B T H/2']


def rotary(
  positions: Int[Array, 'B T'], *, head_dim: int, theta: float
) -> Rotary:
  """Computes the f32 rotary table, once per forward for all layers.

  Args:
    positions: index of each token within its document.
    head_dim: H, even.
    theta: base of the geometric series of wave lengths.
  """
  pairs = jnp.arange(head_dim // 2, dtype=jnp.float32)
  frequency = jnp.float32(theta) ** (-2 * pairs / head_dim)
  angle = positions[..., None].astype(jnp.float32) * frequency[None, None, :]
  return Rotary(jnp.cos(angle), jnp.sin(angle))


def rotate(
  x: Float[Array, 'B T N H'], table: Rotary
) -> Float[Array, 'B T N H']:
  """Turns every head of `x` by its position, in f32; keeps the dtype."""
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  cos, sin = table.cos[:, :, None, :], table.sin[:, :, None, :]
  turned = (first * cos - second * sin, second * cos + first * sin)
  return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def head_dim(config: ModelConfig) -> int:
  """Width of one head: `config.head_dim`, else d_model // num_heads.

  Raises:
    ConfigError: heads that do not divide, or an odd width.
  """
  if config.num_heads % config.num_kv_heads:
    raise ConfigError(
      f'model.num_heads={config.num_heads} is not a multiple of '
      f'model.num_kv_heads={config.num_kv_heads}'
    )
  if not config.head_dim and config.d_model % config.num_heads:
    raise ConfigError(
      f'model.d_model={config.d_model} is not a multiple of '
      f'model.num_heads={config.num_heads}; set model.head_dim'
    )
  width = config.head_dim or config.d_model // config.num_heads
  if width < 2 or width % 2:
    raise ConfigError(
      f'rotary positions need an even head width, got {width}; set '
      'model.head_dim'
    )
  return width


def fan_in(in_axis, out_axis, *, scale: float = 1.0):
  """Truncated normal with variance `scale` / (product of the input axes)."""
  return jax.nn.initializers.variance_scaling(
    scale, 'fan_in', 'truncated_normal', in_axis=in_axis, out_axis=out_axis
  )


def project(
  x: jax.Array,
  kernel: nnx.Param | jax.Array,
  *,
  inputs: int = 1,
  quantizer: Quantizer = OFF,
) -> jax.Array:
  """Contracts the last `inputs` axes of `x` with the kernel's first ones.

  In the dtype of the activations: every backend accumulates a bf16 product in
  f32 and rounds once at the end. Asking for an f32 result as well would make
  both products of the backward pass f32 x bf16, which matrix units run at
  half speed.

  One matrix product over all tokens: as an einsum over [B, T, ...] the
  kernel's gradient contracts two axes, which XLA runs several times slower
  on CPU.
  """
  kernel = quantizer.kernel(kernel[...], count=inputs).astype(x.dtype)
  x = quantizer.inputs(x, count=inputs)
  batch, width = x.shape[: x.ndim - inputs], kernel.shape[inputs:]
  size = math.prod(kernel.shape[:inputs])
  y = x.reshape(-1, size) @ kernel.reshape(size, -1)
  return y.reshape(*batch, *width)


def take_heads(
  kernel: nnx.Param, heads: Int[Array, '*R n'], groups: int, axis: int
) -> Float[Array, '...']:
  """The kernel's heads that belong to the kv heads `heads`.

  Args:
    kernel: the heads are axis `axis`, in `groups` groups of equal size.
    heads: which groups; [n], or [B, n] with one choice a row.
    groups: K.
    axis: 0 or 1.

  Returns:
    The kernel with fewer heads; with [B, n], one a row [B, ...].
  """
  whole = kernel[...]
  shape = list(whole.shape)
  size = shape[axis] // groups
  split = whole.reshape(*shape[:axis], groups, size, *shape[axis + 1 :])
  chosen = jnp.take(split, heads, axis=axis)
  shape[axis] = heads.shape[-1] * size
  if heads.ndim == 1:
    return chosen.reshape(shape)
  chosen = jnp.moveaxis(chosen, axis, 0)
  return chosen.reshape(heads.shape[0], *shape)


def project_rows(
  x: jax.Array, kernel: nnx.Param | jax.Array, *, inputs: int = 1
) -> jax.Array:
  """`project` with a kernel of its own [B, ...] for every row of the batch."""
  kernel = kernel[...].astype(x.dtype)
  width = kernel.shape[1 + inputs :]
  size = math.prod(kernel.shape[1 : 1 + inputs])
  rows = x.reshape(*x.shape[:2], size)
  y = jnp.matmul(rows, kernel.reshape(kernel.shape[0], size, -1))
  return y.reshape(*x.shape[:2], *width)


class SelfAttention(nnx.Module):
  """Self-attention over one sequence; `config.attention` picks how.

  Attributes:
    wq: [D, N, H]; wk, wv: [D, K, H]; wo: [N, H, D]. No biases. `wo` writes
      to the residual stream, so it starts smaller by 1 / sqrt(2 L).
    mechanism: the parameters of the configured mechanism, if it has any.
    head_importance: [K] f32 running mean of what every kv head adds, where a
      causal model prunes heads (`models/cascade.py`).
  """

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    """Creates the projections.

    Raises:
      ConfigError: head counts that do not fit (see `head_dim`).
    """
    self.config = config
    width, dtype = head_dim(config), jnp.dtype(config.param_dtype)
    query = (config.d_model, config.num_heads, width)
    key = (config.d_model, config.num_kv_heads, width)
    project = fan_in(0, (1, 2))
    merge = fan_in((0, 1), 2, scale=1 / (2 * config.num_layers))
    self.wq = nnx.Param(project(rngs.params(), query, dtype))
    self.wk = nnx.Param(project(rngs.params(), key, dtype))
    self.wv = nnx.Param(project(rngs.params(), key, dtype))
    self.wo = nnx.Param(merge(rngs.params(), (*query[1:], query[0]), dtype))
    make = base.PARAMETERS.get(config.attention.name)
    self.mechanism = None if make is None else make(config, rngs=rngs)
    prunes = config.attention.name == 'cascade' and (
      config.attention.cascade.head_keep < 1
    )
    if prunes and config.kind == 'decoder_lm':
      self.head_importance = nnx.BatchStat(
        jnp.zeros((config.num_kv_heads,), jnp.float32)
      )

  def __call__(
    self,
    x: Float[Array, 'B T D'],
    *,
    step: Scalar,
    rope: Rotary,
    segment_ids: Int[Array, 'B T'] | None = None,
    train: bool,
    mechanism: str | None = None,
    budget: Scalar | None = None,
    causal: bool = True,
  ) -> tuple[Float[Array, 'B T D'], dict[str, jax.Array]]:
    """Attends from every position to itself and what is before it.

    Args:
      x: normalised residual stream, already in the compute dtype.
      step: optimiser step, which drives the mechanism's schedules.
      rope: rotary table of the positions.
      segment_ids: documents of packed rows; None is one document a row.
      train: whether the mechanism follows its training schedule.
      mechanism: overrides `config.attention.name` (evaluation at dense).
      budget: replaces the mechanism's schedule; see `base.attend`.
      causal: False attends to what comes after as well.

    Returns:
      The output in the dtype of `x` and f32 scalars: the mechanism's, and
      `bits` if `config.quant` is enabled.
    """
    quantizer = Quantizer.at(self.config.quant, step, train=train)
    linear = functools.partial(project, quantizer=quantizer)
    q = rotate(linear(x, self.wq), rope)
    k = rotate(linear(x, self.wk), rope)
    v = linear(x, self.wv)
    own = mechanism in (None, self.config.attention.name)
    learned = None
    if self.mechanism is not None and own:
      learned = self.mechanism(x, rope=rope)
    out, aux = base.attend(
      quantizer.heads(q),
      quantizer.heads(k),
      quantizer.heads(v),
      config=self.config.attention,
      step=step,
      segment_ids=segment_ids,
      train=train,
      causal=causal,
      learned=learned,
      mechanism=mechanism,
      budget=budget,
    )
    return linear(out, self.wo, inputs=2), aux | quantizer.aux(x.dtype)

  def pruned(
    self,
    x: Float[Array, 'B T D'],
    pruning: Pruning,
    *,
    step: Scalar,
    rope: Rotary,
    segment_ids: Int[Array, 'B T'] | None = None,
    causal: bool = True,
  ) -> tuple[Float[Array, 'B T D'], dict[str, jax.Array], Importance]:
    """Cascade pruning: attends with the heads that are left, and measures.

    Args:
      x: rows that are left, normalised; T may be anything.
      pruning: heads that are left, and which rows count.
      step: see `__call__`.
      rope: rotary table of the rows' own positions.
      segment_ids: see `__call__`.
      causal: see `__call__`.

    Returns:
      Output, scalars, and what this layer adds to the importance of the rows
      and of the kv heads that are left.
    """
    kernels = self.wq, self.wk, self.wv, self.wo
    apply, heads = project, pruning.heads
    if heads is not None:
      groups = self.config.num_kv_heads
      kernels = tuple(
        take_heads(kernel, heads, groups, axis)
        for kernel, axis in zip(kernels, (1, 1, 1, 0), strict=True)
      )
      apply = project if heads.ndim == 1 else project_rows
    wq, wk, wv, wo = kernels
    q, k = rotate(apply(x, wq), rope), rotate(apply(x, wk), rope)
    (out, aux), tokens = base.attend_and_measure(
      q,
      k,
      apply(x, wv),
      config=self.config.attention,
      step=step,
      segment_ids=segment_ids,
      causal=causal,
    )
    size = head_importance(out, k.shape[2], pruning.alive)
    return apply(out, wo, inputs=2), aux, Importance(tokens, size)
