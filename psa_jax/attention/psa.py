"""Progressive sparse attention (`psa`): a schedule, a block list, a kernel.

Every tile of `block_q` queries reads the first block(s) of its document (the
sink), its own blocks, a local window, and of the remaining causally visible
key blocks the most important ones: `keep(step)` of the visible blocks, or the
smallest set whose estimated softmax mass reaches `mass(step)` (the budget of
PSA, arXiv 2503.00392, in a trained layer). All heads of a group share a list.

Causal selection. What a tile reads depends only on tokens up to the tile's
*first* query: that query alone scores the blocks, and a block is scored only
when all its keys lie at or before it (nearer keys belong to the window). A
tile that pooled its own queries would leak the future through the discrete
choice, which no gradient shows, and could not be repeated when decoding.

Importance of a block: the first query's softmax over blocks of the pooled
score, summed over the heads of the group. Pooling is the mean of the keys, or
Quest's upper bound from their minima and maxima (arXiv 2406.10774). With
bounds the mass rule is a guarantee for the scoring query: a kept block holds
at least `n exp(q . mean)` (Jensen), a dropped one at most `n exp(bound)`.
With means it is an estimate; `retained_mass` in the aux scalars says what was
really kept on a few sampled queries.

No gradient flows through the choice. Not done here: decoding from a cache.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from psa_jax import schedules
from psa_jax.config import AttentionConfig, ConfigError, PsaConfig
from psa_jax.kernels.block_sparse import block_sparse_attention
from psa_jax.types import AttnOut, Scalar

TILES_AT_ONCE = 64  # query tiles scored together; bounds the score array
SAMPLES = 8  # queries whose retained mass is measured
FORCED = 1e6  # importance of a block that is always kept


class BlockList(NamedTuple):
  """Which key blocks every query tile reads.

  Attributes:
    ids: block indices, most important first, without duplicates.
    counts: how many of `ids` are read.
    visible: blocks that dense attention would read for the tile.
  """

  ids: Int[Array, 'B K Tb M']
  counts: Int[Array, 'B K Tb']
  visible: Int[Array, 'B K Tb']


def psa(
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B S K H'],
  v: Float[Array, 'B S K Hv'],
  *,
  config: AttentionConfig,
  step: Scalar,
  segment_ids: Int[Array, 'B T'] | None = None,
  train: bool = True,
) -> AttnOut:
  """Attention over the sink, the window and the most important blocks.

  Args and errors as in `base.attend`. The aux scalars are `density` (key
  blocks read as a share of the causally visible ones) and `retained_mass`
  (the share of the exact softmax mass that lies on the keys read, the mean
  over a few sampled queries).
  """
  cfg = config.psa
  blocks = select_blocks(
    q, k, cfg, budget=budget_at(cfg, step, train), segment_ids=segment_ids
  )
  out, lse = block_sparse_attention(
    q,
    k,
    v,
    checkpoint_name(blocks.ids, 'attn_ids'),
    checkpoint_name(blocks.counts, 'attn_counts'),
    block_q=cfg.block_q,
    block_k=cfg.block_k,
    q_segment_ids=segment_ids,
    kv_segment_ids=segment_ids,
    implementation=config.implementation,
  )
  # A mean of shares over rows and heads, which is the same on any mesh.
  read, visible = (
    x.sum(-1).astype(jnp.float32) for x in (blocks.counts, blocks.visible)
  )
  aux = {
    'density': (read / visible).mean(),
    'retained_mass': retained_mass(q, k, lse, segment_ids),
  }
  return AttnOut(out, aux)


def budget_at(cfg: PsaConfig, step: Scalar, train: bool) -> jax.Array:
  """The keep ratio (or the mass) at `step`; outside training its own, if set.

  Returns:
    f32 scalar in (0, 1].
  """
  if not train and cfg.eval_keep:
    return jnp.float32(cfg.eval_keep)
  schedule = cfg.keep if cfg.budget == 'ratio' else cfg.mass
  return schedules.make(schedule)(step)


def list_width(cfg: PsaConfig, blocks: int) -> int:
  """M: entries of a block list over `blocks` key blocks (static).

  Without `max_blocks` it is the largest share that the schedule asks for, so
  the lists grow with the square of the length, by a small constant: T^2 / 2048
  bytes a kv head at keep 1 and the default block sizes.

  Raises:
    ConfigError: `max_blocks` is less than the sink and the window take.
  """
  forced = min(cfg.forced_blocks, blocks)
  if cfg.max_blocks:
    if cfg.max_blocks < forced:
      raise ConfigError(
        f'attention.psa.max_blocks={cfg.max_blocks} is less than the {forced} '
        'blocks that sink and window always take; raise it or use 0'
      )
    return min(cfg.max_blocks, blocks)
  if cfg.budget == 'mass':
    return blocks
  most = max(schedules.upper_bound(cfg.keep), cfg.eval_keep)
  return min(max(forced, int(most * blocks) + 1), blocks)


def select_blocks(
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B S K H'],
  cfg: PsaConfig,
  *,
  budget: Scalar,
  segment_ids: Int[Array, 'B T'] | None = None,
) -> BlockList:
  """The block list of every query tile, causal and streamed over tiles.

  Args:
    q: queries; only the first of every tile is used.
    k: keys; S = T.
    cfg: block sizes, window, sink, scoring and kind of budget.
    budget: traced keep ratio or mass, see `budget_at`.
    segment_ids: documents; nondecreasing along T.

  Returns:
    The lists; at least sink and window are kept whatever the budget, and a
    budget of 1 keeps every visible block.
  """
  q, k = lax.stop_gradient((q, k))
  B, T, N, H = q.shape
  K = k.shape[2]
  tiles, blocks = -(-T // cfg.block_q), -(-T // cfg.block_k)
  pooled = _pool(k, cfg, segment_ids)
  first = q[:, :: cfg.block_q].reshape(B, tiles, K, N // K, H)
  start = _document_start(segment_ids, B, T)[:, :: cfg.block_q]

  group = min(TILES_AT_ONCE, tiles)
  pad = -tiles % group
  first = jnp.pad(first, [(0, 0), (0, pad)] + [(0, 0)] * 3)
  start = jnp.pad(start, ((0, 0), (0, pad)))

  def some_tiles(i):
    at = i * group
    tile = at + jnp.arange(group)
    place = _Place.of(
      cfg, tile, lax.dynamic_slice_in_dim(start, at, group, 1), T, blocks
    )
    rows = lax.dynamic_slice_in_dim(first, at, group, 1)
    return _choose(cfg, rows, pooled, place, budget)

  ids, counts, visible = lax.map(some_tiles, jnp.arange((tiles + pad) // group))

  def join(x):  # [chunks, B, K, group, *] -> [B, K, tiles, *]
    x = jnp.moveaxis(x, 0, 2)
    return x.reshape(B, K, -1, *x.shape[4:])[:, :, :tiles]

  return BlockList(join(ids), join(counts), join(visible))


class _Pooled(NamedTuple):
  """Summaries of the whole blocks of keys, [B, K, blocks, H] in f32."""

  mean: jax.Array
  low: jax.Array
  high: jax.Array
  log_size: jax.Array  # [B, K, blocks], keys that were pooled


def _pool(k, cfg, segment_ids):
  """Pools each block over the keys of its last key's document.

  A block that is scored ends before the query, so the query's document is the
  one of the block's last key, or the block lies outside it altogether.
  """
  B, S, K, H = k.shape
  pad = -S % cfg.block_k
  k = jnp.pad(k.astype(jnp.float32), ((0, 0), (0, pad), (0, 0), (0, 0)))
  k = k.reshape(B, -1, cfg.block_k, K, H)
  if segment_ids is None:
    same = jnp.ones(k.shape[:3], bool)
  else:
    seg = jnp.pad(segment_ids, ((0, 0), (0, pad)), mode='edge')
    seg = seg.reshape(B, -1, cfg.block_k)
    same = seg == seg[..., -1:]
  same = same[..., None, None]
  n = same.sum(2).astype(jnp.float32)
  pooled = _Pooled(
    mean=jnp.where(same, k, 0).sum(2) / n,
    low=jnp.where(same, k, jnp.inf).min(2),
    high=jnp.where(same, k, -jnp.inf).max(2),
    log_size=jnp.broadcast_to(jnp.log(n[..., 0]), (B, n.shape[1], K)),
  )
  return jax.tree.map(lambda x: jnp.moveaxis(x, 2, 1), pooled)


def _document_start(segment_ids, B, T):
  """[B, T] position of the first token of every token's document."""
  if segment_ids is None:
    return jnp.zeros((B, T), jnp.int32)
  new = segment_ids[:, 1:] != segment_ids[:, :-1]
  at = jnp.where(new, jnp.arange(1, T)[None], 0)
  return lax.cummax(jnp.pad(at, ((0, 0), (1, 0))), axis=1)


