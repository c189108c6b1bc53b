"""Dropout and drop path: what is left out of the residual stream in training.

Dropout (Srivastava et al. 2014) zeroes a share of the numbers that a half of a
block adds, drop path (stochastic depth, arXiv 1603.09382) the whole half, for
a row of the batch. The rate of drop path rises evenly from 0 in the first layer
to `model.drop_path` in the last. What stays is scaled up, so the mean stays.

Random numbers are a function of the step, the layer and the place in it, so a
run that goes on draws the same ones. Without either rate nothing is drawn and
the program is as if this file were not there.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from psa_jax.config import ModelConfig
from psa_jax.types import Scalar

_SEED = 1603  # of every run: the step is what makes the difference


class Drop(NamedTuple):
  """What one layer leaves out, or with a leading axis L, what all do.

  Attributes:
    key: of its random numbers.
    path: rate of drop path.
  """

  key: jax.Array
  path: Float[Array, '*L']

  def __call__(
    self, x: Float[Array, 'B T D'], place: int, rate: float
  ) -> Float[Array, 'B T D']:
    """What is left of `x`, which half `place` of the layer adds.

    Args:
      x: before it is added to the residual stream.
      place: tells the halves of a layer apart.
      rate: of dropout.
    """
    key = jax.random.fold_in(self.key, place)
    if rate:
      stays = jax.random.bernoulli(key, 1 - rate, x.shape)
      x = jnp.where(stays, x / (1 - rate), 0).astype(x.dtype)
    keep = 1 - self.path
    rows = jax.random.uniform(jax.random.fold_in(key, 1), (x.shape[0], 1, 1))
    return jnp.where(rows < keep, x / keep.astype(x.dtype), 0).astype(x.dtype)


def drops(
  config: ModelConfig, step: Scalar, *, train: bool, stack: int = 0
) -> Drop | None:
  """What every layer leaves out at a step; None where that is nothing.

  Args:
    config: the model.
    step: optimiser step.
    train: nothing is left out otherwise.
    stack: tells the stacks of a model apart.
  """
  if not train or not (config.dropout or config.drop_path):
    return None
  L = config.num_layers
  key = jax.random.fold_in(jax.random.key(_SEED + stack), step)
  rates = config.drop_path * jnp.arange(L) / max(1, L - 1)
  return Drop(jax.random.split(key, L), rates.astype(jnp.float32))


def leave_out(
  drop: Drop | None, x: Float[Array, 'B T D'], place: int, config: ModelConfig
) -> Float[Array, 'B T D']:
  """`drop` of `x`, or `x` where nothing is left out."""
  return x if drop is None else drop(x, place, config.dropout)
