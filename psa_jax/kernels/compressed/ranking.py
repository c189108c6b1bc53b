"""Which compressed keys a query sees, and from block scores to a list."""

import jax.numpy as jnp
from jax import lax

# Logarithms of scores are at most that of heads times cells.
FIRST = 1e6  # of a block that comes first whatever its score
LEAST = float(jnp.finfo(jnp.float32).min)  # of a visible one whose score is 0


def newest(t, block, stride):
  """Number of the last compressed key that a query at `t` sees, or below 0."""
  return (t - block + 1) // stride


def rank(scores, ranges, width):
  """[B, K, Tb, width] blocks in the order that `api.top_blocks` promises.

  Args:
    scores: [B, K, Tb, blocks], the logarithms; -inf of a score of 0.
    ranges: of the same queries.
    width: entries of a list.
  """
  blocks = scores.shape[-1]
  _, forced, visible = ranges.masks(blocks)
  # Distinct scores: of the forced blocks the last comes first.
  place = jnp.arange(blocks, dtype=scores.dtype).reshape(1, 1, 1, -1)
  scores = jnp.where(forced, FIRST + place, jnp.maximum(scores, LEAST))
  scores = jnp.where(visible, scores, -jnp.inf)
  return lax.top_k(scores, width)[1].astype(jnp.int32)
