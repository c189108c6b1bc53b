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
Decoding selects once a tile (`next_blocks`) and reads what prefill reads.

`kernels/block_scores` ranks the blocks: by their mean key, or with `bounds` by
Quest's upper bound (arXiv 2406.10774). With bounds the mass rule is a guarantee
for the scoring query: a kept block holds at least `n exp(q . mean)` (Jensen), a
dropped one at most `n exp(bound)`. With means it is an estimate;
`retained_mass` in the aux scalars says what was really kept on a few sampled
queries.

Two controls choose without looking at the keys, at the same budget: `recent`
takes the nearest blocks (sink and local window only), `random` takes any
(`controls.py`).

No gradient flows through the choice. Not done here: the cache of decoding.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from psa_jax import schedules
from psa_jax.attention import controls
from psa_jax.attention.block_lists import (
  BlockList,
  Tiles,
  WideListConfig,
  check_ratio,
  idle_budget,
  idle_text,
  read_blocks,
  renew,
  retained_mass,
  share_read,
  summarise,
  tile_ranges,
  width_limit,
)
from psa_jax.attention.context import AttentionContext
from psa_jax.attention.registry import MechanismSpec, register
from psa_jax.attention.softmax import softmax_at
from psa_jax.config import AttentionConfig, ScheduleConfig
from psa_jax.config.fields import SHARE, UNIT, choice, number, schedule
from psa_jax.kernels import block_scores
from psa_jax.types import AttnOut, Learned, Scalar


@dataclass(frozen=True)
class PsaConfig(WideListConfig):
  """Progressive sparse attention (docs/mechanisms.md#psa).

  Attributes:
    block_q: queries that share one block list (1 is per token).
    block_k: keys per block.
    window: tokens before each query that are always read.
    sink_blocks: first blocks of the sequence that are always read.
    budget: `ratio` keeps `keep(step)` of the causally visible blocks;
      `mass` keeps the smallest set whose estimated softmax mass reaches
      `mass(step)`.
    keep, mass: the schedules of the two budgets, in (0, 1].
    scoring: `mean` pools keys by their mean; `bounds` by their minimum and
      maximum per channel (Quest), which makes the mass rule a guarantee.
      Controls for the ratio budget: `recent` takes the nearest blocks, so all
      of the budget is sink and window, `random` takes any, others every step.
    max_blocks: width M of the block list; 0 means what the schedule's
      largest budget asks for, a share of the sequence's blocks.
    eval_keep: keep ratio (or mass) used outside training; 0 means the
      schedule's value at the step being evaluated.
  """

  budget: str = choice('ratio', 'ratio', 'mass')
  keep: ScheduleConfig = schedule(ScheduleConfig(), SHARE)
  mass: ScheduleConfig = schedule(ScheduleConfig(), SHARE)
  scoring: str = choice('mean', 'mean', 'bounds', 'random', 'recent')
  eval_keep: float = number(0.0, UNIT, runtime=True)

  def check(self, path: str) -> Iterator[str]:
    """A budget of mass needs a scorer that estimates mass."""
    yield from super().check(path)
    if self.budget == 'mass' and self.scoring in controls.SCORINGS:
      yield (
        f'{path}budget is mass, but scoring={self.scoring} estimates no mass; '
        'use budget=ratio'
      )

  def check_run(self, path: str, run: Any) -> Iterator[str]:
    """A budget of mass has a target."""
    yield from super().check_run(path, run)
    if self.budget == 'mass' and self.mass == ScheduleConfig():
      yield (
        f'{path}budget is mass, but psa.mass is constant 1, which keeps every '
        'block; set for instance psa.mass.init=0.9 and psa.mass.final=0.9'
      )

  def check_budget(self, path: str) -> Iterator[str]:
    """A controller sets a ratio, in place of the schedule."""
    return check_ratio(path, self.budget, self.keep)

  def idle_schedule(self, path: str, *, length: int, step: int) -> str | None:
    """A ratio that sink and window exceed; a mass depends on the data."""
    keep = float(schedules.make(self.keep)(step))
    if self.budget != 'ratio' or keep >= 1:
      return None
    found = idle_budget(
      self, length, lambda forced, seen: np.ceil(keep * seen - 1e-3) > forced
    )
    return idle_text(f'{path}keep', keep, length, found)


