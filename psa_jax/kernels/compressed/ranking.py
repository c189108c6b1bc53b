"""Which compressed keys a query sees, and from block scores to a list."""

import jax.numpy as jnp
from jax import lax

FIRST = 1e6  # score of a block that comes first whatever its own


def newest(t, block, stride):
  """Number of the last compressed key that a query at `t` sees, or below 0."""
  return (t - block + 1) // stride


def rank(scores, ranges, width):
  """[B, K, Tb, width] blocks in the order that `api.top_blocks` promises.

  Args:
    scores: [B, K, Tb, blocks], not negative.
    ranges: of the same queries.
    width: entries of a list.
  """
  blocks = scores.shape[-1]
  _, forced, visible = ranges.masks(blocks)
  # Distinct scores: of the forced blocks the last comes first.
  place = jnp.arange(blocks, dtype=scores.dtype).reshape(1, 1, 1, -1)
  scores = jnp.where(forced, FIRST + place, scores)
  scores = jnp.where(visible, scores, -1)
  return lax.top_k(scores, width)[1].astype(jnp.int32)
