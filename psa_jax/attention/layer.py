"""Self-attention layer: projections, rotary positions, one mechanism call.

The mechanism is looked up by name behind `attention.base.attend`, so the
layer knows nothing of block lists or budgets. Queries come in groups of
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

from psa_jax.attention import base
from psa_jax.attention.cascade import Importance, Pruning, head_importance
from psa_jax.attention.cross import Memory, attend_cached
from psa_jax.attention.projections import (
  bias_of,
  fan_in,
  head_dim,
  project,
  project_rows,
  take_heads,
)
from psa_jax.attention.rotary import Rotary, rotate
from psa_jax.config import ModelConfig
from psa_jax.quant.progressive import Quantizer
from psa_jax.types import Scalar


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
    head_importance: [K] f32 running mean of what every kv head adds, where a
      causal model prunes heads (`models/cascade.py`).
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
    make = base.PARAMETERS.get(config.attention.name)
    self.mechanism = None if make is None else make(config, rngs=rngs)
    prunes = config.attention.name == 'cascade' and (
      config.attention.cascade.head_keep < 1
    )
    if prunes and config.kind == 'decoder_lm':
      self.head_importance = nnx.BatchStat(
        jnp.zeros((config.num_kv_heads,), jnp.float32)
      )

  def __call__(
    self,
    x: Float[Array, 'B T D'],
    *,
    step: Scalar,
    rope: Rotary | None,
    segment_ids: Int[Array, 'B T'] | None = None,
    train: bool,
    mechanism: str | None = None,
    budget: Scalar | None = None,
    causal: bool = True,
  ) -> tuple[Float[Array, 'B T D'], dict[str, jax.Array]]:
    """Attends from every position to itself and what is before it.

    Args:
      x: normalised residual stream, already in the compute dtype.
      step: optimiser step, which drives the mechanism's schedules.
      rope: rotary table of the positions.
      segment_ids: documents of packed rows; None is one document a row.
      train: whether the mechanism follows its training schedule.
      mechanism: overrides `config.attention.name` (evaluation at dense).
      budget: replaces the mechanism's schedule; see `base.attend`.
      causal: False attends to what comes after as well.

    Returns:
      The output in the dtype of `x` and f32 scalars: the mechanism's, and
      `bits` if `config.quant` is enabled.
    """
    quantizer = Quantizer.at(self.config.quant, step, train=train)
    linear = functools.partial(project, quantizer=quantizer)
    q = rotate(linear(x, self.wq, self.bq), rope)
    k = rotate(linear(x, self.wk, self.bk), rope)
    v = linear(x, self.wv, self.bv)
    own = mechanism in (None, self.config.attention.name)
    learned = None
    if self.mechanism is not None and own:
      learned = self.mechanism(x, rope=rope)
    out, aux = base.attend(
      quantizer.heads(q),
      quantizer.heads(k),
      quantizer.heads(v),
      config=self.config.attention,
      step=step,
      segment_ids=segment_ids,
      train=train,
      causal=causal,
      learned=learned,
      mechanism=mechanism,
      budget=budget,
    )
    out = linear(out, self.wo, self.bo, inputs=2)
    return out, aux | quantizer.aux(x.dtype)

  def decode(
    self,
    x: Float[Array, 'B 1 D'],
    cache: Cache,
    *,
    at: Int[Array, ''],
    step: Scalar,
    rope: Rotary,
    mechanism: str | None = None,
  ) -> tuple[Float[Array, 'B 1 D'], Cache]:
    """What `__call__` gives the newest token, with the cache of the others.

    Args:
      x: the token, normalised.
      cache: keys and values of the tokens before it.
      at: its place in the cache, the same in every row.
      step: optimiser step, which drives the schedules.
      rope: rotary table of its position.
      mechanism: overrides `config.attention.name`: dense or topk.

    Returns:
      The output, and the cache with this token.

    Raises:
      ConfigError: a mechanism without a cache here.
    """
    q = rotate(project(x, self.wq, self.bq), rope)
    k = rotate(project(x, self.wk, self.bk), rope)
    new = Cache(k, project(x, self.wv, self.bv))
    cache = jax.tree.map(
      lambda old, own: lax.dynamic_update_slice_in_dim(old, own, at, axis=1),
      cache,
      new,
    )
    own, learned = mechanism in (None, self.config.attention.name), None
    if self.mechanism is not None and own:
      learned = self.mechanism(x, rope=rope)
    lengths = jnp.full((x.shape[0],), at + 1, jnp.int32)
    out = attend_cached(
      q,
      Memory(*cache, lengths),
      config=self.config.attention,
      step=step,
      train=False,
      learned=learned,
      mechanism=mechanism,
    ).out
    return project(out, self.wo, self.bo, inputs=2), cache

  def pruned(
    self,
    x: Float[Array, 'B T D'],
    pruning: Pruning,
    *,
    step: Scalar,
    rope: Rotary | None,
    segment_ids: Int[Array, 'B T'] | None = None,
    causal: bool = True,
  ) -> tuple[Float[Array, 'B T D'], dict[str, jax.Array], Importance]:
    """Cascade pruning: attends with the heads that are left, and measures.

    Args:
      x: rows that are left, normalised; T may be anything.
      pruning: heads that are left, and which rows count.
      step: see `__call__`.
      rope: rotary table of the rows' own positions.
      segment_ids: see `__call__`.
      causal: see `__call__`.

    Returns:
      Output, scalars, and what this layer adds to the importance of the rows
      and of the kv heads that are left.
    """
    kernels = self.wq, self.wk, self.wv, self.wo
    biases = self.bq, self.bk, self.bv
    apply, heads = project, pruning.heads
    if heads is not None:
      groups = self.config.num_kv_heads
      kernels = tuple(
        take_heads(kernel, heads, groups, axis)
        for kernel, axis in zip(kernels, (1, 1, 1, 0), strict=True)
      )
      biases = tuple(
        None if bias is None else take_heads(bias, heads, groups, 0)
        for bias in biases
      )
      apply = project if heads.ndim == 1 else project_rows
    wq, wk, wv, wo = kernels
    bq, bk, bv = biases
    q, k = rotate(apply(x, wq, bq), rope), rotate(apply(x, wk, bk), rope)
    (out, aux), tokens = base.attend_and_measure(
      q,
      k,
      apply(x, wv, bv),
      config=self.config.attention,
      step=step,
      segment_ids=segment_ids,
      causal=causal,
    )
    size = head_importance(out, k.shape[2], pruning.alive)
    out = apply(out, wo, self.bo, inputs=2)
    return out, aux, Importance(tokens, size)
