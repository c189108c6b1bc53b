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

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from psa_jax.attention import base
from psa_jax.config import ConfigError, ModelConfig
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


def project(x: jax.Array, kernel: nnx.Param, *, inputs: int = 1) -> jax.Array:
  """Contracts the last `inputs` axes of `x` with the kernel's first ones.

  In the dtype of the activations: every backend accumulates a bf16 product in
  f32 and rounds once at the end. Asking for an f32 result as well would make
  both products of the backward pass f32 x bf16, which matrix units run at
  half speed.

  One matrix product over all tokens: as an einsum over [B, T, ...] the
  kernel's gradient contracts two axes, which XLA runs several times slower
  on CPU.
  """
  kernel = kernel[...].astype(x.dtype)
  batch, width = x.shape[: x.ndim - inputs], kernel.shape[inputs:]
  size = math.prod(kernel.shape[:inputs])
  y = x.reshape(-1, size) @ kernel.reshape(size, -1)
  return y.reshape(*batch, *width)


class SelfAttention(nnx.Module):
  """Causal self-attention over one sequence; `config.attention` picks how.

  Attributes:
    wq: [D, N, H]; wk, wv: [D, K, H]; wo: [N, H, D]. No biases. `wo` writes
      to the residual stream, so it starts smaller by 1 / sqrt(2 L).
    mechanism: the parameters of the configured mechanism, if it has any.
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

  def __call__(
    self,
    x: Float[Array, 'B T D'],
    *,
    step: Scalar,
    rope: Rotary,
    segment_ids: Int[Array, 'B T'] | None = None,
    train: bool,
    mechanism: str | None = None,
  ) -> tuple[Float[Array, 'B T D'], dict[str, jax.Array]]:
    """Attends from every position to itself and what is before it.

    Args:
      x: normalised residual stream, already in the compute dtype.
      step: optimiser step, which drives the mechanism's schedules.
      rope: rotary table of the positions.
      segment_ids: documents of packed rows; None is one document a row.
      train: whether the mechanism follows its training schedule.
      mechanism: overrides `config.attention.name` (evaluation at dense).

    Returns:
      The output in the dtype of `x` and the mechanism's f32 scalars.
    """
    q = rotate(project(x, self.wq), rope)
    k = rotate(project(x, self.wk), rope)
    v = project(x, self.wv)
    own = mechanism in (None, self.config.attention.name)
    learned = None
    if self.mechanism is not None and own:
      learned = self.mechanism(x, rope=rope)
    out, aux = base.attend(
      q,
      k,
      v,
      config=self.config.attention,
      step=step,
      segment_ids=segment_ids,
      train=train,
      learned=learned,
      mechanism=mechanism,
    )
    return project(out, self.wo, inputs=2), aux
