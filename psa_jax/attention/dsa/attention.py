"""Sparse attention by a learned indexer (`dsa`), DSA of DeepSeek-V3.2-Exp.

arXiv 2512.02556: a small indexer scores every earlier token,

  I[t, s] = sum_j w[t, j] relu(qI[t, j] . kI[s])

and attention reads the best ones; all heads read the same. The choice has no
gradient, so the indexer learns from a loss of its own (`loss/index_kl` in the
aux scalars, see `kernels/indexer`): the divergence of the attention of all
heads together from softmax(I). Two stages, by the step:

* before `warmup_steps`: attention is dense, the divergence is over all visible
  keys, and only the indexer trains (`train.optim.freeze`);
* from then on: attention is sparse, the divergence is over the keys that were
  read, everything trains. The indexer's input is detached, the attention is a
  constant of its loss: it learns from the divergence only, the model from the
  text only.

Both are one program. In stage 1 it still works out the gradient of the frozen
model and drops it.

The keys are chosen by blocks, for a tile of queries at a time, as `psa` does
it and with the same guarantees: the tile's first query scores the blocks that
lie wholly at or before it, a block by the pooled scores of its tokens; sink,
own blocks and a local window are always read. With `block_q = block_k = 1`,
`window = 1` and no sink that is the paper's choice of tokens for every query:
the best of all up to its own, which competes like the others unless
`keep_self`. Lists take T * top_k numbers then. A tile that the end of the
sequence cuts counts as a whole one, as in `psa`: everything is read once
`top_k` covers the whole of it.

The indexer's own cost stays O(T^2 / block_q) products, and O(T^2) in stage 1;
nothing is of size T x T in memory. Cached decoding: `select_for_decode`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from psa_jax import schedules
from psa_jax.attention.block_lists import (
  BlockList,
  BlockListConfig,
  Tiles,
  check_ratio,
  idle_budget,
  idle_text,
  read_blocks,
  retained_mass,
  share_read,
  tile_ranges,
)
from psa_jax.attention.context import AttentionContext
from psa_jax.config import AttentionConfig, ScheduleConfig
from psa_jax.config.fields import (
  COUNT,
  COUNTED,
  OPTIONAL,
  SHARE,
  choice,
  number,
  schedule,
)
from psa_jax.kernels import dense as dense_lib
from psa_jax.kernels import indexer, topk
from psa_jax.kernels.block_scores import Ranges
from psa_jax.kernels.indexer import Index
from psa_jax.types import AttnOut, Learned, Scalar

HEAD_AXIS = 'tensor'  # mesh axis that splits the heads inside `attend`
DENSE_TILE = 128, 512  # queries and keys of a tile of the dense divergence
FIRST, LAST = 1e30, -1e30  # importance that no score can have


@dataclass(frozen=True)
class DsaConfig(BlockListConfig):
  """A learned indexer chooses the keys (docs/mechanisms.md#dsa).

  `block_q=1, block_k=1, window=1, sink_blocks=0` is the paper's choice of
  tokens for every query; it is exact, and slow.

  Attributes:
    heads, width: J heads of the indexer, and the channels of each.
    block_q, block_k, window, sink_blocks: as in `PsaConfig`.
    keep_self: where every query chooses single tokens and the window is 1, it
      reads its own whatever its score; the paper's does not. Larger tiles,
      blocks and windows hold it and are always read.
    budget: `tokens` reads `top_k(step)` keys a query, `ratio` reads
      `keep(step)` of the causally visible blocks.
    top_k, keep: the schedules of the two budgets.
    pooling: a block's score: the `max` or `sum` of its tokens' scores, or their
      `mass`, the logarithm of the sum of their exponentials.
    warmup_steps: steps of stage 1: attention is dense and only the indexer
      trains. Then stage 2: sparse attention, and everything trains.
    eval_budget: budget used outside training; 0 means the schedule's.
  """

  heads: int = number(4, COUNT)
  width: int = number(32, COUNT)
  keep_self: bool = False
  budget: str = choice('tokens', 'tokens', 'ratio')
  top_k: ScheduleConfig = schedule(ScheduleConfig(init=2048.0), COUNTED)
  keep: ScheduleConfig = schedule(ScheduleConfig(), SHARE)
  pooling: str = choice('max', 'max', 'sum', 'mass')
  warmup_steps: int = number(0, OPTIONAL)
  eval_budget: float = number(0.0, '[0, 1073741824]', runtime=True)

  @property
  def self_competes(self) -> bool:
    """Whether a query's own token is chosen by its score."""
    one = self.block_q == self.block_k == self.window == 1
    return one and not self.keep_self

  @property
  def frozen_steps(self) -> int:
    """Stage 1: only the indexer trains."""
    return self.warmup_steps

  def check(self, path: str) -> Iterator[str]:
    """The width has pairs of channels; a share is at most 1."""
    yield from super().check(path)
    if self.width % 2:
      yield (
        f'{path}width is {self.width}, but rotary positions need an even one'
      )
    if self.budget == 'ratio' and self.eval_budget > 1:
      yield (
        f'{path}eval_budget is {self.eval_budget:g}, but with budget=ratio it '
        'must be in [0, 1]'
      )

  def check_budget(self, path: str) -> Iterator[str]:
    """A controller sets a ratio, in place of the schedule."""
    return check_ratio(path, self.budget, self.keep)

  def idle_schedule(self, path: str, *, length: int, step: int) -> str | None:
    """A ratio, or a number of tokens, that sink and window exceed."""
    budget = float(budget_at(self, step, True))
    tokens = self.budget == 'tokens'
    share = min(budget / length, 1.0) if tokens else budget
    if self.self_competes or share >= 1:
      return None

    def acts(forced, seen):
      kept = budget / self.block_k if tokens else budget * seen
      return np.minimum(np.ceil(kept - 1e-3), seen) > forced

    key = f'{path}{"top_k" if tokens else "keep"}'
    return idle_text(key, share, length, idle_budget(self, length, acts))


def dsa(
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B S K H'],
  v: Float[Array, 'B S K Hv'],
  *,
  config: AttentionConfig,
  context: AttentionContext,
  learned: Learned | None = None,
) -> AttnOut:
  """Attention over what the indexer chose; see `attend`.

  `learned.tokens` are the fields of `Index`. The aux scalars are those of
  `psa`; `budget` is in tokens or a share of the visible blocks, as the
  configuration has it. In training there is `loss/index_kl` too, in nats a
  query.
  """
  assert learned is not None  # the spec needs it
  cfg, train = config.dsa, context.train
  step, segment_ids = context.step, context.segment_ids
  index = Index(**learned.tokens)
  budget = budget_at(cfg, step, train, context.budget)

  def sparse():
    return _sparse(q, k, v, index, config, budget, segment_ids, train)

  def dense():
    return _dense(q, k, v, index, config, segment_ids, train)

  if cfg.warmup_steps:
    early = jnp.asarray(step) < cfg.warmup_steps
    out, lse, density, kl = lax.cond(early, dense, sparse)
  else:
    out, lse, density, kl = sparse()
  aux = {
    'density': density,
    'retained_mass': retained_mass(q, k, lse, segment_ids),
    'budget': budget,
  }
  return AttnOut(out, aux | ({'loss/index_kl': kl} if train else {}))


def _sparse(q, k, v, index, config, budget, segment_ids, train):
  """Output, log-sum-exp, density and divergence of stage 2."""
  cfg = config.dsa
  blocks = select_blocks(index, cfg, budget=budget, segment_ids=segment_ids)
  # Named here as well, for the divergence reads the lists too.
  blocks = blocks._replace(
    ids=checkpoint_name(blocks.ids, 'attn_ids'),
    counts=checkpoint_name(blocks.counts, 'attn_counts'),
  )
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
  )
  density = share_read(blocks)
  lists = blocks.ids[:, 0], blocks.counts[:, 0]
  tile = cfg.block_q, cfg.block_k
  kl = _divergence(index, q, k, lse, lists, tile, segment_ids, train)
  return out, lse, density, kl


