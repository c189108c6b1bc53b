"""What the block lists of hybrid attention read, counted."""

import jax
import jax.numpy as jnp
import numpy as np

from psa_jax.attention import hybrid
from psa_jax.attention.hybrid import HybridConfig

HEAD = 64


def cost(scale: float, T: int) -> dict[str, float]:
  """Pairs and multiply-adds of one head, counted from its block lists.

  Args:
    scale: size of the random queries; 0 is the flattest attention.
    T: tokens.
  """
  cfg = HybridConfig()
  rng = np.random.default_rng(0)
  q, k = (
    jnp.asarray(rng.standard_normal((1, T, 1, HEAD)) * c, jnp.float32)
    for c in (scale, 1)
  )
  cap = hybrid.cap_at(cfg, 0, True)
  select = jax.jit(lambda q, k: hybrid.select_blocks(q, k, cfg, cap=cap))
  lists, spread = select(q, k)
  read, visible = (
    int(np.asarray(x, np.int64).sum()) * cfg.block_q * cfg.block_k
    for x in (lists.counts, lists.visible)
  )
  tiles, blocks = T // cfg.block_q, -(-T // cfg.block_k)
  # A pair costs a product of scores and one of values; the selection scores
  # every block for one query a tile and sums every key once.
  selection = tiles * blocks * HEAD + T * HEAD
  return {
    'length': T,
    'scale': scale,
    'pairs': read,
    'dense_pairs': visible,
    'multiply_adds': read * 2 * HEAD + selection,
    'dense_multiply_adds': visible * 2 * HEAD,
    'entropy': float(spread.entropy.mean()),
    'capped': float(spread.capped.mean()),
  }
