"""Scores from the high bits of the keys, the low bits on demand.

SpAtten, arXiv 2012.09852, section III-D: keys are stored as two integers, their
most and their least significant bits. The probabilities of a query are first
computed from the high bits alone. Where the largest is below a threshold (the
row is flat, so an error of the scores shows) the low bits are read as well and
the row is computed again; else it stays, since a change ds of one score moves
the probabilities by at most ds / 2 in sum.

Keys and queries are quantised as `split.py` says, with a scale for each head of
each token. Values are not quantised here (see `flashq.py` for storage). Memory
is linear in T and S (`on_demand_xla.py`).

The paper applies this to a trained model (generation with GPT-2). In training
the forward pass is the same and the gradient is that of dense attention at the
quantised queries and keys, passed straight through the rounding.

Bytes are counted for an accelerator that packs bits and reads the keys anew for
every query row, as in generation; what XLA moves here is more (an int8 for
each part, keys shared by the rows of a tile).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from psa_jax.kernels import arguments, platform, softmax, unread
from psa_jax.kernels.dense import dense_attention
from psa_jax.kernels.platform import Implementation
from psa_jax.quant import on_demand_xla
from psa_jax.quant.split import (
  OnDemandConfig,
  SplitKeys,
  join,
  largest_sum,
  split,
  to_integers,
)
from psa_jax.types import Scalar


class Stats(NamedTuple):
  """What was read; f32 means over query rows (heads and batch rows too).

  Attributes:
    refetch_rate: share of rows that read the low bits as well.
    key_bits: bits read of each key channel, the scale's share included.
    key_bytes: bytes of keys that a row reads.
    key_bytes_f32: the same if keys were f32, the baseline of SpAtten's claims.
  """

  refetch_rate: Float[Array, '']
  key_bits: Float[Array, '']
  key_bytes: Float[Array, '']
  key_bytes_f32: Float[Array, '']


class Spec(NamedTuple):
  """What a call was asked for; static but for `q_offset` of `attend_split`."""

  config: OnDemandConfig
  causal: bool
  q_offset: Scalar
  scale: float


def on_demand_attention(
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B S K H'],
  v: Float[Array, 'B S K Hv'],
  *,
  config: OnDemandConfig,
  causal: bool = True,
  q_segment_ids: Int[Array, 'B T'] | None = None,
  kv_segment_ids: Int[Array, 'B S'] | None = None,
  q_offset: int = 0,
  scale: float | None = None,
  implementation: str = 'auto',
) -> tuple[Float[Array, 'B T N Hv'], Stats]:
  """Attention whose keys are read by their high bits, and more on demand.

  Args:
    q: queries; query head `n` reads kv head `n // (N // K)`.
    k: keys.
    v: values, read as they are.
    config: bits and threshold.
    causal: a query at position `t + q_offset` reads keys up to its own.
    q_segment_ids: with `kv_segment_ids`, a query reads its own segment only.
    kv_segment_ids: see `q_segment_ids`.
    q_offset: position of the first query.
    scale: factor on the scores; None means H ** -0.5.
    implementation: `xla`, `reference` (quadratic memory), or `auto`.

  Returns:
    The output in the dtype of `v`, 0 where a query reads nothing, and what was
    read. Differentiable, straight through the rounding.

  Raises:
    ValueError: shapes that do not fit, or heads so wide that an integer sum
      could leave int32.
    ConfigError: an implementation that is not there.
  """
  arguments.check_attention(q, k, v, q_segment_ids, kv_segment_ids)
  largest_sum(config, q.shape[-1])
  segments = arguments.segments(q_segment_ids, kv_segment_ids)
  spec = Spec(config, causal, q_offset, arguments.scale_or_default(q, scale))
  run = platform.pick(implementation, IMPLEMENTATIONS)
  k, v = unread.mark(k, v)
  return _straight_through(spec, run, q, k, v, segments)


def attend_split(
  q: Float[Array, 'B T N H'],
  keys: SplitKeys,
  v: Float[Array, 'B S K Hv'],
  *,
  config: OnDemandConfig,
  causal: bool = True,
  q_offset: Scalar = 0,
  scale: float | None = None,
  implementation: str = 'auto',
) -> tuple[Float[Array, 'B T N Hv'], Stats]:
  """The same over keys that a cache holds in two parts already; no gradient.

  Args:
    q: queries.
    keys: from `split.split` with the same `config`.
    v: values.
    config: bits and threshold.
    causal: a query at position `t + q_offset` reads keys up to its own, so
      what lies behind in a cache is not read.
    q_offset: position of the first query; may be traced.
    scale: factor on the scores; None means H ** -0.5.
    implementation: see `on_demand_attention`, as for what is returned and
      raised.
  """
  arguments.check_attention(q, keys.high, v, None, None)
  largest_sum(config, q.shape[-1])
  factor = arguments.scale_or_default(q, scale)
  run = platform.pick(implementation, IMPLEMENTATIONS)
  whole, q_scale = to_integers(q, config.query_bits)
  bad = ~unread.finite(v)
  keys, v = (
    keys._replace(scale=jnp.where(bad, jnp.nan, keys.scale)),
    unread.clean(v),
  )
  spec = Spec(config, causal, q_offset, factor)
  out, row = run(whole, q_scale, keys, v, None, spec=spec)
  return out, _stats(config, q.shape[-1], *row)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _straight_through(spec, run, q, k, v, segments):
  return _quantised(spec, run, q, k, v, segments)[0]


def _quantised(spec, run, q, k, v, segments):
  whole, q_scale = to_integers(q, spec.config.query_bits)
  keys = split(k, spec.config)
  out, row = run(whole, q_scale, keys, v, segments, spec=spec)
  operands = whole.astype(jnp.float32) * q_scale[..., None], keys
  return (out, _stats(spec.config, q.shape[-1], *row)), operands


def _forward_rule(spec, run, q, k, v, segments):
  result, (q_whole, keys) = _quantised(spec, run, q, k, v, segments)
  like = jnp.zeros((), q.dtype), jnp.zeros((), k.dtype)
  return result, (q_whole, keys, v, segments, like)


def _backward_rule(spec, run, saved, grads):
  del run
  q, keys, v, segments, (q_like, k_like) = saved
  q_seg, kv_seg = (None, None) if segments is None else segments

  def dense(q, k, v):
    return dense_attention(
      q.astype(q_like.dtype),
      k.astype(k_like.dtype),
      v,
      causal=spec.causal,
      q_segment_ids=q_seg,
      kv_segment_ids=kv_seg,
      q_offset=int(spec.q_offset),
      scale=spec.scale,
    )[0]

  k = join(keys, spec.config)
  dq, dk, dv = jax.vjp(dense, q, k, v)[1](grads[0])
  return dq.astype(q_like.dtype), dk.astype(k_like.dtype), dv, None


_straight_through.defvjp(_forward_rule, _backward_rule)


def _stats(config, width, need, visible) -> Stats:
  """Means over rows from need and visible keys, both [B, K, rows]."""
  need, visible = need.astype(jnp.float32), visible.astype(jnp.float32)
  bits = config.high_bits + config.low_bits * need + 32 / width
  return Stats(
    refetch_rate=need.mean(),
    key_bits=bits.mean(),
    key_bytes=(visible * bits).mean() * width / 8,
    key_bytes_f32=visible.mean() * width * 4,
  )


def _reference(whole, q_scale, keys, v, segments, *, spec):
  """The definition in a few plain lines; quadratic memory."""
  B, T, N, H = whole.shape
  S, K = v.shape[1:3]
  mask = jnp.ones((B, T, S), bool)
  if spec.causal:
    t = jnp.arange(T)[:, None] + spec.q_offset
    mask = mask & (jnp.arange(S)[None] <= t)[None]
  if segments is not None:
    mask = mask & (segments[0][:, :, None] == segments[1][:, None])
  mask = mask[:, None, None]
  q = whole.reshape(B, T, K, N // K, H).astype(jnp.float32)
  factor = jnp.einsum(
    'btkg,bsk->bkgts', q_scale.reshape(q.shape[:-1]) * spec.scale, keys.scale
  )

  def softmax_of(k):
    k = k.astype(jnp.float32)
    s = jnp.einsum('btkgh,bskh->bkgts', q, k, precision='highest') * factor
    s = jnp.where(mask, s, softmax.MASKED)
    e = jnp.where(mask, jnp.exp(s - s.max(-1, keepdims=True)), 0)
    return e / jnp.maximum(e.sum(-1, keepdims=True), 1e-30)

  part = 2.0**spec.config.low_bits
  high = softmax_of(keys.high * part + (part - 1) / 2)
  full = softmax_of(keys.high * part + keys.low)
  need = mask.any(-1) & (high.max(-1) < spec.config.threshold)
  p = jnp.where(need[..., None], full, high)
  out = jnp.einsum('bkgts,bskh->btkgh', p, v.astype(jnp.float32))
  visible = jnp.broadcast_to(mask.sum(-1), need.shape)
  need, visible = (
    jnp.moveaxis(x, 2, 3).reshape(B, K, -1) for x in (need, visible)
  )
  return out.reshape(B, T, N, -1).astype(v.dtype), (need, visible)


IMPLEMENTATIONS = {
  'xla': Implementation(on_demand_xla.attend),
  'reference': Implementation(_reference, automatic=False),
}
