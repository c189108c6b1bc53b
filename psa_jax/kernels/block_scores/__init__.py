"""The most important key blocks of a query; see `api.py` and `pooled.py`."""

from psa_jax.kernels.block_scores.api import IMPLEMENTATIONS, top_blocks
from psa_jax.kernels.block_scores.pooled import Pooled, append, empty, pool
from psa_jax.kernels.block_scores.ranges import Ranges, Scores

__all__ = [
  'IMPLEMENTATIONS',
  'Pooled',
  'Ranges',
  'Scores',
  'append',
  'empty',
  'pool',
  'top_blocks',
]