class _Place(NamedTuple):
  """Where the blocks lie as seen from each tile, [B, 1, tiles, blocks]."""

  eligible: jax.Array  # whole, at or before the first query: may be scored
  forced: jax.Array  # sink, window or own block: always read
  visible: jax.Array  # read by dense attention

  @classmethod
  def of(cls, cfg, tile, start, T, blocks):
    """For tiles `tile` [n] whose documents begin at `start` [B, n]."""
    j = jnp.arange(blocks).reshape(1, 1, 1, -1)
    t0 = (tile * cfg.block_q).reshape(1, 1, -1, 1)
    last = jnp.minimum(t0 + cfg.block_q, T) - 1
    begin = start[:, None, :, None] // cfg.block_k
    visible = (j >= begin) & (j <= last // cfg.block_k)
    near = j >= jnp.maximum(t0 - cfg.window + 1, 0) // cfg.block_k
    sink = j < begin + cfg.sink_blocks
    eligible = (j >= begin) & ((j + 1) * cfg.block_k - 1 <= t0)
    return cls(eligible, visible & (near | sink), visible)


def _choose(cfg, first, pooled, place, budget):
  """The lists of some tiles; `first` is [B, tiles, K, G, H]."""
  estimate, bound = _block_scores(cfg, first, pooled)
  eligible = place.eligible[..., None, :]  # beside [B, K, tiles, G, blocks]
  blocks = estimate.shape[-1]
  p = jax.nn.softmax(
    jnp.where(eligible, bound, -jnp.inf), axis=-1, where=eligible
  )
  importance = jnp.where(eligible, p, 0).sum(-2)
  rank = FORCED + jnp.arange(blocks, dtype=jnp.float32).reshape(1, 1, 1, -1)
  importance = jnp.where(place.forced, rank, importance)
  importance = jnp.where(place.visible, importance, -1)

  width = list_width(cfg, blocks)
  _, order = lax.top_k(importance, blocks if cfg.budget == 'mass' else width)
  visible = jnp.broadcast_to(place.visible.sum(-1), importance.shape[:3])
  if cfg.budget == 'mass':
    counts = _mass_counts(estimate, bound, eligible, order, budget)
    counts = jnp.where(jnp.asarray(budget) >= 1, visible, counts)
  else:
    # The small constant keeps rounding in f32 from adding a block.
    wanted = jnp.ceil(budget * visible.astype(jnp.float32) - 1e-3)
    counts = wanted.astype(jnp.int32)
  counts = jnp.maximum(counts, place.forced.sum(-1))
  counts = jnp.minimum(jnp.minimum(counts, visible), width)
  return order[..., :width].astype(jnp.int32), counts, visible


def _block_scores(cfg, first, pooled):
  """Logits of the mass of each block: an estimate, and what ranks it.

  Both are [B, K, tiles, G, blocks] and include the log of the block's size.
  With `bounds` the first is a lower and the second an upper bound.
  """
  scale = first.shape[-1] ** -0.5
  first = first.astype(jnp.float32) * scale
  size = pooled.log_size[:, :, None, None]
  mean = jnp.einsum('btkgh,bkjh->bktgj', first, pooled.mean) + size
  if cfg.scoring == 'mean':
    return mean, mean
  high = jnp.einsum('btkgh,bkjh->bktgj', jnp.maximum(first, 0), pooled.high)
  low = jnp.einsum('btkgh,bkjh->bktgj', jnp.minimum(first, 0), pooled.low)
  return mean, high + low + size


def _mass_counts(estimate, bound, eligible, order, budget):
  """Smallest prefix of `order` whose mass is at least `budget`, every head.

  Blocks that are read but not whole have mass >= 0 in truth and are taken as
  0 here, so the true share is at least the one that stops.
  """
  top = jnp.max(jnp.where(eligible, bound, -jnp.inf), -1, keepdims=True)
  top = jnp.where(jnp.isfinite(top), top, 0)
  kept = jnp.where(eligible, jnp.exp(estimate - top), 0)
  left = jnp.where(eligible, jnp.exp(bound - top), 0)
  order = order[..., None, :]
  kept = jnp.cumsum(jnp.take_along_axis(kept, order, -1), -1)
  left = jnp.take_along_axis(left, order, -1)
  # After n + 1 blocks: what is kept, and what the later ones may hold. The
  # suffix sums are exactly 0 after the last, so the rule always ends.
  left = lax.cumsum(left, axis=left.ndim - 1, reverse=True)
  left = jnp.pad(left[..., 1:], [(0, 0)] * (left.ndim - 1) + [(0, 1)])
  short = kept * (1 - budget) < budget * left
  return 1 + short.sum(-1).max(-1)


def retained_mass(
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B S K H'],
  lse: Float[Array, 'B T N'],
  segment_ids: Int[Array, 'B T'] | None = None,
) -> jax.Array:
  """Share of the exact softmax mass that was read, on a few sampled queries.

  Args:
    q: queries.
    k: all keys; S = T.
    lse: log-sum-exp of the scores that were read.
    segment_ids: documents.

  Returns:
    f32 scalar, the mean over rows, heads and `SAMPLES` evenly spread queries.
    Costs `SAMPLES` rows of dense attention.
  """
  q, k, lse = lax.stop_gradient((q, k, lse))
  B, T, N, H = q.shape
  K = k.shape[2]
  k = k.astype(jnp.float32)
  keys = jnp.arange(T)

  def one(t):
    row = q[:, t].reshape(B, K, N // K, H).astype(jnp.float32) * H**-0.5
    s = jnp.einsum('bkgh,bskh->bkgs', row, k)
    seen = (keys <= t)[None]
    if segment_ids is not None:
      seen = seen & (segment_ids == segment_ids[:, t][:, None])
    full = jax.nn.logsumexp(s, axis=-1, where=seen[:, None, None])
    return jnp.exp(lse[:, t].astype(jnp.float32) - full.reshape(B, N)).mean()

  samples = min(SAMPLES, T)
  at = (jnp.arange(samples) * 2 + 1) * T // (2 * samples)
  return lax.map(one, at).mean()
