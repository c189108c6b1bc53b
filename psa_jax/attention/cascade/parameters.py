"""What cascade pruning remembers of its heads in a causal model."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from psa_jax.config import ModelConfig
from psa_jax.types import Learned


class HeadImportance(nnx.Module):
  """A statistic of training, like a batch norm's; see `models/cascade.py`.

  Attributes:
    head_importance: [K] f32 running mean of what every kv head adds.
  """

  def __init__(self, config: ModelConfig):
    """Begins with no head above another."""
    self.head_importance = nnx.BatchStat(
      jnp.zeros((config.num_kv_heads,), jnp.float32)
    )

  def __call__(self, x: Float[Array, 'B T D'], *, rope: Any) -> Learned:
    """Nothing that attention reads: the stack of layers chooses the heads."""
    del x, rope
    return Learned()


def head_importance_of(config: ModelConfig, *, rngs) -> HeadImportance | None:
  """The module, or None where no head is judged by earlier batches."""
  del rngs  # nothing is random
  if config.causal and config.attention.cascade.prunes_heads:
    return HeadImportance(config)
  return None
