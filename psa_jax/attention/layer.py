"""Self-attention layer: projections, rotary positions, one mechanism call.

The mechanism is looked up by name behind `attend`, so the layer knows nothing
of block lists or budgets. Queries come in groups of
G = N // K heads that share a key and value head (GQA, arXiv 2305.13245);
keys and values are never repeated in memory.

`decode` makes one token at a time over a cache, with dense or top-k attention;
reading another sequence is in `cross.py`.

Not done: the caches of the other mechanisms in a model (their functions are
beside them).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from psa_jax.attention import registry
from psa_jax.attention.attend import attend
from psa_jax.attention.context import AttentionContext
from psa_jax.attention.cross import KeyValues, attend_cached
from psa_jax.attention.projections import (
  bias_of,
  fan_in,
  head_dim,
  project,
)
from psa_jax.attention.rotary import Rotary, rotate
from psa_jax.config import ModelConfig
from psa_jax.quant.progressive import Quantizer
from psa_jax.types import Learned


class Cache(NamedTuple):
  """Keys and values of the tokens so far, with room for more."""

  k: Float[Array, 'B S K H']
  v: Float[Array, 'B S K H']


class SelfAttention(nnx.Module):
  """Self-attention over one sequence; `config.attention` picks how.

  Attributes:
    wq: [D, N, H]; wk, wv: [D, K, H]; wo: [N, H, D]. `wo` writes to the
      residual stream, so it starts smaller by 1 / sqrt(2 L).
    bq: [N, H]; bk, bv: [K, H]; bo: [D]; None unless `config.biases`.
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
    self.bq = bias_of(config, *query[1:])
    self.bk = bias_of(config, *key[1:])
    self.bv = bias_of(config, *key[1:])
    self.bo = bias_of(config, config.d_model)
    make = registry.get(config.attention.name).parameters
    self.mechanism = None if make is None else make(config, rngs=rngs)

  def __call__(
    self, x: Float[Array, 'B T D'], *, context: AttentionContext
  ) -> tuple[Float[Array, 'B T D'], dict[str, jax.Array]]:
    """Attends from every position to itself and to what the context allows.

    Args:
      x: normalised residual stream, already in the compute dtype.
      context: step, rotary table, documents, and what else varies by call.

    Returns:
      The output in the dtype of `x` and f32 scalars: the mechanism's, and
      `bits` if `config.quant` is enabled.
    """
    quantizer = Quantizer.at(
      self.config.quant, context.step, train=context.train
    )
    linear = functools.partial(project, quantizer=quantizer)
    q = rotate(linear(x, self.wq, self.bq), context.rope)
    k = rotate(linear(x, self.wk, self.bk), context.rope)
    v = linear(x, self.wv, self.bv)
    out, aux = attend(
      quantizer.heads(q),
      quantizer.heads(k),
      quantizer.heads(v),
      config=self.config.attention,
      context=context,
      learned=self.learn(x, context.rope),
    )
    out = linear(out, self.wo, self.bo, inputs=2)
    return out, aux | quantizer.aux(x.dtype)

  def learn(
    self, x: Float[Array, 'B T D'], rope: Rotary | None
  ) -> Learned | None:
    """What the mechanism's own parameters make of the layer's input."""
    return None if self.mechanism is None else self.mechanism(x, rope=rope)

  def decode(
    self,
    x: Float[Array, 'B 1 D'],
    cache: Cache,
    *,
    at: Int[Array, ''],
    context: AttentionContext,
  ) -> tuple[Float[Array, 'B 1 D'], Cache]:
    """What `__call__` gives the newest token, with the cache of the others.

    Args:
      x: the token, normalised.
      cache: keys and values of the tokens before it.
      at: its place in the cache, the same in every row.
      context: step, and the rotary table of its position.

    Returns:
      The output, and the cache with this token.

    Raises:
      ConfigError: a mechanism without a cache here.
    """
    q = rotate(project(x, self.wq, self.bq), context.rope)
    k = rotate(project(x, self.wk, self.bk), context.rope)
    new = Cache(k, project(x, self.wv, self.bv))
    cache = jax.tree.map(
      lambda old, row: lax.dynamic_update_slice_in_dim(old, row, at, axis=1),
      cache,
      new,
    )
    lengths = jnp.full((x.shape[0],), at + 1, jnp.int32)
    out = attend_cached(
      q,
      KeyValues(*cache, lengths),
      config=self.config.attention,
      context=context,
      learned=self.learn(x, context.rope),
    ).out
    return project(out, self.wo, self.bo, inputs=2), cache
