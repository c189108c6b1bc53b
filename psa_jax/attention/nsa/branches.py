"""Native sparse attention (`nsa`), arXiv 2502.11089: three gated branches.

  out_t = sum over the branches c of g^c_t * Attn(q_t, K^c_t, V^c_t)   (eq. 5)

* compress: every complete block of l keys that starts at a multiple of d, as
  one key and value (`compress.py`, eq. 7);
* select: whole blocks of l' keys, the n most important ones by the compressed
  branch's own probabilities (eq. 8 to 12), of which the document's first and
  the query's own and the one before it are always there and count;
* window: the last w keys.

Each has a softmax of its own, and keys and values of its own unless they are
shared; gates are sigmoids and not normalised. `nsa` selects for every query
token and kv head, as the paper does; `nsa_tile` once for `tile` queries, by
the tile's first (docs/mechanisms.md#block-lists: nothing later may be asked),
which gives kernels tiles with many rows.

Where the paper is silent: scores are scaled by H ** -0.5; a query that no
complete block precedes gets 0 from the compressed branch; the earlier of two
equally important blocks is taken; a document of a packed row sees compressed
blocks that lie in it as a whole, and the grid of blocks is the row's. n may
follow a schedule: it is traced, and the lists are as wide as its largest
value.

The choice has no gradient; it learns through the compressed branch, which is
what it reads. Not done: bidirectional attention.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from psa_jax import schedules
from psa_jax.attention.block_lists import document_start, read_blocks
from psa_jax.attention.context import AttentionContext
from psa_jax.attention.nsa import compress as compression
from psa_jax.config import (
  AttentionConfig,
  MechanismConfig,
  ScheduleConfig,
)
from psa_jax.config.fields import (
  COUNT,
  COUNTED,
  OPTIONAL,
  number,
  schedule,
)
from psa_jax.kernels import compressed, unread
from psa_jax.kernels.block_scores import Ranges
from psa_jax.kernels.block_sparse import block_sparse_attention
from psa_jax.types import AttnOut, Learned, Scalar

# Queries of a tile of the window, over all G heads, and keys of a block.
WINDOW_ROWS, WINDOW_KEYS = 1024, 64


@dataclass(frozen=True)
class NsaConfig(MechanismConfig):
  """Native sparse attention (docs/mechanisms.md#nsa).

  Attributes:
    compress_block: l, keys that are compressed into one.
    stride: d, keys from the start of one compressed block to the next.
    select_block: l', keys of a block that is selected.
    blocks: n, selected blocks a query, forced ones included, as a schedule.
    initial_blocks: first blocks of the document, always selected.
    local_blocks: the query's own block and those before it, always selected.
    window: w, tokens up to and including the query that the window reads.
    tile: queries that share a selection in `nsa_tile`; divides `select_block`.
      `nsa` selects for every token.
    share_kv: one key and value for all three branches, not one each.
    compress_dim: hidden width of the compression networks.
    gate_dim: hidden width of the gate's network.
    eval_blocks: n outside training; 0 means the schedule's value at the step
      being evaluated.
  """

  compress_block: int = number(32, COUNT)
  stride: int = number(16, COUNT)
  select_block: int = number(64, COUNT)
  blocks: ScheduleConfig = schedule(ScheduleConfig(init=16.0), COUNTED)
  initial_blocks: int = number(1, OPTIONAL)
  local_blocks: int = number(2, COUNT)
  window: int = number(512, COUNT)
  tile: int = number(64, COUNT)
  share_kv: bool = False
  compress_dim: int = number(128, COUNT)
  gate_dim: int = number(64, COUNT)
  eval_blocks: int = number(0, OPTIONAL, runtime=True)

  @property
  def forced_blocks(self) -> int:
    """Blocks that are selected whatever their scores."""
    return self.initial_blocks + self.local_blocks

  def check(self, path: str) -> Iterator[str]:
    """Block sizes divide each other, and forced blocks fit the budget."""
    for key in ('compress_block', 'select_block'):
      if getattr(self, key) % self.stride:
        yield (
          f'{path}{key} is {getattr(self, key)}, but it must be a multiple of '
          f'{path}stride, which is {self.stride}'
        )
    if self.compress_block > self.select_block:
      yield (
        f'{path}compress_block is {self.compress_block}, but it must be at '
        f'most {path}select_block, which is {self.select_block}'
      )
    if self.select_block % self.tile:
      yield (
        f'{path}tile is {self.tile}, but it must divide {path}select_block, '
        f'which is {self.select_block}'
      )
    blocks = self.blocks
    values = {
      'constant': (blocks.init,),
      'piecewise': blocks.values,
    }.get(blocks.kind, (blocks.init, blocks.final))
    if self.eval_blocks:
      values = (*values, self.eval_blocks)
    if values and min(values) < self.forced_blocks:
      yield (
        f'{path}blocks goes down to {min(values):g}, but initial_blocks and '
        f'local_blocks, which count, are {self.forced_blocks} together'
      )


def nsa(
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B S K H'],
  v: Float[Array, 'B S K Hv'],
  *,
  config: AttentionConfig,
  context: AttentionContext,
  learned: Learned | None = None,
) -> AttnOut:
  """Compressed, selected and recent keys; a selection for every token.

  Args and errors as in `attend`; `learned` as `NsaParameters` returns
  it. The aux scalars are `density` (rows of keys read by all branches as a
  share of the visible ones; a query that reads as many as it sees, or more,
  counts as 1) and `selected_blocks` (the mean a query).
  """
  return _attend(q, k, v, config, context, learned, tile=1)


def nsa_tile(
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B S K H'],
  v: Float[Array, 'B S K Hv'],
  *,
  config: AttentionConfig,
  context: AttentionContext,
  learned: Learned | None = None,
) -> AttnOut:
  """As `nsa`, but `config.nsa.tile` queries share a selection."""
  tile = config.nsa.tile
  return _attend(q, k, v, config, context, learned, tile=tile)


def blocks_at(cfg: NsaConfig, step: Scalar, train: bool) -> jax.Array:
  """Selected blocks at `step`, int32; outside training its own, if set."""
  if not train and cfg.eval_blocks:
    return jnp.int32(cfg.eval_blocks)
  # The small constant keeps rounding in f32 from adding a block.
  return jnp.ceil(schedules.make(cfg.blocks)(step) - 1e-3).astype(jnp.int32)


def list_width(cfg: NsaConfig, blocks: int) -> int:
  """M: entries of a list over `blocks` key blocks (static)."""
  most = math.ceil(schedules.upper_bound(cfg.blocks) - 1e-3)
  return min(max(most, cfg.eval_blocks), blocks)


def _attend(q, k, v, config, context, learned, *, tile):
  """Both mechanisms; `tile` queries share a selection."""
  segment_ids = context.segment_ids
  budget = blocks_at(config.nsa, context.step, context.train)
  cfg, gates = config.nsa, learned.heads['gates']
  starts = document_starts(segment_ids)
  raw = compression.raw_pair(k, v, learned)
  sizes = dict(block=cfg.compress_block, stride=cfg.stride)
  kc, vc = compression.compress_pair(*raw, learned, **sizes)
  out_c, lse = compressed.compressed_attention(
    q,
    kc,
    vc,
    **sizes,
    starts=starts,
    implementation=own_kernel(config),
  )
  ids, counts, ranges = select(
    q, kc, lse, config, budget, starts, tile, -(-k.shape[1] // cfg.select_block)
  )
  out_s, _ = read_blocks(
    q,
    k,
    v,
    ids,
    counts,
    config,
    block_q=tile,
    block_k=cfg.select_block,
    segment_ids=segment_ids,
  )
  heads = learned.heads
  kw, vw = heads.get('k_window', k), heads.get('v_window', v)
  out_w = window_attention(q, kw, vw, config, segment_ids, starts)
  out = combine(gates, out_c, out_s, out_w)
  aux = {
    'density': density(cfg, ids, counts, ranges, starts, tile, q.shape[1]),
    'selected_blocks': counts.astype(jnp.float32).mean(),
  }
  return AttnOut(out, aux)


def own_kernel(config: AttentionConfig) -> str:
  """Implementation of the compressed branch, which has no kernel by name."""
  return 'reference' if config.implementation == 'reference' else 'auto'


def combine(
  gates: Float[Array, 'B T N 3'], *branches: Float[Array, 'B T N Hv']
) -> Float[Array, 'B T N Hv']:
  """Equation 5, in the gates' dtype or the branches', whichever is finer."""
  return _combine(gates, branches)


@unread.quiet_rows
def _combine(gates, branches):
  acc = jnp.promote_types(gates.dtype, branches[0].dtype)
  gates = gates.astype(acc)
  out = sum(
    gates[..., i, None] * branch.astype(acc)
    for i, branch in enumerate(branches)
  )
  return jnp.asarray(out).astype(branches[0].dtype)


def document_starts(
  segment_ids: Int[Array, 'B T'] | None,
) -> Int[Array, 'B T'] | None:
  """`document_start`, and None where every row is one document."""
  if segment_ids is None:
    return None
  return document_start(segment_ids, *segment_ids.shape)


def visible_blocks(
  cfg: NsaConfig,
  positions: Int[Array, 'B Tb'],
  starts: Int[Array, 'B Tb'] | None,
) -> Ranges:
  """Which blocks the queries at `positions` may select, which they must."""
  begin = 0 * positions if starts is None else starts // cfg.select_block
  block = positions // cfg.select_block
  return Ranges(
    begin=begin,
    end=block + 1,
    scored=block + 1,
    sink=begin + cfg.initial_blocks,
    near=block + 1 - cfg.local_blocks,
  )


def count_blocks(
  cfg: NsaConfig, ranges: Ranges, budget: Scalar, width: int
) -> Int[Array, 'B Tb']:
  """How many entries of a list are read: n, or all if there are fewer."""
  count = jnp.clip(budget, min(cfg.forced_blocks, width), width)
  return jnp.minimum(count.astype(jnp.int32), ranges.visible())


def select(q, kc, lse, config, budget, starts, tile, blocks):
  """The lists of all tiles: their blocks, counts and ranges.

  Args:
    q: all queries.
    kc: compressed keys.
    lse: of the compressed branch.
    config: the mechanism's.
    budget: n.
    starts: of the documents, or None.
    tile: queries a list.
    blocks: how many there are to choose from.
  """
  cfg, (B, T) = config.nsa, q.shape[:2]
  q, lse = q[:, ::tile], lse[:, ::tile]
  starts = None if starts is None else starts[:, ::tile]
  at = jnp.broadcast_to(jnp.arange(0, T, tile)[None], (B, q.shape[1]))
  ranges = visible_blocks(cfg, at, starts)
  width = list_width(cfg, blocks)
  ids = compressed.top_blocks(
    q,
    kc,
    lse,
    at,
    ranges,
    block=cfg.compress_block,
    stride=cfg.stride,
    select_block=cfg.select_block,
    blocks=blocks,
    width=width,
    starts=starts,
    implementation=own_kernel(config),
  )
  counts = count_blocks(cfg, ranges, budget, width)
  return ids, jnp.broadcast_to(counts[:, None], ids.shape[:3]), ranges


def window_attention(
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B T K H'],
  v: Float[Array, 'B T K Hv'],
  config: AttentionConfig,
  segment_ids: Int[Array, 'B T'] | None,
  starts: Int[Array, 'B T'] | None,
) -> Float[Array, 'B T N Hv']:
  """Attention to the last `config.nsa.window` keys of the document."""
  (B, T, N), K = q.shape[:3], k.shape[2]
  window, block_k = config.nsa.window, WINDOW_KEYS
  block_q = min(max(64, WINDOW_ROWS // (N // K)), T)
  first = jnp.arange(0, T, block_q)[None]
  low = jnp.maximum(first - window + 1, 0)
  if starts is not None:
    low = jnp.maximum(low, starts[:, ::block_q])
  low = jnp.broadcast_to(low, (B, low.shape[1])) // block_k
  stop = jnp.minimum(first + block_q, T) - 1
  counts = stop // block_k - low + 1
  most = (window + block_q - 2) // block_k + 2
  width = min(most, -(-T // block_k))
  ids = low[..., None] + jnp.arange(width)[None, None]
  out, _ = block_sparse_attention(
    q,
    k,
    v,
    jnp.broadcast_to(ids[:, None], (B, K, *ids.shape[1:])),
    jnp.broadcast_to(counts[:, None], (B, K, *counts.shape[1:])),
    block_q=block_q,
    block_k=block_k,
    window=window,
    q_segment_ids=segment_ids,
    kv_segment_ids=segment_ids,
    implementation=config.implementation,
  )
  return out


def density(
  cfg: NsaConfig,
  ids: Int[Array, 'B K Tb M'],
  counts: Int[Array, 'B K Tb'],
  ranges: Ranges,
  starts: Int[Array, 'B T'] | None,
  tile: int,
  T: int,
) -> jax.Array:
  """Rows that the branches read as a share of the visible keys, mean; f32.

  An upper bound for the tokens of a document that begins inside a tile: they
  share the list of the one before.
  """
  t = jnp.arange(T)[None]
  begin = jnp.zeros_like(t) if starts is None else starts
  last = compressed.newest(t, cfg.compress_block, cfg.stride)
  rows = jnp.maximum(last + 1 - -(-begin // cfg.stride), 0)
  rows = rows + jnp.minimum(t - begin + 1, cfg.window)
  # Selected blocks are whole but for the query's own and the document's first.
  slot = jnp.arange(ids.shape[-1])[None, None, None]
  read = (slot < counts[..., None]) & (ids == ranges.begin[:, None, :, None])
  first, counts = (
    jnp.repeat(x, tile, axis=2)[..., :T] for x in (read.any(-1), counts)
  )
  size = cfg.select_block
  cut = jnp.where(first, (begin % size)[:, None], 0)
  keys = counts * size - (size - 1 - t % size)[:, None] - cut
  share = (rows[:, None] + keys) / (t - begin + 1)[:, None]
  return jnp.minimum(share.astype(jnp.float32), 1).mean()
