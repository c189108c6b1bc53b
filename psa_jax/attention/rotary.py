"""Rotary positions (RoPE, arXiv 2104.09864, equation 34).

In the half-split layout of GPT-NeoX and Llama: channels i and i + H/2 turn
together by `position * theta^(-2 i / H)`. Angles and the rotation are f32
whatever the compute dtype; a bf16 angle is off by whole turns at position
65,536.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


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
  x: Float[Array, 'B T N H'], table: Rotary | None
) -> Float[Array, 'B T N H']:
  """Turns every head of `x` by its position, in f32; keeps the dtype.

  Without a table nothing turns: the model has positions of another kind.
  """
  if table is None:
    return x
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  cos, sin = table.cos[:, :, None, :], table.sin[:, :, None, :]
  turned = (first * cos - second * sin, second * cos + first * sin)
  return jnp.concatenate(turned, axis=-1).astype(x.dtype)
