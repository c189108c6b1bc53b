"""Who is left after cascade pruning: how many, and which.

How many. The first layers keep everything (SpAtten, arXiv 2012.09852, section
V.A: 15 % of them for tokens, 30 % for heads); over the others the share that
is kept falls on a line whose mean is the configured one, `r_start + r_end =
2 r_avg`. Shares are counted in 1/1024, so that budgets are exact integers and
those of documents that share a row never add up to more than the row's.

Which, in a bidirectional model: of every document the `quota(length)` tokens
of the largest importance, ties by position. The paper's rule.

Which, in a causal model: a token is judged when it comes and never again, by
what is known at its position, since its own output depends on the verdict.
Two bounded rules make up for the unknown rest of the document:

1. It is *wanted* if its importance is among the best of the last `window`
   candidates of its document, itself included, in the proportion in which
   this layer prunes. Nothing is compared over a long distance, where the
   measure drifts.
2. Credit keeps the count on its course. Every position adds what `quota` grows
   by, every survivor takes one; a wanted token without credit goes, an
   unwanted one stays once more than `credit` have been saved up, and what is
   beyond that is lost. So at most `quota(m)` of the first m tokens are left,
   however the importances lie, and about as many in the long run.

The credit is a sum clipped on both sides at every token; such maps compose to
one of their kind, so an associative scan computes it in O(log T) passes. What
came before in the same document decides, nothing else: not later tokens, not
other documents, not the length of the row.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from psa_jax.attention.cascade.settings import CascadeConfig
from psa_jax.kernels import topk

UNIT = 1024  # shares are integers over this


class LayerSize(NamedTuple):
  """What a layer holds at most (static).

  Attributes:
    tokens: rows of the residual stream.
    heads: kv heads.
    share: kept share of the tokens, in 1/1024.
  """

  tokens: int
  heads: int
  share: int


def layer_shares(
  layers: int, *, mean: float, start: float, slope: float
) -> tuple[float, ...]:
  """Share kept in each layer, never rising.

  Args:
    layers: how many there are.
    mean: of the layers that prune.
    start: share of the layers, the first ones, that keep everything; one at
      least, for nothing is known in front of it.
    slope: from 0, the same share in every layer, to 1: the last layer's is as
      far below the mean as there is room on both sides of it.
  """
  whole = min(max(1, math.ceil(start * layers - 1e-9)), layers)
  pruning = layers - whole
  spread = slope * min(mean, 1 - mean)
  ramp = [
    mean + spread * (1 - 2 * i / (pruning - 1)) if pruning > 1 else mean
    for i in range(pruning)
  ]
  return (1.0,) * whole + tuple(ramp)


def plan(
  config: CascadeConfig,
  layers: int,
  *,
  tokens: int,
  kv_heads: int,
  amount: float,
  packed: bool,
) -> tuple[LayerSize, ...]:
  """Sizes of all layers.

  Args:
    config: the means and the ramps.
    layers: L.
    tokens: T of the input.
    kv_heads: K of the model.
    amount: share of the configured pruning that is in force, in [0, 1].
    packed: whether rows hold several documents or padding.
  """
  ramps = (
    layer_shares(layers, mean=mean, start=start, slope=config.slope)
    for mean, start in (
      (config.token_keep, config.token_start),
      (config.head_keep, config.head_start),
    )
  )
  sizes = []
  for token_share, head_share in zip(*ramps, strict=True):
    token_share, head_share = (
      1 - amount * (1 - share) for share in (token_share, head_share)
    )
    share = max(1, round(token_share * UNIT))
    room = -(-tokens * share // UNIT) + (config.documents - 1) * packed
    heads = max(1, math.ceil(head_share * kv_heads - 1e-6))
    sizes.append(LayerSize(min(room, tokens), heads, share))
  return tuple(sizes)


def quota(
  tokens: Int[Array, '*B'], share: int, generous: Bool[Array, '*B']
) -> Int[Array, '*B']:
  """How many of the first `tokens` of a document may be left.

  Args:
    tokens: below 2^21.
    share: in 1/1024.
    generous: whether to round up. Rounding down, the quotas of documents that
      share a row never exceed the row's, however many there are.
  """
  return (tokens * share + jnp.where(generous, UNIT - 1, 0)) // UNIT


def runs(
  ids: Int[Array, 'B T'],
) -> tuple[Int[Array, 'B T'], Int[Array, 'B T'], Int[Array, 'B T']]:
  """Of every entry's run of equal ids: number, entries up to it, length."""
  B, T = ids.shape
  at = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (B, T))
  new = ids[:, 1:] != ids[:, :-1]
  edge = jnp.ones((B, 1), bool)
  first = jnp.concatenate([edge, new], 1)
  last = jnp.concatenate([new, edge], 1)
  begin = lax.cummax(jnp.where(first, at, 0), axis=1)
  end = lax.cummin(jnp.where(last, at, T), axis=1, reverse=True)
  number = jnp.cumsum(first, axis=1, dtype=jnp.int32) - 1
  return number, at - begin + 1, end - begin + 1


