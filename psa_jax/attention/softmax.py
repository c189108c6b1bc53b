"""The softmax that block-list mechanisms use at a step: exact or approximate.

The approximations themselves are in `psa_jax/kernels/softmax.py`.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from psa_jax import schedules
from psa_jax.config import SoftmaxConfig
from psa_jax.kernels.softmax import EXACT, Kind
from psa_jax.types import Scalar

SOFTMAX = (0.0, 1.0, 0.0, 0.0)  # the polynomial that changes nothing


class Softmax(NamedTuple):
  """Two arguments of `block_sparse_attention`."""

  softmax: Kind = EXACT
  coefficients: Float[Array, '4'] | None = None


PLAIN = Softmax()


def softmax_at(cfg: SoftmaxConfig, step: Scalar) -> Softmax:
  """The softmax at an optimiser step.

  Args:
    cfg: kind, and for a polynomial its coefficients, clamp and schedule.
    step: drives `cfg.mix`.
  """
  if cfg.kind != 'polynomial':
    return Softmax(Kind(cfg.kind), None)
  target = jnp.asarray(cfg.coefficients, jnp.float32)
  kind = Kind(cfg.kind, cfg.clamp or float('inf'))
  return Softmax(kind, mixed(target, schedules.make(cfg.mix)(step)))


def mixed(coefficients: Float[Array, '4'], share: Scalar) -> Float[Array, '4']:
  """`share` of these coefficients, the rest those of the plain softmax."""
  return share * coefficients + (1 - share) * jnp.asarray(SOFTMAX, jnp.float32)
