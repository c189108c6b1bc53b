"""The coefficients of the polynomial softmax as parameters of a layer."""

import jax.numpy as jnp
from flax import nnx

from psa_jax.config import ModelConfig
from psa_jax.types import Learned


class Coefficients(nnx.Module):
  """Four numbers a layer, a0 to a3, that start as configured.

  Attributes:
    coefficients: [4]. a0 stays: it changes no weight and has no gradient.
  """

  def __init__(self, config: ModelConfig):
    """Creates them in f32 whatever the parameters' dtype: they are four."""
    start = config.attention.topk.coefficients
    self.coefficients = nnx.Param(jnp.asarray(start, jnp.float32))

  def __call__(self, x, *, rope) -> Learned:
    """The coefficients; nothing depends on the tokens."""
    del x, rope
    return Learned(weights={'coefficients': self.coefficients[...]})


def make(config: ModelConfig, *, rngs: nnx.Rngs) -> Coefficients | None:
  """The module, or None where the coefficients are not learned."""
  del rngs  # nothing is random
  return Coefficients(config) if config.attention.topk.learnable else None
