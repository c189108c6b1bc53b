"""Block lists: what the mechanisms that choose key blocks have in common.

A mechanism picks blocks for every tile of `block_q` queries. Here is what does
not depend on how it picks: where the blocks lie as seen from a tile, when a
list is made anew in decoding, and the scalars that say what was read.

Not done here: scores and budgets; see `psa.py` and `hybrid.py`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from psa_jax.attention.softmax import PLAIN, Softmax
from psa_jax.config import (
  AttentionConfig,
  ConfigError,
  MechanismConfig,
  ScheduleConfig,
)
from psa_jax.config.fields import COUNT, OPTIONAL, number
from psa_jax.kernels import block_scores, unread
from psa_jax.kernels.block_sparse import block_sparse_attention

SAMPLES = 8  # queries whose retained mass is measured
LONGEST = 2**30  # tokens up to which a budget is asked whether it acts


@dataclass(frozen=True)
class BlockListConfig(MechanismConfig):
  """Settings of the mechanisms with a sink and a window.

  Attributes:
    block_q: queries that share one block list (1 is per token).
    block_k: keys per block.
    window: tokens before each query that are always read.
    sink_blocks: first blocks of the sequence that are always read.
  """

  block_q: int = number(128, COUNT)
  block_k: int = number(64, COUNT)
  window: int = number(512, COUNT)
  sink_blocks: int = number(1, OPTIONAL)

  @property
  def forced_blocks(self) -> int:
    """Most blocks that sink, window and own tile take, whatever the budget."""
    tile = -(-self.block_q // self.block_k)
    window = -(-self.window // self.block_k)
    return self.sink_blocks + tile + window + 1

  def check(self, path: str) -> Iterator[str]:
    """Positions are int32."""
    tokens = self.forced_blocks * self.block_k
    if tokens >= 2**31:
      yield (
        f'{path}window, sink_blocks and block_q take {tokens} tokens in blocks '
        f'of {path}block_k, but positions are below 2^31'
      )


@dataclass(frozen=True)
class WideListConfig(BlockListConfig):
  """Settings of those whose lists may be cut.

  Attributes:
    max_blocks: width M of the block list; 0 means what the schedule's
      largest budget asks for.
  """

  max_blocks: int = number(0, OPTIONAL)

  def check_run(self, path: str, run: Any) -> Iterator[str]:
    """A list has room for what is always read."""
    lengths = run.train.seq_len
    blocks = max((-(-T // self.block_k) for T in lengths), default=0)
    forced = min(self.forced_blocks, blocks)
    if 0 < self.max_blocks < forced:
      yield (
        f'{path}max_blocks is {self.max_blocks}, but sink and window take up '
        f'to {forced} blocks; raise it or use 0'
      )


def check_ratio(path: str, budget: str, keep: ScheduleConfig) -> Iterator[str]:
  """What stands in the way of a controller that sets the keep ratio.

  Args:
    path: what stands in front of a setting's name, dot included.
    budget: which budget is configured.
    keep: its schedule, which is not read then.
  """
  if budget != 'ratio':
    yield f'{path}budget is {budget}, but train.controller sets a ratio'
  if keep != ScheduleConfig():
    yield (
      f'{path}keep is not read, for train.controller takes its place; leave '
      'it at its default'
    )


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


def document_start(
  segment_ids: Int[Array, 'B T'] | None, B: int, T: int
) -> Int[Array, 'B T']:
  """Position of the first token of every token's document."""
  if segment_ids is None:
    return jnp.zeros((B, T), jnp.int32)
  new = segment_ids[:, 1:] != segment_ids[:, :-1]
  at = jnp.where(new, jnp.arange(1, T)[None], 0)
  return lax.cummax(jnp.pad(at, ((0, 0), (1, 0))), axis=1)


def document_end(
  segment_ids: Int[Array, 'B T'] | None, B: int, T: int
) -> Int[Array, 'B T']:
  """One past the position of the last token of every token's document."""
  if segment_ids is None:
    return jnp.full((B, T), T, jnp.int32)
  new = segment_ids[:, 1:] != segment_ids[:, :-1]
  at = jnp.where(new, jnp.arange(1, T)[None], T)
  at = jnp.pad(at, ((0, 0), (0, 1)), constant_values=T)
  return lax.cummin(at, axis=1, reverse=True)


