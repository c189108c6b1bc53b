"""Local window plus global key blocks with a dynamic mask (`hybrid`).

Every tile of `block_q` queries reads a sliding window (and first blocks, if
asked for) and on top of it the most important other key blocks, as many as its
own attention needs (docs/mechanisms.md#hybrid): with H the entropy of its
estimated distribution over key blocks,

  count = ceil(c exp(H)), at least `min_blocks`, at most `keep` of the visible.

exp(H) is the number of blocks over which equal weights would be as spread, so
peaked rows read little and flat ones much. H comes from block means, which are
flatter than the keys they stand for: it errs towards reading more. Heads of a
group share a list, so the head with the largest H decides.

The schedule `keep(step)` moves the cap, from 1 to 0.25 for instance. At 1
nothing is restricted and the result is dense attention; in between, the count
is a mixture of the cap and of the rule above, in proportion to how far the cap
has come, so that density falls smoothly and ends at the rule.

Selection is causal as in `psa.py`: from the tile's first query and from blocks
that lie wholly at or before it. The most important blocks are taken, not a
random sample by importance, so that decoding reads what prefill reads.

No gradient flows through the choice. Not done here: the cache of decoding, and
bidirectional models.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from psa_jax import schedules
from psa_jax.attention.block_lists import (
  BlockList,
  Tiles,
  WideListConfig,
  idle_budget,
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
from psa_jax.config.fields import (
  OPTIONAL,
  POSITIVE,
  SHARE,
  UNIT,
  choice,
  number,
  schedule,
)
from psa_jax.kernels import block_scores
from psa_jax.types import AttnOut, Learned, Scalar


@dataclass(frozen=True)
class HybridConfig(WideListConfig):
  """Sliding window and global key blocks (docs/mechanisms.md#hybrid).

  Attributes:
    block_q: queries that share one block list (1 is per token).
    block_k: keys per block.
    window: tokens before each query that are always read.
    sink_blocks: first blocks of the sequence that are always read.
    keep: schedule of the cap: most blocks read beside window and sink, as a
      share of the causally visible ones, in (0, 1]. The default is 0.25
      throughout; a `length` makes it a ramp from 1.
    coefficient: c of the dynamic mask, `ceil(c exp(entropy))` blocks.
    min_blocks: its lower end, unless the cap is below.
    scoring: `mean` ranks blocks by their mean key, `bounds` by Quest's upper
      bound; entropy is always that of the means.
    max_blocks: width M of the block list; 0 means what window, sink and the
      schedule's largest cap ask for.
    eval_keep: cap used outside training; 0 means the schedule's value at the
      step being evaluated.
  """

  sink_blocks: int = number(0, OPTIONAL)
  keep: ScheduleConfig = schedule(
    ScheduleConfig(kind='linear', final=0.25), SHARE
  )
  coefficient: float = number(1.0, POSITIVE)
  min_blocks: int = number(4, OPTIONAL)
  scoring: str = choice('mean', 'mean', 'bounds')
  eval_keep: float = number(0.0, UNIT, runtime=True)

  def idle_schedule(self, path: str, *, length: int, step: int) -> str | None:
    """Where all that is left beside sink and window is read in any case."""
    keep = float(schedules.make(self.keep)(step))
    if keep >= 1:
      return None

    def acts(forced, seen):
      most = np.floor(keep * seen + 1e-3)
      return seen - forced > np.minimum(most, max(self.min_blocks, 1))

    found = idle_budget(self, length, acts)
    return found and (
      f'{path}keep asks for {keep:.3g} of the visible blocks beside sink and '
      f'window, but at {length:,} tokens these alone take {found[0]:.3g} and '
      f'what is left is always read: {found[1]}'
    )


class Spread(NamedTuple):
  """How spread the attention of each tile is.

  Attributes:
    support: exp(H) of the head with the largest H of each group.
    entropy: H in nats, the mean of the group's heads.
    capped: whether the cap cut what the tile asked for.
  """

  support: Float[Array, 'B K Tb']
  entropy: Float[Array, 'B K Tb']
  capped: Bool[Array, 'B K Tb']


def hybrid(
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B S K H'],
  v: Float[Array, 'B S K Hv'],
  *,
  config: AttentionConfig,
  context: AttentionContext,
  learned: Learned | None = None,
) -> AttnOut:
  """Attention over the window and the key blocks that a tile needs.

  Args and errors as in `attend`. The aux scalars are `density` and
  `retained_mass` as in `psa.py`, `entropy` (nats, the mean over tiles and
  heads) and `capped`, the share of tiles that asked for more than the cap.
  """
  del learned  # no parameters
  cfg, segment_ids = config.hybrid, context.segment_ids
  cap = cap_at(cfg, context.step, context.train)
  lists, spread = select_blocks(q, k, cfg, cap=cap, segment_ids=segment_ids)
  how = softmax_at(config.softmax, context.step)
  out, lse = read_blocks(
    q,
    k,
    v,
    lists.ids,
    lists.counts,
    config,
    block_q=cfg.block_q,
    block_k=cfg.block_k,
    segment_ids=segment_ids,
    how=how,
  )
  aux = {
    'density': share_read(lists),
    'retained_mass': retained_mass(q, k, lse, segment_ids, how),
    'entropy': spread.entropy.mean(),
    'capped': spread.capped.astype(jnp.float32).mean(),
  }
  return AttnOut(out, aux)


def cap_at(cfg: HybridConfig, step: Scalar, train: bool) -> jax.Array:
  """The cap at `step`, a share of the visible blocks; evaluation's own, if set.

  Returns:
    f32 scalar in (0, 1].
  """
  if not train and cfg.eval_keep:
    return jnp.float32(cfg.eval_keep)
  return schedules.make(cfg.keep)(step)


def list_width(cfg: HybridConfig, blocks: int) -> int:
  """M: entries of a block list over `blocks` key blocks (static).

  Raises:
    ConfigError: `max_blocks` is less than the sink and the window take.
  """
  limit = width_limit(cfg, blocks, 'hybrid')
  if limit:
    return limit
  most = max(schedules.upper_bound(cfg.keep), cfg.eval_keep)
  return min(cfg.forced_blocks + int(most * blocks) + 1, blocks)


def select_blocks(
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B S K H'],
  cfg: HybridConfig,
  *,
  cap: Scalar,
  segment_ids: Int[Array, 'B T'] | None = None,
) -> tuple[BlockList, Spread]:
  """The block list of every query tile, causal and streamed over tiles.

  Args:
    q: queries; only the first of every tile is used.
    k: keys; S = T.
    cfg: block sizes, window, coefficient and limits.
    cap: traced, see `cap_at`.
    segment_ids: documents; nondecreasing along T.
  """
  queries, pooled, tiles = summarise(
    q, k, cfg, segment_ids, bounds=cfg.scoring == 'bounds'
  )
  return _choose(cfg, queries, pooled, tiles, cap)


def select_for_decode(
  q: Float[Array, 'B 1 N H'],
  pooled: block_scores.Pooled,
  cfg: HybridConfig,
  *,
  positions: Int[Array, 'B'],
  cap: Scalar,
  starts: Int[Array, 'B'] | None = None,
) -> BlockList:
  """What `select_blocks` gives the query tile that begins with `q`.

  Args:
    q: the first query of each row's tile.
    pooled: summaries of the cached keys (`block_scores.append`); they may
      already know later keys of the tile.
    cfg: as in prefill.
    positions: positions of `q`, multiples of `cfg.block_q`.
    cap: as in prefill.
    starts: position of the first token of the document of `q`; None means 0.

  Returns:
    Lists of one tile (Tb is 1), for every position of that tile.
  """
  tiles = Tiles.of_decode(positions, starts)
  return _choose(cfg, q, pooled, tiles, cap)[0]


def next_blocks(
  previous: BlockList,
  q: Float[Array, 'B 1 N H'],
  pooled: block_scores.Pooled,
  cfg: HybridConfig,
  *,
  lengths: Int[Array, 'B'],
  cap: Scalar,
  starts: Int[Array, 'B'] | None = None,
) -> BlockList:
  """The lists for one more token a row; see `psa.next_blocks`.

  Args:
    previous: what the last step returned.
    q: queries of the newest tokens.
    pooled: summaries of the cached keys.
    cfg: as in prefill.
    lengths: tokens of each row, the newest included; 0 is an idle row.
    cap: as in prefill.
    starts: position of the first token of each row's document; None means 0.
  """
  select = functools.partial(
    select_for_decode, q, pooled, cfg, cap=cap, starts=starts
  )
  return renew(previous, select, cfg.block_q, lengths)


def _choose(cfg, q, pooled, tiles, cap):
  """Lists and spread of tiles whose first queries are `q`.

  Args:
    cfg: the mechanism's settings.
    q: [B, Tb, N, H].
    pooled: the summaries of all blocks.
    tiles: where they begin.
    cap: traced.
  """
  blocks = pooled.size.shape[1]
  ranges, cut = tile_ranges(cfg, tiles, blocks)
  width = list_width(cfg, blocks)
  ids, spread = block_scores.top_blocks(
    q,
    pooled,
    ranges,
    width=width,
    bounds=cfg.scoring == 'bounds',
    stop=_spread,
  )
  visible, forced, cut = (
    jnp.broadcast_to(x[:, None], ids.shape[:3])
    for x in (ranges.visible(), ranges.forced(), cut)
  )
  support, entropy = spread
  # The small constants keep rounding in f32 from moving a count.
  most = jnp.floor(cap * (visible + cut).astype(jnp.float32) + 1e-3)
  demand = jnp.ceil(cfg.coefficient * support - 1e-3)
  rule = jnp.minimum(jnp.maximum(demand, cfg.min_blocks), most)
  ruled = _share_of_the_rule(cfg, cap)
  chosen = jnp.ceil(ruled * rule + (1 - ruled) * most - 1e-3)
  counts = jnp.minimum(forced + chosen.astype(jnp.int32), visible)
  if cfg.max_blocks:
    # Blocks that a cut tile lacks take their room all the same.
    counts = jnp.minimum(counts, cfg.max_blocks - cut)
  capped = (demand > most) & (visible - forced > most)
  lists = BlockList(ids, jnp.minimum(counts, width), visible)
  return lists, Spread(support, entropy, capped)


def _share_of_the_rule(cfg: HybridConfig, cap: Scalar) -> jax.Array:
  """How far the cap has come from 1 to where its schedule ends, in [0, 1]."""
  end = schedules.last_value(cfg.keep)
  if end >= 1:
    return jnp.float32(0)
  return jnp.clip((1 - jnp.asarray(cap)) / (1 - end), 0, 1)


def _spread(scores, order):
  """[B, K, n] twice: exp(H) of the widest head, and the mean H of all.

  H = log sum exp(x) - sum p x over the blocks that are scored; 0 of none.
  """
  del order
  eligible = scores.eligible
  x = jnp.where(eligible, scores.estimate, 0)
  top = jnp.where(eligible, x, -jnp.inf).max(-1, keepdims=True)
  top = jnp.where(jnp.isfinite(top), top, 0)
  e = jnp.where(eligible, jnp.exp(x - top), 0)
  total = e.sum(-1)
  some = total > 0
  total = jnp.where(some, total, 1)
  mean = (e * (x - top)).sum(-1) / total
  entropy = jnp.where(some, jnp.log(total) - mean, 0)
  return jnp.exp(entropy.max(-1)), entropy.mean(-1)


SPEC = register(
  MechanismSpec(
    name='hybrid',
    function=hybrid,
    config=HybridConfig,
    causal_only=True,
    approximates_softmax=True,
  )
)