def psa(
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B S K H'],
  v: Float[Array, 'B S K Hv'],
  *,
  config: AttentionConfig,
  context: AttentionContext,
  learned: Learned | None = None,
) -> AttnOut:
  """Attention over the sink, the window and the most important blocks.

  Args and errors as in `attend`. The aux scalars are `density` (key
  blocks read as a share of the causally visible ones) and `retained_mass`
  (the share of the exact softmax mass that lies on the keys read, the mean
  over a few sampled queries), and `budget`, the keep ratio (or mass) used.
  """
  del learned  # no parameters
  cfg, segment_ids = config.psa, context.segment_ids
  budget = budget_at(cfg, context.step, context.train, context.budget)
  blocks = select_blocks(
    q,
    k,
    cfg,
    budget=budget,
    segment_ids=segment_ids,
    seed=context.step if context.train else 0,
  )
  how = softmax_at(config.softmax, context.step)
  out, lse = read_blocks(
    q,
    k,
    v,
    blocks.ids,
    blocks.counts,
    config,
    block_q=cfg.block_q,
    block_k=cfg.block_k,
    segment_ids=segment_ids,
    how=how,
  )
  aux = {
    'density': share_read(blocks),
    'retained_mass': retained_mass(q, k, lse, segment_ids, how),
    'budget': budget,
  }
  return AttnOut(out, aux)


def budget_at(
  cfg: PsaConfig, step: Scalar, train: bool, budget: Scalar | None = None
) -> jax.Array:
  """The keep ratio (or the mass) at `step`; outside training its own, if set.

  Args:
    cfg: the schedules.
    step: optimiser step.
    train: whether this is a training step.
    budget: takes the place of the schedule, if given.

  Returns:
    f32 scalar in (0, 1].
  """
  if not train and cfg.eval_keep:
    return jnp.float32(cfg.eval_keep)
  if budget is not None:
    return jnp.asarray(budget, jnp.float32)
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
  limit = width_limit(cfg, blocks, 'psa')
  if limit:
    return limit
  if cfg.budget == 'mass':
    return blocks
  most = max(schedules.upper_bound(cfg.keep), cfg.eval_keep)
  return min(max(cfg.forced_blocks, int(most * blocks) + 1), blocks)


def select_blocks(
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B S K H'],
  cfg: PsaConfig,
  *,
  budget: Scalar,
  segment_ids: Int[Array, 'B T'] | None = None,
  seed: Scalar = 0,
) -> BlockList:
  """The block list of every query tile, causal and streamed over tiles.

  Args:
    q: queries; only the first of every tile is used.
    k: keys; S = T.
    cfg: block sizes, window, sink, scoring and kind of budget.
    budget: traced keep ratio or mass, see `budget_at`.
    segment_ids: documents; nondecreasing along T.
    seed: of random scoring: the step in training, 0 (as in decoding) outside.

  Returns:
    The lists; at least sink and window are kept whatever the budget, and a
    budget of 1 keeps every visible block.
  """
  queries, pooled, tiles = summarise(
    q, k, cfg, segment_ids, bounds=cfg.scoring == 'bounds'
  )
  return _choose(cfg, queries, pooled, tiles, budget, seed)


def select_for_decode(
  q: Float[Array, 'B 1 N H'],
  pooled: block_scores.Pooled,
  cfg: PsaConfig,
  *,
  positions: Int[Array, 'B'],
  budget: Scalar,
  starts: Int[Array, 'B'] | None = None,
) -> BlockList:
  """What `select_blocks` gives the query tile that begins with `q`.

  Args:
    q: the first query of each row's tile.
    pooled: summaries of the cached keys (`block_scores.append`); they may
      already know later keys of the tile.
    cfg: as in prefill.
    positions: positions of `q`, multiples of `cfg.block_q`.
    budget: as in prefill.
    starts: position of the first token of the document of `q`; None means 0.

  Returns:
    Lists of one tile (Tb is 1), for every position of that tile.
  """
  tiles = Tiles.of_decode(positions, starts)
  return _choose(cfg, q, pooled, tiles, budget)