class Tiles(NamedTuple):
  """Where the query tiles begin, and in which document.

  Attributes:
    first: positions of the tiles' first queries.
    starts: first positions of these queries' documents.
  """

  first: Int[Array, '#B Tb']
  starts: Int[Array, 'B Tb']

  @classmethod
  def of_prefill(cls, B: int, T: int, block_q: int, segment_ids) -> 'Tiles':
    """All tiles of T queries."""
    starts = document_start(segment_ids, B, T)[:, ::block_q]
    return cls(jnp.arange(0, T, block_q)[None], starts)

  @classmethod
  def of_decode(cls, positions: Int[Array, 'B'], starts) -> 'Tiles':
    """The tile that begins at each row's position; `starts` None means 0."""
    first = positions.astype(jnp.int32)[:, None]
    starts = jnp.zeros_like(first) if starts is None else starts[:, None]
    return cls(first, starts)


def tile_ranges(
  cfg: BlockListConfig,
  tiles: Tiles,
  blocks: int,
) -> tuple[block_scores.Ranges, Int[Array | np.ndarray, 'B Tb']]:
  """Where the blocks lie as seen from each tile; of NumPy arrays in NumPy.

  Args:
    cfg: block sizes, window and sink.
    tiles: where they begin.
    blocks: how many key blocks there are.

  Returns:
    The ranges, and how many blocks the end of the sequence cuts from a tile. A
    tile reads up to its end, though the last one may be cut: how much it keeps
    of the rest must not depend on that, for decoding does not know yet where
    the sequence ends.
  """
  begin = tiles.starts // cfg.block_k
  first = tiles.first + 0 * begin
  end = (first + cfg.block_q - 1) // cfg.block_k + 1
  cut = (end - blocks).clip(min=0)
  ranges = block_scores.Ranges(
    begin=begin,
    end=end - cut,
    scored=(first + 1) // cfg.block_k,
    sink=begin + cfg.sink_blocks,
    near=(first - cfg.window + 1).clip(min=0) // cfg.block_k,
  )
  return ranges, cut


