"""The k largest entries of a row in O(n); see `api.py`."""

from psa_jax.kernels.topk.api import (
  IMPLEMENTATIONS,
  TopK,
  select,
  threshold,
  top_k,
)

__all__ = ['IMPLEMENTATIONS', 'TopK', 'select', 'threshold', 'top_k']
