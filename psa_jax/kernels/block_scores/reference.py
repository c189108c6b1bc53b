"""The definition of block scores, in a few plain lines and all at once."""

import jax
import jax.numpy as jnp

from psa_jax.kernels.block_scores.ranges import Scores


def top_blocks(queries, pooled, ranges, *, spec):
  """See `api.top_blocks`."""
  B, tiles, N, H = queries.shape
  K, blocks = pooled.total.shape[1:3]
  q = queries.astype(jnp.float32).reshape(B, tiles, K, N // K, 1, H)
  q = jnp.moveaxis(q, 1, 2) * spec.scale  # [B, K, tiles, G, 1, H]
  size = jnp.maximum(pooled.size, 1)[:, None, None, None]

  def beside(x):  # [B, K, blocks, H] -> [B, K, 1, 1, blocks, H]
    return x[:, :, None, None]

  mean = beside(pooled.total) / size[..., None]
  estimate = (q * mean).sum(-1) + jnp.log(size)
  bound = estimate
  if spec.bounds:
    box = jnp.maximum(q * beside(pooled.low), q * beside(pooled.high))
    bound = box.sum(-1) + jnp.log(size)
  eligible, forced, visible = ranges.masks(blocks)
  scores = Scores(estimate, bound, eligible[..., None, :])

  log_p = jnp.where(scores.eligible, bound, -jnp.inf)
  log_p = jax.nn.log_softmax(log_p, axis=-1)
  log_p = jnp.where(scores.eligible, log_p, -jnp.inf)
  importance = jax.nn.logsumexp(log_p, axis=-2)
  j = jnp.broadcast_to(jnp.arange(blocks), (B, K, tiles, blocks))
  # Forced blocks first, the last one of them leading; then by importance and
  # by position; what is not visible comes last.
  kind = jnp.where(forced, 0, jnp.where(visible, 1, 2))
  kind = jnp.broadcast_to(kind, j.shape)
  key = jnp.where(forced, -j, -importance)
  order = jnp.lexsort((j, key, kind), axis=-1).astype(jnp.int32)
  counts = spec.stop(scores, order) if spec.stop else None
  return order[..., : spec.width], counts
