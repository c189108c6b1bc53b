"""Attention over lists of key blocks; see `api.py`."""

from psa_jax.kernels.block_sparse.api import (
  IMPLEMENTATIONS,
  block_sparse_attention,
)

__all__ = ['IMPLEMENTATIONS', 'block_sparse_attention']
