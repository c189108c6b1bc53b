"""Attention to compressed keys, and the blocks it points at; see `api.py`."""

from psa_jax.kernels.compressed.api import (
  IMPLEMENTATIONS,
  compressed_attention,
  count,
  top_blocks,
)
from psa_jax.kernels.compressed.ranking import newest

__all__ = [
  'IMPLEMENTATIONS',
  'compressed_attention',
  'count',
  'newest',
  'top_blocks',
]
