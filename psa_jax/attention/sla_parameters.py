"""Position bias and convolution: the parameters of `sla`."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from psa_jax.attention.sla import TAPS
from psa_jax.config import ModelConfig
from psa_jax.types import Learned


class SlaParameters(nnx.Module):
  """Position bias and convolution of `sla`.

  Attributes:
    sla_position: [P, K, H], 0 at first.
    sla_conv: [5, H] and sla_bias: [H], shared by all heads.
  """

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    """Creates the parameters."""
    dtype = jnp.dtype(config.param_dtype)
    width = config.head_dim or config.d_model // config.num_heads
    rows = config.attention.sla.positions
    table = jnp.zeros((rows, config.num_kv_heads, width), dtype)
    self.sla_position = nnx.Param(table)
    taps = nnx.initializers.lecun_normal()
    self.sla_conv = nnx.Param(taps(rngs.params(), (TAPS, width), dtype))
    self.sla_bias = nnx.Param(jnp.zeros((width,), dtype))

  def __call__(self, x: Float[Array, 'B T D'], *, rope: Any) -> Learned:
    """The parameters as they are; the table once for every row of `x`."""
    del rope
    table = self.sla_position[...][None]
    table = jnp.broadcast_to(table, (x.shape[0], *table.shape[1:]))
    weights = {'conv': self.sla_conv[...], 'conv_bias': self.sla_bias[...]}
    return Learned(heads={'position': table}, weights=weights)