def _dense(q, k, v, index, config, segment_ids, train):
  """The same of stage 1, over all visible keys."""
  known = config.implementation in dense_lib.IMPLEMENTATIONS
  out, lse = dense_lib.dense_attention(
    q,
    k,
    v,
    q_segment_ids=segment_ids,
    kv_segment_ids=segment_ids,
    implementation=config.implementation if known else 'auto',
  )
  B, T = q.shape[:2]
  tile = tuple(min(size, T) for size in DENSE_TILE)
  tiles, blocks = (-(-T // size) for size in tile)
  ids = jnp.broadcast_to(jnp.arange(blocks)[None, None], (B, tiles, blocks))
  last = jnp.arange(1, tiles + 1) * tile[0] - 1
  counts = jnp.minimum(last // tile[1] + 1, blocks)[None]
  lists = ids, jnp.broadcast_to(counts, (B, tiles))
  kl = _divergence(index, q, k, lse, lists, tile, segment_ids, train)
  return out, lse, jnp.float32(1), kl


def _divergence(index, q, k, lse, lists, tile, segment_ids, train):
  """Mean over queries; 0 outside training, where nothing learns from it."""
  if not train:
    return jnp.float32(0)
  split = HEAD_AXIS in jax.sharding.get_abstract_mesh().manual_axes
  return indexer.divergence(
    index,
    q,
    k,
    lse,
    *lists,
    block_q=tile[0],
    block_k=tile[1],
    segment_ids=segment_ids,
    axis=HEAD_AXIS if split else None,
  ).mean()


def budget_at(
  cfg: DsaConfig, step: Scalar, train: bool, budget: Scalar | None = None
) -> jax.Array:
  """Tokens or keep ratio at `step`, f32; outside training its own, if set.

  Args:
    cfg: the schedules.
    step: optimiser step.
    train: whether this is a training step.
    budget: takes the place of the schedule, if given.
  """
  if not train and cfg.eval_budget:
    return jnp.float32(cfg.eval_budget)
  if budget is not None:
    return jnp.asarray(budget, jnp.float32)
  schedule = cfg.top_k if cfg.budget == 'tokens' else cfg.keep
  return schedules.make(schedule)(step)


def list_width(cfg: DsaConfig, blocks: int) -> int:
  """M: entries of a list over `blocks` key blocks (static).

  The largest share or number of tokens that the schedule asks for.
  """
  schedule = cfg.top_k if cfg.budget == 'tokens' else cfg.keep
  most = max(schedules.upper_bound(schedule), cfg.eval_budget)
  width = most / cfg.block_k if cfg.budget == 'tokens' else most * blocks
  forced = min(cfg.forced_blocks, blocks)
  return min(max(forced, int(width) + 1), blocks)


def select_blocks(
  index: Index,
  cfg: DsaConfig,
  *,
  budget: Scalar,
  segment_ids: Int[Array, 'B T'] | None = None,
) -> BlockList:
  """The block list of every query tile; one for all heads, so K is 1.

  Args:
    index: of all tokens; of the queries, only the first of a tile counts.
    cfg: block sizes, window, sink, pooling and kind of budget.
    budget: traced tokens or keep ratio; see `budget_at`.
    segment_ids: documents; nondecreasing along T.
  """
  B, T = index.q.shape[:2]
  tiles = Tiles.of_prefill(B, T, cfg.block_q, segment_ids)
  queries = index._replace(
    q=index.q[:, :: cfg.block_q], weights=index.weights[:, :: cfg.block_q]
  )
  return _choose(cfg, queries, tiles, budget)


def select_for_decode(
  index: Index,
  cfg: DsaConfig,
  *,
  positions: Int[Array, 'B'],
  budget: Scalar,
  starts: Int[Array, 'B'] | None = None,
) -> BlockList:
  """What `select_blocks` gives the query tile that begins at `positions`.

  Args:
    index: the tile's first query [B, 1, ...] of each row, and the cached keys
      [B, S, E], the query's own included; those behind it may hold anything
      finite.
    cfg: as in prefill.
    positions: of the queries, multiples of `cfg.block_q`.
    budget: as in prefill.
    starts: position of the first token of the document of each query; None
      means 0.
  """
  tiles = Tiles.of_decode(positions, starts)
  return _choose(cfg, index, tiles, budget)


def _choose(cfg, index, tiles, budget):
  """The lists of tiles whose first queries are those of `index`."""
  blocks = -(-index.k.shape[1] // cfg.block_k)
  ranges, cut = tile_ranges(cfg, tiles, blocks)
  if cfg.self_competes:
    ranges = ranges._replace(near=ranges.end)
  visible, forced = ranges.visible(), ranges.forced()
  if cfg.budget == 'tokens':
    blocks_kept = jnp.asarray(budget, jnp.float32) / cfg.block_k
  else:
    blocks_kept = budget * (visible + cut).astype(jnp.float32)
  # The small constant keeps rounding in f32 from adding a block.
  counts = jnp.ceil(blocks_kept - 1e-3).astype(jnp.int32) - cut
  width, least = list_width(cfg, blocks), jnp.maximum(forced, 1)
  counts = jnp.minimum(jnp.maximum(counts, least), jnp.minimum(visible, width))

  def rank(scores, number):
    part = jax.tree.map(lambda x: x[:, number], (ranges, counts))
    eligible, forced, visible = (
      x[:, 0] for x in Ranges(*part[0]).masks(blocks)
    )
    scores = jnp.clip(scores, LAST / 2, FIRST / 2)
    scores = jnp.where(eligible, scores, LAST)
    scores = jnp.where(forced, FIRST, scores)
    scores = jnp.where(visible, scores, -jnp.inf)
    return topk.top_k(scores, part[1], max_k=width).indices

  ids = indexer.block_importance(
    index, tiles.starts, block_k=cfg.block_k, pooling=cfg.pooling, then=rank
  )
  lists = ids, counts, jnp.asarray(visible)
  return BlockList(*(x[:, None] for x in lists))