def next_blocks(
  previous: BlockList,
  q: Float[Array, 'B 1 N H'],
  pooled: block_scores.Pooled,
  cfg: PsaConfig,
  *,
  lengths: Int[Array, 'B'],
  budget: Scalar,
  starts: Int[Array, 'B'] | None = None,
) -> BlockList:
  """The lists for one more token a row.

  Rows whose newest token begins a query tile select anew, the others keep
  what they have; if none does, nothing is scored.

  Args:
    previous: what the last step returned. Before the first one, the list of
      the tile that the prompt ends in (`select_for_decode` with that tile's
      first query); any of that shape if the prompt ends with a whole tile.
    q: queries of the newest tokens.
    pooled: summaries of the cached keys.
    cfg: as in prefill.
    lengths: tokens of each row, the newest included; 0 is an idle row.
    budget: as in prefill.
    starts: position of the first token of each row's document; None means 0.
  """
  select = functools.partial(
    select_for_decode, q, pooled, cfg, budget=budget, starts=starts
  )
  return renew(previous, select, cfg.block_q, lengths)


def _choose(cfg, q, pooled, tiles, budget, seed=0):
  """The lists of tiles whose first queries are `q`.

  Args:
    cfg: the mechanism's settings.
    q: [B, Tb, N, H].
    pooled: the summaries of all blocks.
    tiles: where they begin.
    budget: traced.
    seed: traced, of random scoring.
  """
  blocks = pooled.size.shape[1]
  if cfg.scoring in controls.SCORINGS:
    at = jnp.broadcast_to(tiles.first, tiles.starts.shape)
    q, pooled = controls.blind(q, pooled, at, scoring=cfg.scoring, seed=seed)
  ranges, cut = tile_ranges(cfg, tiles, blocks)
  mass = functools.partial(_mass_counts, budget=budget)
  width = list_width(cfg, blocks)
  ids, counts = block_scores.top_blocks(
    q,
    pooled,
    ranges,
    width=width,
    bounds=cfg.scoring == 'bounds',
    stop=mass if cfg.budget == 'mass' else None,
  )
  visible, forced, cut = (
    jnp.broadcast_to(x[:, None], ids.shape[:3])
    for x in (ranges.visible(), ranges.forced(), cut)
  )
  if counts is None:
    # The small constant keeps rounding in f32 from adding a block.
    kept = jnp.ceil(budget * (visible + cut).astype(jnp.float32) - 1e-3)
    counts = kept.astype(jnp.int32) - cut
  else:
    counts = jnp.where(jnp.asarray(budget) >= 1, visible, counts)
  counts = jnp.minimum(jnp.maximum(counts, forced), visible)
  if cfg.max_blocks:
    # Blocks that a cut tile lacks take their room all the same.
    counts = jnp.minimum(counts, cfg.max_blocks - cut)
  return BlockList(ids, jnp.minimum(counts, width), visible)


def _mass_counts(scores, order, budget):
  """Smallest prefix of `order` whose mass is at least `budget`, every head.

  Blocks that are read but not whole have mass >= 0 in truth and are taken as
  0 here, so the true share is at least the one that stops. Masses are compared
  by their logarithms: in f32 they are 0 themselves where an estimate lies 104
  below the largest bound, and 0 against 0 would stop too early.
  """
  estimate, bound, eligible = scores
  blocks, share = bound.shape[-1], jnp.asarray(budget, jnp.float32)
  top = jnp.max(jnp.where(eligible, bound, -jnp.inf), -1, keepdims=True)
  top = jnp.where(jnp.isfinite(top), top, 0)
  kept, rest = (
    jnp.take_along_axis(
      jnp.where(eligible, x - top, -jnp.inf), order[..., None, :], -1
    )
    for x in (estimate, bound)
  )
  place = jnp.arange(blocks).reshape((1,) * (kept.ndim - 1) + (-1,))

  def halve(_, bracket):
    low, high = bracket
    count = (low + high) // 2
    inside = place < count[..., None]
    has = jax.nn.logsumexp(jnp.where(inside, kept, -jnp.inf), axis=-1)
    left = jax.nn.logsumexp(jnp.where(inside, -jnp.inf, rest), axis=-1)
    short = has + jnp.log1p(-share) < jnp.log(share) + left
    return jnp.where(short, count + 1, low), jnp.where(short, high, count)

  low = jnp.ones(kept.shape[:-1], jnp.int32)
  bracket = low, jnp.full_like(low, blocks)  # all blocks leave nothing
  return lax.fori_loop(0, blocks.bit_length(), halve, bracket)[1].max(-1)


SPEC = register(
  MechanismSpec(
    name='psa',
    function=psa,
    config=PsaConfig,
    causal_only=True,
    takes_budget=True,
    approximates_softmax=True,
  )
)