def idle_budget(
  cfg: BlockListConfig,
  length: int,
  acts: Callable[[np.ndarray, np.ndarray], np.ndarray],
) -> tuple[float, str] | None:
  """Whether sink and window leave a budget nothing to say at this length.

  Args:
    cfg: block sizes, window and sink.
    length: tokens of a row, which is one document.
    acts: whether the budget changes what a tile reads, from the blocks that it
      always reads and those that it sees.

  Returns:
    The share of the visible blocks that sink and window take, and from which
    length on the budget acts, in words; None where it acts at this one.
  """

  def blocks_of(numbers):  # of tiles that no end of a sequence cuts
    first: Any = numbers[None] * cfg.block_q
    ranges, _ = tile_ranges(cfg, Tiles(first, 0 * first), 2**31 - 1)
    forced: Any = ranges.forced()
    return forced[0], ranges.visible()[0]

  tiles = -(-length // cfg.block_q)
  forced, seen = blocks_of(np.arange(tiles))
  if acts(forced, seen).any():
    return None
  cut = np.maximum(seen + -length // cfg.block_k, 0)
  share = (forced - cut).sum() / (seen - cut).sum()
  # Tiles lie in different ways to the blocks: so many in a row have them all.
  row = np.arange(2 * cfg.block_k)
  low, high = tiles, LONGEST // cfg.block_q
  while low < high:
    middle = (low + high) // 2
    found = acts(*blocks_of(middle + row)).any()
    low, high = (low, middle) if found else (middle + 1, high)
  found = low + row[acts(*blocks_of(low + row))]
  if not len(found):
    return share, 'it acts at no length; raise it, or narrow the window'
  return share, f'it acts from {found[0] * cfg.block_q + 1:,} tokens on'


def idle_text(key: str, asked: float, length: int, found: Any) -> str | None:
  """The line for what `idle_budget` found of a density, or None."""
  return found and (
    f'{key} asks for a density of {asked:.3g}, but at {length:,} tokens sink '
    f'and window alone take {found[0]:.3g}: {found[1]}'
  )


def summarise(
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B S K H'],
  cfg: BlockListConfig,
  segment_ids: Int[Array, 'B T'] | None,
  *,
  bounds: bool,
) -> tuple[Float[Array, 'B Tb N H'], block_scores.Pooled, Tiles]:
  """What prefill chooses by: tiles' first queries, blocks, and the tiles."""
  # A tile that begins in another document is chosen for by its query.
  q, k = (unread.clean(lax.stop_gradient(x)) for x in (q, k))
  pooled = block_scores.pool(
    k,
    block_k=cfg.block_k,
    bounds=bounds,
    segment_ids=segment_ids,
  )
  tiles = Tiles.of_prefill(*q.shape[:2], cfg.block_q, segment_ids)
  return q[:, :: cfg.block_q], pooled, tiles


def width_limit(cfg: WideListConfig, blocks: int, name: str) -> int:
  """M that `max_blocks` sets, at most `blocks`; 0 where it sets none.

  Raises:
    ConfigError: it is less than the sink and the window take.
  """
  forced = min(cfg.forced_blocks, blocks)
  if 0 < cfg.max_blocks < forced:
    raise ConfigError(
      f'attention.{name}.max_blocks={cfg.max_blocks} is less than the {forced} '
      'blocks that sink and window always take; raise it or use 0'
    )
  return min(cfg.max_blocks, blocks)


def read_blocks(
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B S K H'],
  v: Float[Array, 'B S K Hv'],
  ids: Int[Array, 'B #K Tb M'],
  counts: Int[Array, 'B #K Tb'],
  config: AttentionConfig,
  *,
  block_q: int,
  block_k: int,
  segment_ids: Int[Array, 'B T'] | None,
  how: Softmax = PLAIN,
) -> tuple[Float[Array, 'B T N Hv'], Float[Array, 'B T N']]:
  """Attention over lists, whose names a rematerialisation policy knows.

  Args:
    q: queries.
    k: keys.
    v: values.
    ids: as in `block_sparse_attention`, or one list for all kv heads.
    counts: likewise.
    config: the implementation, and whether lists are checked.
    block_q: queries a list.
    block_k: keys a block.
    segment_ids: documents.
    how: the softmax.

  Returns:
    Output and log-sum-exp.
  """
  shape = k.shape[0], k.shape[2]
  ids = checkpoint_name(ids, 'attn_ids')
  counts = checkpoint_name(counts, 'attn_counts')
  return block_sparse_attention(
    q,
    k,
    v,
    jnp.broadcast_to(ids, (*shape, *ids.shape[2:])),
    jnp.broadcast_to(counts, (*shape, *counts.shape[2:])),
    block_q=block_q,
    block_k=block_k,
    q_segment_ids=segment_ids,
    kv_segment_ids=segment_ids,
    softmax=how.softmax,
    coefficients=how.coefficients,
    check_lists=config.check_lists,
    implementation=config.implementation,
  )


def renew(
  previous: BlockList,
  select: Callable[..., BlockList],
  block_q: int,
  lengths: Int[Array, 'B'],
) -> BlockList:
  """The lists of the newest tokens: new ones for rows that begin a tile.

  Args:
    previous: the lists of the last step.
    select: called as `select(positions=...)` if any row begins a tile.
    block_q: queries a tile.
    lengths: tokens of each row, the newest included; 0 is an idle row.
  """
  newest = lengths.astype(jnp.int32) - 1
  begins = (newest >= 0) & (newest % block_q == 0)

  def renew():
    new = select(positions=newest)

    def take(new, old):
      return jnp.where(begins.reshape(-1, *[1] * (new.ndim - 1)), new, old)

    return jax.tree.map(take, new, previous)

  return lax.cond(begins.any(), renew, lambda: previous)


def share_read(lists: BlockList) -> Float[Array, '']:
  """Key blocks read as a share of the visible ones.

  A mean of shares over rows and heads, which is the same on any mesh; exactly
  1 where everything is read.
  """
  read, visible = (
    x.sum(-1).astype(jnp.float32) for x in (lists.counts, lists.visible)
  )
  return 1 - ((visible - read) / visible).mean()


def retained_mass(
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B S K H'],
  lse: Float[Array, 'B T N'],
  segment_ids: Int[Array, 'B T'] | None = None,
  how: Softmax = PLAIN,
) -> jax.Array:
  """Share of the whole softmax's mass that was read, on a few sampled queries.

  Args:
    q: queries.
    k: all keys; S = T.
    lse: log-sum-exp of the scores that were read.
    segment_ids: documents.
    how: the softmax that `lse` is of. What SAS loses counts as not retained.

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
    s = how.softmax.scores(s, how.coefficients)
    mask = (keys <= t)[None]
    if segment_ids is not None:
      mask = mask & (segment_ids == segment_ids[:, t][:, None])
    full = jax.nn.logsumexp(s, axis=-1, where=mask[:, None, None])
    return jnp.exp(lse[:, t].astype(jnp.float32) - full.reshape(B, N)).mean()

  samples = min(SAMPLES, T)
  at = (jnp.arange(samples) * 2 + 1) * T // (2 * samples)
  return lax.map(one, at).mean()
