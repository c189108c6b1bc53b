"""Block scores in plain XLA, streamed over chunks of queries."""

import jax
import jax.numpy as jnp
from jax import lax

from psa_jax.kernels import platform
from psa_jax.kernels.block_scores.ranges import Scores

TILES_AT_ONCE = 64  # queries scored together; bounds the score array
# On a GPU every step of a loop costs some launches: 64 MB of scores a step.
SCORES_ON_GPU = 2**24
FEW_ROWS = 8  # queries a kv head that a CPU scores one by one
# Logarithms of importance are at most that of the number of heads.
ALWAYS = 1e6  # of a block that comes first whatever its score
LEAST = float(jnp.finfo(jnp.float32).min)  # of a visible one without a score


def top_blocks(queries, pooled, ranges, *, spec):
  """See `api.top_blocks`."""
  B, tiles, N, H = queries.shape
  K = pooled.total.shape[1]
  queries = queries.reshape(B, tiles, K, N // K, H)
  group = min(_tiles_at_once(B * N * pooled.size.shape[1]), tiles)

  def split(x):  # [B, tiles, *] -> [chunks, B, group, *]
    rest = [(0, 0)] * (x.ndim - 2)
    x = jnp.pad(x, [(0, 0), (0, -tiles % group), *rest])
    return jnp.moveaxis(x.reshape(B, -1, group, *x.shape[2:]), 1, 0)

  def join(x):  # [chunks, B, K, group, *] -> [B, K, tiles, *]
    x = jnp.moveaxis(x, 0, 2)
    return x.reshape(B, K, -1, *x.shape[4:])[:, :, :tiles]

  if group == tiles:
    return _rank(queries, ranges, pooled, spec)
  chunks = jax.tree.map(split, (queries, ranges))
  lists = lax.map(lambda chunk: _rank(*chunk, pooled, spec), chunks)
  return jax.tree.map(join, lists)


def _tiles_at_once(scores: int) -> int:
  """Queries scored together, of which each has so many scores."""
  if platform.current().platform != 'gpu':
    return TILES_AT_ONCE
  return max(TILES_AT_ONCE, SCORES_ON_GPU // scores)


def _rank(queries, ranges, pooled, spec):
  """The lists of some queries [B, n, K, G, H], and their counts."""
  blocks = pooled.size.shape[1]
  eligible, forced, visible = ranges.masks(blocks)
  estimate, bound = _scores(queries, pooled, spec)
  scores = Scores(estimate, bound, eligible[..., None, :])
  importance = jnp.maximum(_log_importance(scores), LEAST)
  rank = ALWAYS + jnp.arange(blocks, dtype=jnp.float32).reshape(1, 1, 1, -1)
  importance = jnp.where(forced, rank, importance)
  importance = jnp.where(visible, importance, -jnp.inf)
  order = lax.top_k(importance, blocks if spec.stop else spec.width)[1]
  counts = spec.stop(scores, order) if spec.stop else None
  return order[..., : spec.width].astype(jnp.int32), counts


def _log_importance(scores):
  """[B, K, n, blocks]: log of the softmax over blocks, summed over the heads.

  -inf of what does not compete. The softmax itself is 0 in f32 where scores lie
  104 below the largest: such blocks would all tie.
  """
  x = jnp.where(scores.eligible, scores.bound, -jnp.inf)
  top = x.max(-1, keepdims=True)
  x = x - jnp.where(jnp.isfinite(top), top, 0)
  # The sum is at least 1 where anything competes.
  total = jnp.maximum(jnp.exp(x).sum(-1, keepdims=True), 1)
  return jax.nn.logsumexp(x - jnp.log(total), axis=-2)


def _scores(queries, pooled, spec):
  """Estimate and bound, [B, K, n, G, blocks]; see `Scores`."""
  queries = queries.astype(jnp.float32) * spec.scale
  size = jnp.maximum(pooled.size, 1).astype(jnp.float32)
  size = size[:, None, None, None]
  estimate = _dot(queries, pooled.total) / size + jnp.log(size)
  if not spec.bounds:
    return estimate, estimate
  high = _dot(jnp.maximum(queries, 0), pooled.high)
  low = _dot(jnp.minimum(queries, 0), pooled.low)
  return estimate, high + low + jnp.log(size)


def _dot(queries, keys):
  """[B, n, K, G, H] times [B, K, blocks, H] -> [B, K, n, G, blocks]."""
  B, n, K, G, H = queries.shape
  if n * G > FEW_ROWS or platform.current().platform != 'cpu':
    return jnp.einsum('bnkgh,bkjh->bkngj', queries, keys)
  # A decoding step: on CPU a batched product costs more to start than this
  # many products with a vector take.
  rows = jnp.moveaxis(queries, 1, 2).reshape(B * K, n * G, H)

  def one_head(head):
    rows, keys = head
    return jnp.stack([keys @ row for row in rows])

  out = lax.map(one_head, (rows, keys.reshape(B * K, -1, H)))
  return out.reshape(B, K, n, G, -1)
