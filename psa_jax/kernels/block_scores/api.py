"""The most important key blocks of each query, from pooled keys.

A query stands for a tile of queries (`psa_jax/attention/psa.py` says which
one). Importance of a block is the query's softmax over blocks of the pooled
score, summed over the G heads that share a list; the score is the mean of the
keys, or Quest's upper bound from their minima and maxima (arXiv 2406.10774).
Only its logarithm exists, the log-sum-exp over heads of each one's log-softmax:
in f32 a softmax is 0 where scores lie 104 below the largest, and what is 0
ties. Blocks that are always read come first, the later ones before the earlier.

Scores exist for a few queries at a time, never as a T x S array nor as a
[tiles, blocks] one. No gradient flows through the choice.

Not done here: which blocks are visible or always read, and how many are kept;
that is the mechanism's, which may look at the scores through `stop`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, Float, Int

from psa_jax.kernels import arguments, platform
from psa_jax.kernels.block_scores import reference, xla
from psa_jax.kernels.block_scores.pooled import Pooled
from psa_jax.kernels.block_scores.ranges import Ranges
from psa_jax.kernels.platform import Implementation

IMPLEMENTATIONS = {
  'xla': Implementation(xla.top_blocks),
  'reference': Implementation(reference.top_blocks, automatic=False),
}


@dataclasses.dataclass(frozen=True)
class Spec:
  """The static part of a call."""

  width: int
  bounds: bool
  stop: Callable[..., Any] | None
  scale: float


def top_blocks(
  queries: Float[Array, 'B Tb N H'],
  pooled: Pooled,
  ranges: Ranges,
  *,
  width: int,
  bounds: bool = False,
  stop: Callable[..., Any] | None = None,
  scale: float | None = None,
  implementation: str = 'auto',
) -> tuple[Int[Array, 'B K Tb M'], Any]:
  """Ranks the visible blocks of each query.

  Args:
    queries: one a list; query head `n` shares the list of kv head `n // (N //
      K)`.
    pooled: summaries of the key blocks.
    ranges: which blocks are visible, compete, and come first.
    width: M, entries of a list; at most the number of blocks.
    bounds: rank by the upper bound and not by the mean.
    stop: how many blocks to keep, from the scores: called as `stop(scores,
      order)` with `Scores` of some queries and all blocks in order [B, K, n,
      Nb], and returns arrays [B, K, n], one or a tuple. None: the caller
      knows.
    scale: factor on the scores; None means H ** -0.5.
    implementation: a key of `IMPLEMENTATIONS`, or `auto` for the platform's
      best.

  Returns:
    Block indices, most important first, without duplicates; after the visible
    blocks come others. And what `stop` said, or None.

  Raises:
    ValueError: shapes that do not fit, naming both; bounds without minima and
      maxima; an implementation that cannot run here.
  """
  _check(queries, pooled, ranges, width, bounds)
  spec = Spec(width, bounds, stop, arguments.scale_or_default(queries, scale))
  args = jax.lax.stop_gradient((queries, pooled, ranges))
  run = platform.pick(implementation, IMPLEMENTATIONS, *args, spec=spec)
  return run(*args, spec=spec)


def _check(queries, pooled, ranges, width, bounds):
  B, tiles, N, H = queries.shape
  _, K, blocks, _ = pooled.total.shape
  if N % K:
    raise ValueError(f'{N} query heads are not a multiple of {K} kv heads')
  if pooled.total.shape[0] != B or pooled.total.shape[-1] != H:
    raise ValueError(
      f'queries {queries.shape} and pooled keys {pooled.total.shape} do not fit'
    )
  if ranges.begin.shape != (B, tiles):
    raise ValueError(
      f'ranges {ranges.begin.shape} must be [B, Tb] = {(B, tiles)}'
    )
  if not 1 <= width <= blocks:
    raise ValueError(f'width={width} must be in [1, {blocks}], the blocks')
  if bounds and not pooled.bounded:
    raise ValueError('bounds=True needs keys that were pooled with bounds=True')
