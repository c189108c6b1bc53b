"""Block lists: what the mechanisms that choose key blocks have in common.

A mechanism picks blocks for every tile of `block_q` queries. Here is what does
not depend on how it picks: where the blocks lie as seen from a tile, when a
list is made anew in decoding, and the scalars that say what was read.

Not done here: scores and budgets; see `psa.py` and `hybrid.py`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from psa_jax.attention.approximate import PLAIN, Softmax
from psa_jax.config import HybridConfig, PsaConfig
from psa_jax.kernels import block_scores

SAMPLES = 8  # queries whose retained mass is measured


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


def tile_ranges(
  cfg: PsaConfig | HybridConfig,
  first: Int[Array, '#B Tb'],
  starts: Int[Array, 'B Tb'],
  blocks: int,
) -> tuple[block_scores.Ranges, Int[Array, 'B Tb']]:
  """Where the blocks lie as seen from each tile.

  Args:
    cfg: block sizes, window and sink.
    first: positions of the tiles' first queries.
    starts: first positions of these queries' documents.
    blocks: how many key blocks there are.

  Returns:
    The ranges, and how many blocks the end of the sequence cuts from a tile. A
    tile reads up to its end, though the last one may be cut: how much it keeps
    of the rest must not depend on that, for decoding does not know yet where
    the sequence ends.
  """
  begin = starts // cfg.block_k
  first = jnp.broadcast_to(first, begin.shape)
  end = (first + cfg.block_q - 1) // cfg.block_k + 1
  cut = jnp.maximum(end - blocks, 0)
  ranges = block_scores.Ranges(
    begin=begin,
    end=end - cut,
    scored=(first + 1) // cfg.block_k,
    sink=begin + cfg.sink_blocks,
    near=jnp.maximum(first - cfg.window + 1, 0) // cfg.block_k,
  )
  return ranges, cut


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
    seen = (keys <= t)[None]
    if segment_ids is not None:
      seen = seen & (segment_ids == segment_ids[:, t][:, None])
    full = jax.nn.logsumexp(s, axis=-1, where=seen[:, None, None])
    return jnp.exp(lse[:, t].astype(jnp.float32) - full.reshape(B, N)).mean()

  samples = min(SAMPLES, T)
  at = (jnp.arange(samples) * 2 + 1) * T // (2 * samples)
  return lax.map(one, at).mean()
