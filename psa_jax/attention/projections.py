"""Projections of attention layers: head width, initial kernels, product."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from psa_jax.config import ModelConfig
from psa_jax.quant.progressive import OFF, Quantizer


def head_dim(config: ModelConfig) -> int:
  """Width of one head: `config.head_dim`, else d_model // num_heads."""
  return config.head_dim or config.d_model // config.num_heads


def fan_in(in_axis, out_axis, *, scale: float = 1.0):
  """Truncated normal with variance `scale` / (product of the input axes)."""
  return jax.nn.initializers.variance_scaling(
    scale, 'fan_in', 'truncated_normal', in_axis=in_axis, out_axis=out_axis
  )


def project(
  x: jax.Array,
  kernel: nnx.Param | jax.Array,
  bias: nnx.Param | jax.Array | None = None,
  *,
  inputs: int = 1,
  quantizer: Quantizer = OFF,
) -> jax.Array:
  """Contracts the last `inputs` axes of `x` with the kernel's first ones.

  And adds the bias, if there is one.

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
  if bias is not None:
    y = y + bias[...].astype(x.dtype).reshape(1, -1)
  return y.reshape(*batch, *width)


def bias_of(config: ModelConfig, *shape: int) -> nnx.Param | None:
  """A zero-initialised bias; None where the model has none."""
  if not config.biases:
    return None
  return nnx.Param(jnp.zeros(shape, jnp.dtype(config.param_dtype)))


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
  x: jax.Array,
  kernel: nnx.Param | jax.Array,
  bias: nnx.Param | jax.Array | None = None,
  *,
  inputs: int = 1,
) -> jax.Array:
  """`project` with a kernel of its own [B, ...] for every row of the batch.

  A bias has a row [B, ...] too, or one axis less, for all rows.
  """
  kernel = kernel[...].astype(x.dtype)
  width = kernel.shape[1 + inputs :]
  size = math.prod(kernel.shape[1 : 1 + inputs])
  rows = x.reshape(*x.shape[:2], size)
  y = jnp.matmul(rows, kernel.reshape(kernel.shape[0], size, -1))
  if bias is not None:
    offset = bias[...].astype(x.dtype)
    count = x.shape[0] if offset.ndim > len(width) else 1
    y = y + offset.reshape(count, 1, -1)
  return y.reshape(*x.shape[:2], *width)
