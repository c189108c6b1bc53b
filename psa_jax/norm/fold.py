"""Folding a batch norm into the linear layer beside it.

SLAB, arXiv 2405.11582. Once gamma is 0, and outside training, PRepBN, RepBN
and BatchNorm are one scale and one shift a channel,

  y = s * x + t,   s = a / sqrt(var + eps) + eta
                   t = b - a * mean / sqrt(var + eps)

with BatchNorm's affine a, b and running statistics. What reads y linearly can
read x instead:

  following linear layer   W y + c   = (W diag(s)) x + (W t + c)
  preceding linear layer   s * (W x + c) + t = (diag(s) W) x + (s * c + t)

(The paper's reference code leaves eta * c out of the second.) A mean over
tokens between the norm and its reader changes nothing, so a classifier's head
on pooled tokens is a following layer too.

Everything is worked out in float64 and rounded once. Which layers of a model
these are is in `psa_jax/models/folding.py`.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Float, Float64

Weights = Float[np.ndarray, '...'] | Float[Array, '...']


class ScaleShift(NamedTuple):
  """y = scale * x + shift, [*L, D] each; *L is an axis of stacked layers."""

  scale: Float64[np.ndarray, '*L D']
  shift: Float64[np.ndarray, '*L D']

  @classmethod
  def of(
    cls, params: Mapping[str, Any], statistics: Mapping[str, Any], eps: float
  ) -> 'ScaleShift':
    """What a norm does at gamma = 0.

    Args:
      params: of a `Norm`: `bn_scale`, `bn_bias` and, if it has one, `eta`.
      statistics: its `mean` and `var`.
      eps: added to the variance, `norm.bn_eps`.
    """
    a, b, mean, var = (
      np.asarray(x, np.float64)
      for x in (
        params['bn_scale'],
        params['bn_bias'],
        statistics['mean'],
        statistics['var'],
      )
    )
    slope = a / np.sqrt(var + eps)
    eta = np.asarray(params.get('eta', 0.0), np.float64)
    return cls(slope + eta[..., None], b - slope * mean)


def into_following(
  norm: ScaleShift, kernel: Weights, bias: Weights | None = None
) -> tuple[np.ndarray, np.ndarray]:
  """A linear layer that reads what the norm read, and gives what it gave.

  Args:
    norm: scale and shift of the D inputs.
    kernel: [*L, D, *out].
    bias: [*L, *out]; None is 0.

  Returns:
    The new kernel and bias, in the dtype of the kernel.
  """
  wide = np.asarray(kernel, np.float64)
  after = wide.ndim - norm.scale.ndim
  scale, shift = (x.reshape(x.shape + (1,) * after) for x in norm)
  offset = (wide * shift).sum(norm.scale.ndim - 1)
  if bias is not None:
    offset = offset + np.asarray(bias, np.float64)
  return _like(kernel, wide * scale, offset)


def into_preceding(
  norm: ScaleShift, kernel: Weights, bias: Weights | None = None
) -> tuple[np.ndarray, np.ndarray]:
  """A linear layer that gives what the norm behind it gave.

  Args:
    norm: scale and shift of the D outputs.
    kernel: [*L, *in, D].
    bias: [*L, D]; None is 0.

  Returns:
    The new kernel and bias, in the dtype of the kernel.
  """
  wide = np.asarray(kernel, np.float64)
  layers = norm.scale.shape[:-1]
  between = (1,) * (wide.ndim - norm.scale.ndim)
  scale = norm.scale.reshape(*layers, *between, -1)
  offset = norm.shift
  if bias is not None:
    offset = offset + norm.scale * np.asarray(bias, np.float64)
  return _like(kernel, wide * scale, offset)


def _like(kernel, *arrays):
  return tuple(x.astype(kernel.dtype) for x in arrays)
