"""Token-level top-k attention with a polynomial softmax (`topk`).

Every query keeps the `k = max(1, floor(keep * n))` largest raw scores of the n
keys it sees (its own past in a causal model, of its own document), and weighs
them by the softmax of `e = a3 s^3 + a2 s^2 + a1 s + a0` of the clamped score
(docs/mechanisms.md#topk; keeping the k largest is Gupta et al. 2021, arXiv
2106.06899). Keys that are masked or not kept have weight exactly 0.

Three things move with the step: `keep` (1 is dense), `mix`, which leads the
coefficients from those of the plain softmax, (0, 1, 0, 0), to the configured or
learned ones, and the learned ones themselves. `sparsify` thins queries and keys
to their largest channels, with a straight-through gradient.

All visible pairs are scored, or the largest would not be known; `density` is
the share of them that is read beyond that. No gradient flows through the
choice. Not done here: the cache of decoding, and sampling keys.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from psa_jax import schedules
from psa_jax.attention import block_lists
from psa_jax.attention.context import AttentionContext
from psa_jax.attention.registry import MechanismSpec, register
from psa_jax.attention.softmax import SOFTMAX, mixed
from psa_jax.config import (
  AttentionConfig,
  MechanismConfig,
  ModelConfig,
  ScheduleConfig,
)
from psa_jax.config.attention import check_cubic
from psa_jax.config.fields import (
  OPTIONAL,
  REAL,
  SHARE,
  UNIT,
  number,
  schedule,
)
from psa_jax.kernels import topk as engine
from psa_jax.kernels.softmax import polynomial
from psa_jax.kernels.topk_attention import topk_attention
from psa_jax.types import AttnOut, Learned, Scalar


@dataclass(frozen=True)
class TopkConfig(MechanismConfig):
  """Token-level top-k, polynomial softmax (docs/mechanisms.md#topk).

  Attributes:
    keep: schedule of the share of its visible keys that a query keeps, in
      (0, 1]. The default is 0.25 throughout; a `length` makes it a ramp from 1.
    coefficients: a0 to a3 of the polynomial, ascending; (0, 1, 0, 0) is the
      plain softmax.
    mix: schedule of the share of these coefficients, in [0, 1]; the rest is
      the plain softmax.
    learnable: the coefficients are where a layer's own start from.
    clamp: scores are cut to [-clamp, clamp] before the polynomial; 0 is off.
    sparsify_q, sparsify_k: share of the channels of each query and key that
      stay, the largest in magnitude.
    eval_keep: keep ratio used outside training; 0 means the schedule's value
      at the step being evaluated.
  """

  keep: ScheduleConfig = schedule(
    ScheduleConfig(kind='linear', final=0.25), SHARE
  )
  coefficients: tuple[float, ...] = number((0.0, 1.0, 0.0, 0.0), REAL)
  mix: ScheduleConfig = schedule(ScheduleConfig(), UNIT)
  learnable: bool = False
  clamp: float = number(0.0, OPTIONAL)
  sparsify_q: float = number(1.0, SHARE)
  sparsify_k: float = number(1.0, SHARE)
  eval_keep: float = number(0.0, UNIT, runtime=True)

  def check(self, path: str) -> Iterator[str]:
    """A cubic has four coefficients."""
    return check_cubic(path, self.coefficients)


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


def coefficients_of(
  config: ModelConfig, *, rngs: nnx.Rngs
) -> Coefficients | None:
  """The module, or None where the coefficients are not learned."""
  del rngs  # nothing is random
  return Coefficients(config) if config.attention.topk.learnable else None


class SparseWeights(NamedTuple):
  """Weights of the kept entries of every row, in the order of their positions.

  Attributes:
    weights: [..., M] f32, sum 1 a row; 0 past the count.
    indices: [..., M] int32, ascending; n, one past the last entry, past the
      count.
  """

  weights: Float[Array, '*rows M']
  indices: Int[Array, '*rows M']


def topk(
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B S K H'],
  v: Float[Array, 'B S K Hv'],
  *,
  config: AttentionConfig,
  context: AttentionContext,
  learned: Learned | None = None,
) -> AttnOut:
  """Attention over the best keys of every query; see `attend`.

  The aux scalars are `density` (keys kept as a share of the visible ones) and
  `mix`.
  """
  cfg, (B, T) = config.topk, q.shape[:2]
  segment_ids, step = context.segment_ids, context.step
  begin = block_lists.document_start(segment_ids, B, T)
  if context.causal:
    end = jnp.broadcast_to(jnp.arange(1, T + 1)[None], (B, T))
  else:
    end = block_lists.document_end(segment_ids, B, T)
  counts = kept_counts(end - begin, keep_at(cfg, step, context.train))
  out = topk_attention(
    sparsify(q, keep=cfg.sparsify_q),
    sparsify(k, keep=cfg.sparsify_k),
    v,
    coefficients_at(cfg, step, learned),
    begin=begin,
    end=end,
    counts=counts,
    causal=context.causal,
    max_count=most_kept(cfg, k.shape[1]),
    clamp=cfg.clamp,
    implementation=config.implementation,
  )
  visible = (end - begin).astype(jnp.float32)
  dropped = (end - begin - counts).astype(jnp.float32) / visible
  aux = {'density': 1 - dropped.mean(), 'mix': schedules.make(cfg.mix)(step)}
  return AttnOut(out, aux)


def decode(
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B S K H'],
  v: Float[Array, 'B S K Hv'],
  *,
  config: AttentionConfig,
  lengths: Int[Array, 'B'],
  step: Scalar,
  starts: Int[Array, 'B'] | None = None,
  learned: Learned | None = None,
) -> Float[Array, 'B T N Hv']:
  """The newest queries over a cache: what `topk` gives these tokens.

  Args:
    q: queries of the newest tokens; query `t` of row `b` is at position
      `lengths[b] - T + t`.
    k: cached keys, those of the new tokens included; S is the cache's room.
    v: cached values.
    config: as in training.
    lengths: tokens of each row, the new ones included; 0 is an idle row.
    step: of the schedules.
    starts: position of the first token of each row's document; None means 0.
    learned: as in training.

  Returns:
    The output; 0 for a query before position 0.
  """
  cfg, T = config.topk, q.shape[1]
  first = lengths.astype(jnp.int32)[:, None] - T
  end = jnp.maximum(first + jnp.arange(1, T + 1)[None], 0)
  begin = jnp.zeros_like(end)
  if starts is not None:
    begin = jnp.minimum(begin + starts[:, None], end)
  return topk_attention(
    sparsify(q, keep=cfg.sparsify_q),
    sparsify(k, keep=cfg.sparsify_k),
    v,
    coefficients_at(cfg, step, learned),
    begin=begin,
    end=end,
    counts=kept_counts(end - begin, keep_at(cfg, step, train=False)),
    causal=False,
    max_count=most_kept(cfg, k.shape[1]),
    clamp=cfg.clamp,
    implementation=config.implementation,
  )


def topk_cross(
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B S K H'],
  v: Float[Array, 'B S K Hv'],
  *,
  lengths: Int[Array, 'B'],
  config: AttentionConfig,
  context: AttentionContext,
  learned: Learned | None = None,
) -> AttnOut:
  """The best of the first `lengths` keys; see `registry.CrossFunction`.

  Of n keys a query keeps max(1, floor(keep * n)).
  """
  cfg, (B, T) = config.topk, q.shape[:2]
  mesh = jax.sharding.get_abstract_mesh()
  # XLA splits its own program over devices, not a kernel.
  single = mesh.empty or mesh.size == 1
  end = jnp.broadcast_to(lengths.astype(jnp.int32)[:, None], (B, T))
  counts = kept_counts(end, keep_at(cfg, context.step, context.train))
  out = topk_attention(
    sparsify(q, keep=cfg.sparsify_q),
    sparsify(k, keep=cfg.sparsify_k),
    v,
    coefficients_at(cfg, context.step, learned),
    begin=jnp.zeros_like(end),
    end=end,
    counts=counts,
    causal=False,
    max_count=most_kept(cfg, k.shape[1]),
    clamp=cfg.clamp,
    implementation=config.implementation if single else 'xla',
  )
  share = counts.astype(jnp.float32) / jnp.maximum(end, 1)
  return AttnOut(out, {'cross_density': share.mean()})


def keep_at(cfg: TopkConfig, step: Scalar, train: bool) -> jax.Array:
  """The keep ratio at `step`; outside training its own, if set."""
  if not train and cfg.eval_keep:
    return jnp.float32(cfg.eval_keep)
  return schedules.make(cfg.keep)(step)


def kept_counts(
  visible: Int[Array, '*rows'], keep: Scalar
) -> Int[Array, '*rows']:
  """max(1, floor(keep * visible)), and never more than are visible."""
  # The small constant keeps rounding in f32 from dropping a key.
  counts = jnp.floor(keep * visible.astype(jnp.float32) + 1e-3)
  return jnp.minimum(jnp.maximum(counts.astype(jnp.int32), 1), visible)


def most_kept(cfg: TopkConfig, keys: int) -> int:
  """A static bound on what any query keeps of `keys` keys at any step."""
  most = max(schedules.upper_bound(cfg.keep), cfg.eval_keep)
  return min(int(most * keys) + 1, keys)


def coefficients_at(
  cfg: TopkConfig, step: Scalar, learned: Learned | None
) -> Float[Array, '4']:
  """a0 to a3 at `step`: `mix` of the configured or learned, else softmax's."""
  target = jnp.asarray(cfg.coefficients, jnp.float32)
  if cfg.learnable and learned is not None:
    target = learned.weights['coefficients'].astype(jnp.float32)
  mix = schedules.make(cfg.mix)(step)
  return mixed(target, mix)


def sparsify(
  x: Float[Array, '*rows H'], *, keep: float
) -> Float[Array, '*rows H']:
  """Keeps the largest-magnitude channels of each row; the rest become 0.

  Args:
    x: queries or keys.
    keep: share of the channels, of which max(1, floor(keep * H)) stay; ties go
      to the lower channel. 1 returns `x`.

  Returns:
    `x` with zeros. The gradient is straight-through, that of the identity:
    with the true one a channel that is dropped once would never move.
  """
  channels = x.shape[-1]
  count = max(1, int(keep * channels + 1e-3))
  if count >= channels:
    return x
  magnitude = lax.stop_gradient(jnp.abs(x))
  thin = jnp.where(engine.select(magnitude, count), x, 0)
  # Exactly `thin` in value: x + (x - x) where kept, x + (0 - x) where not.
  return x + lax.stop_gradient(thin - x)


def sparse_poly_softmax(
  x: Float[Array, '*rows n'],
  top_k: Int[Array, '*#rows'] | int,
  coeffs: Float[Array, '4'] | tuple[float | int, ...] = SOFTMAX,
  *,
  clamp: float = 0.0,
  max_k: int | None = None,
  implementation: str = 'auto',
) -> SparseWeights:
  """Softmax of a polynomial over the k largest entries of every row.

  Selection is O(n) and what follows O(k). Differentiable in `x` and `coeffs`.

  Args:
    x: raw scores; -inf is masked and gets weight exactly 0.
    top_k: how many to keep, an int or an array that broadcasts to the rows;
      an array may be traced.
    coeffs: a0 to a3, ascending; the default is the plain softmax.
    clamp: entries are cut to [-clamp, clamp] after they were chosen; 0 is off.
    max_k: M, the width of the result; None means `top_k`, then an int.
    implementation: of the engine, `psa_jax/kernels/topk`.

  Returns:
    Weights and indices. A row of which nothing is kept has weights 0.

  Raises:
    ValueError: see `kernels.topk.top_k`.
  """
  a0, *rest = jnp.asarray(coeffs, jnp.float32)
  coeffs = jnp.stack([lax.stop_gradient(a0), *rest])
  best = engine.top_k(x, top_k, max_k=max_k, implementation=implementation)
  slots = jnp.arange(best.values.shape[-1])
  slots = slots.reshape((1,) * (x.ndim - 1) + slots.shape)
  real = (slots < best.count[..., None]) & (best.values > -jnp.inf)
  s = jnp.where(real, best.values, 0).astype(jnp.float32)
  e = polynomial(s, coeffs, clamp=clamp or math.inf)
  e = jnp.where(real, e, -jnp.inf)
  top = lax.stop_gradient(e.max(-1, keepdims=True))
  weights = jnp.exp(jnp.where(real, e - top, -jnp.inf))
  total = weights.sum(-1, keepdims=True)
  weights = weights / jnp.where(total > 0, total, 1)
  return SparseWeights(weights, best.indices)


SPEC = register(
  MechanismSpec(
    name='topk',
    function=topk,
    config=TopkConfig,
    parameters=coefficients_of,
    axes={'coefficients': ('power',)},
    cross=topk_cross,
    reads_norm=False,  # the coefficients depend on no token
  )
)