def whole_row(
  B: int, T: int
) -> tuple[Int[Array, 'B T'], Int[Array, 'B T'], Int[Array, 'B T']]:
  """`runs` of rows that are one document each.

  Of constant ids XLA would compute `runs` while it compiles, which is slow.
  """
  place = jnp.broadcast_to(jnp.arange(1, T + 1, dtype=jnp.int32)[None], (B, T))
  return jnp.zeros_like(place), place, jnp.full_like(place, T)


def keep_bidirectional(
  score: Float[Array, 'B T'],
  quotas: Int[Array, 'B T'],
  document: Int[Array, 'B T'] | None,
) -> Bool[Array, 'B T']:
  """The `quotas` most important tokens of every document.

  Args:
    score: cumulative importance.
    quotas: the same number at all tokens of a document; 0 for what is not to
      stay anyway.
    document: a number for each, in runs; None where a row is one document,
      which is ranked without sorting.
  """
  if document is None:
    return topk.select(score, quotas[:, 0])
  B, T = score.shape
  at = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (B, T))
  document, _, order = lax.sort((document, -score, at), dimension=1, num_keys=3)
  rank = runs(document)[1] - 1
  rows = jnp.arange(B)[:, None]
  return jnp.zeros_like(at).at[rows, order].set(rank) < quotas


def keep_causal(
  score: Float[Array, 'B T'],
  alive: Bool[Array, 'B T'],
  quotas: Int[Array, 'B T'],
  document: Int[Array, 'B T'] | None,
  *,
  shares: tuple[int, int],
  window: int,
  credit: int,
) -> Bool[Array, 'B T']:
  """Each token's verdict from what lies before it; see the module docstring.

  Args:
    score: importance of the token, known at its position.
    alive: candidates; they come first, in the order of their positions.
    quotas: `quota` of the document up to each candidate.
    document: a number for each, in runs; None where a row is one document.
    shares: this layer's share and the one before it.
    window: candidates that are compared.
    credit: see the module docstring.
  """
  if document is None:
    place = whole_row(*score.shape)[1]
  else:
    place = runs(document)[1]
  rank = _rank_among_last(score, place, window)
  compared = jnp.minimum(place, window)
  among_best = rank * shares[1] < compared * shares[0]
  first = place == 1
  earned = jnp.diff(quotas, axis=1, prepend=0)
  earned = jnp.where(first, quotas, earned)
  change = earned - among_best
  start = jnp.clip(change, 0, credit)
  low, high = jnp.where(first, start, 0), jnp.where(first, start, credit)
  change, low, high = lax.associative_scan(_then, (change, low, high), axis=1)
  after = jnp.clip(change, low, high)
  before = jnp.pad(after[:, :-1], ((0, 0), (1, 0)))
  before = jnp.where(first, 0, before) + earned
  return alive & jnp.where(among_best, before >= 1, before > credit)


def _rank_among_last(score, place, window):
  """How many of the last `window - 1` of the document are as good or better."""
  T = score.shape[1]
  padded = jnp.pad(score, ((0, 0), (window, 0)))

  def compare(distance, rank):
    other = lax.dynamic_slice_in_dim(padded, window - distance, T, axis=1)
    return rank + ((place > distance) & (other >= score))

  return lax.fori_loop(1, window, compare, jnp.zeros_like(place))


def _then(one, two):
  """The map x -> clip(x + change, low, high) of `one`, and then of `two`."""
  change, low, high = one
  more, low2, high2 = two
  clip = functools.partial(jnp.clip, min=low2, max=high2)
  return change + more, clip(low + more), clip(high + more)


def compact(
  kept: Bool[Array, 'B T'], size: int
) -> tuple[Int[Array, 'B M'], Bool[Array, 'B M']]:
  """Places of what is kept, in order, and which of them are real.

  Args:
    kept: at most `size` a row.
    size: M.

  Returns:
    Distinct places; behind the kept ones are some of the others, not real.
  """
  at = jnp.argsort(~kept, axis=1, stable=True)[:, :size]
  return at, jnp.take_along_axis(kept, at, axis=1)


def top_heads(
  importance: Float[Array, 'R K'], heads: Int[Array, 'R n'], count: int
) -> Int[Array, 'R M']:
  """The `count` most important of `heads`, ascending, ties by position."""
  scores = jnp.take_along_axis(importance, heads, axis=1)
  chosen = topk.top_k(scores, count).indices
  return jnp.take_along_axis(heads, chosen, axis=1)


def pairs(
  document: Int[Array, 'B T'] | None, alive: Bool[Array, 'B T'], causal: bool
) -> jax.Array:
  """[B] f32: pairs of a query and a key that it reads.

  Args:
    document: a number for each, in runs; None where a row is one document.
    alive: what counts; it comes first.
    causal: whether a query reads only keys up to its own.
  """
  if document is None:
    count = alive.sum(1).astype(jnp.float32)
    return count * (count + 1) / 2 if causal else count * count
  _, place, length = runs(jnp.where(alive, document, -1))
  counts = jnp.where(alive, place if causal else length, 0)
  return counts.astype(jnp.float32).sum(1)
