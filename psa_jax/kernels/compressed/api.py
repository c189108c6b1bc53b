"""Attention to compressed keys, and the key blocks that it finds important.

NSA (arXiv 2502.11089) compresses the keys `m d .. m d + l - 1` into the m-th
compressed key, for every m whose block is complete. `compressed_attention` is
softmax attention to them, where a query sees only those whose *last* key lies
at or before it. `top_blocks` turns its probabilities into scores of the
blocks of l' keys that are selected (equation 9) and ranks those.

Equation 9 counts the cells of d keys that a compressed block shares with a
selected one. Printed with `- m - n` it is 1-based; 0-based it reads

  score[j] = sum_{m < l'/d} sum_{n < l/d} p[(l'/d) j + m - n]

A group's heads share a selection: their probabilities are added (equation 10).
Both sums are made and compared as logarithms, for a probability of f32 that is
below e^-104 is 0 and ties.

Nothing of the size of queries x compressed keys exists beyond a chunk of
queries: the second function recomputes probabilities from the log-sum-exp of
the first. No gradient flows through the choice.

Not done here: compressing, which is the mechanism's; a choice of blocks in a
kernel of an accelerator's own.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from psa_jax.kernels import arguments, platform, unread
from psa_jax.kernels.block_scores.ranges import Ranges
from psa_jax.kernels.compressed import (
  reference,
  selection,
  stacked,
  xla,
)
from psa_jax.kernels.platform import Implementation

IMPLEMENTATIONS = {
  'stacked': Implementation(stacked.compressed_attention, stacked.refusal),
  'xla': Implementation(xla.compressed_attention),
  'reference': Implementation(reference.compressed_attention, automatic=False),
}
CHOICES = {
  'xla': Implementation(selection.top_blocks),
  'reference': Implementation(reference.top_blocks, automatic=False),
}


@dataclasses.dataclass(frozen=True)
class Spec:
  """The static part of a call; the last two are of `top_blocks` only."""

  block: int
  stride: int
  scale: float
  select_block: int = 0
  width: int = 0


def count(length: int, *, block: int, stride: int) -> int:
  """How many compressed keys `length` keys have: the complete blocks."""
  return max(0, (length - block) // stride + 1)


def compressed_attention(
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B C K H'],
  v: Float[Array, 'B C K Hv'],
  *,
  block: int,
  stride: int,
  starts: Int[Array, 'B T'] | None = None,
  scale: float | None = None,
  implementation: str = 'auto',
) -> tuple[Float[Array, 'B T N Hv'], Float[Array, 'B T N']]:
  """Softmax attention to the complete compressed blocks of the past.

  Query t sees compressed key m where `starts[t] <= m d` and `m d + l - 1 <=
  t`: a block that reaches into another document is seen by nobody.

  Args:
    q: queries; query head `n` reads kv head `n // (N // K)`.
    k: compressed keys, C = count(T).
    v: compressed values; `Hv` may differ from `H`.
    block: l, keys a compressed block.
    stride: d, keys from one block's start to the next one's; divides l.
    starts: position of the first token of every query's document,
      nondecreasing; None means 0.
    scale: factor on the scores; None means H ** -0.5.
    implementation: a key of `IMPLEMENTATIONS`, or `auto` for the platform's
      best.

  Returns:
    The output in the dtype of `v` and the log-sum-exp of the scores (f32, or
    f64 for f64 inputs). A query that sees no complete block gives 0 and -inf.

  Raises:
    ValueError: shapes or sizes that do not fit, naming both.
  """
  arguments.check_attention(q, k, v, None, None)
  _check_sizes(block, stride)
  want = count(q.shape[1], block=block, stride=stride)
  if k.shape[1] != want:
    raise ValueError(
      f'{q.shape[1]} queries have {want} complete blocks of {block} keys every '
      f'{stride}, but k is {k.shape}'
    )
  if not want:
    out = jnp.zeros((*q.shape[:3], v.shape[-1]), v.dtype)
    acc = jnp.promote_types(q.dtype, jnp.float32)
    return out, jnp.full(q.shape[:3], -jnp.inf, acc)
  spec = Spec(block, stride, arguments.scale_or_default(q, scale))
  args = q, *unread.mark(k, v), starts
  run = platform.pick(implementation, IMPLEMENTATIONS, *args, spec=spec)
  return run(*args, spec=spec)


def top_blocks(
  q: Float[Array, 'B Tb N H'],
  k: Float[Array, 'B C K H'],
  lse: Float[Array, 'B Tb N'],
  positions: Int[Array, 'B Tb'],
  ranges: Ranges,
  *,
  block: int,
  stride: int,
  select_block: int,
  blocks: int,
  width: int,
  starts: Int[Array, 'B Tb'] | None = None,
  scale: float | None = None,
  implementation: str = 'auto',
) -> Int[Array, 'B K Tb M']:
  """Ranks the key blocks of each query by equations 9 and 10.

  Args:
    q: the queries that select, one a list.
    k: compressed keys; further ones, which no query sees, may hold anything.
    lse: log-sum-exps of `compressed_attention` for these queries.
    positions: their positions, nondecreasing along Tb.
    ranges: which blocks are visible to each, and which come first; `scored`
      is not read.
    block: l.
    stride: d; divides l and l'.
    select_block: l', keys of a block that is selected; at least l.
    blocks: how many of them there are.
    width: M, entries of a list; at most `blocks`.
    starts: as in `compressed_attention`, of these queries.
    scale: factor on the scores; None means H ** -0.5.
    implementation: a key of `CHOICES`, or `auto`.

  Returns:
    Block indices without duplicates: those that come first, the later ones
    before the earlier; the other visible ones, most important first and of
    equal ones the earlier first; then others.

  Raises:
    ValueError: sizes that do not fit, naming both.
  """
  _check_sizes(block, stride)
  if select_block % stride or select_block < block:
    raise ValueError(
      f'select_block={select_block} must be a multiple of stride={stride} and '
      f'at least block={block}'
    )
  if not 1 <= width <= blocks:
    raise ValueError(f'width={width} must be in [1, {blocks}], the blocks')
  scale = arguments.scale_or_default(q, scale)
  spec = Spec(block, stride, scale, select_block, width)
  if not k.shape[1]:  # no block is complete: one that nobody sees
    k = jnp.zeros((k.shape[0], 1, *k.shape[2:]), k.dtype)
  # Queries and keys that are not finite rank as nothing, not above all.
  q, k = unread.clean(q), unread.clean(k)
  lse = jnp.where(jnp.isnan(lse), jnp.inf, lse)
  args = jax.lax.stop_gradient((q, k, lse, positions, starts, ranges))
  run = platform.pick(implementation, CHOICES, *args, blocks=blocks, spec=spec)
  return run(*args, blocks=blocks, spec=spec)


def _check_sizes(block, stride):
  if stride < 1 or block % stride:
    raise ValueError(f'block={block} must be a multiple of stride={stride}')
