"""The lightning indexer: the parameters of `dsa`."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from psa_jax.attention.projections import fan_in, project
from psa_jax.config import ModelConfig
from psa_jax.types import Learned


class Indexer(nnx.Module):
  """The lightning indexer of DSA (arXiv 2512.02556), for `dsa`.

  Its input is detached: the indexer learns from its own loss alone, and the
  model never from the indexer's. Queries and keys carry rotary positions, by
  as many of the layer's angles as they have room for, spread over all of its
  wave lengths. The weights of the heads are scaled by J^-1/2 E^-1/2.

  Not done: the layer norm of the published model's keys, its FP8 products and
  the Hadamard rotation that goes with them.

  Attributes:
    index_q: [D, J, E]; index_k: [D, E]; index_w: [D, J].
  """

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    """Creates the projections."""
    dtype = jnp.dtype(config.param_dtype)
    width, cfg = config.d_model, config.attention.dsa
    self.scale = (cfg.heads * cfg.width) ** -0.5
    query, many = (width, cfg.heads, cfg.width), fan_in(0, (1, 2))
    self.index_q = nnx.Param(many(rngs.params(), query, dtype))
    one = fan_in(0, 1)
    self.index_k = nnx.Param(one(rngs.params(), (width, cfg.width), dtype))
    self.index_w = nnx.Param(one(rngs.params(), (width, cfg.heads), dtype))

  def __call__(self, x: Float[Array, 'B T D'], *, rope: Any) -> Learned:
    """`q` [B, T, J, E], `k` [B, T, E] and `weights` [B, T, J] by token."""
    x = jax.lax.stop_gradient(x)

    q = _rotate(project(x, self.index_q), rope)
    k = _rotate(project(x, self.index_k)[:, :, None], rope)[:, :, 0]
    weights = project(x, self.index_w).astype(jnp.float32) * self.scale
    return Learned(tokens={'q': q, 'k': k, 'weights': weights})


def _rotate(x, rope):
  """Turns the first channels of x [B, T, J, E] by some of the rope's angles."""
  pairs = min(x.shape[-1] // 2, rope.cos.shape[-1])
  at = jnp.arange(pairs) * rope.cos.shape[-1] // pairs
  cos, sin = (t[..., at][:, :, None] for t in (rope.cos, rope.sin))
  turned = x[..., : 2 * pairs].astype(jnp.float32)
  a, b = turned[..., :pairs], turned[..., pairs:]
  turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)
  return jnp.concatenate([turned.astype(x.dtype), x[..., 2 * pairs :]], -1)
