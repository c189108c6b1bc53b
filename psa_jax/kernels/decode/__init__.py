"""Attention of the newest queries over a cache; see `api.py`."""

from psa_jax.kernels.decode.api import IMPLEMENTATIONS, decode_attention

__all__ = ['IMPLEMENTATIONS', 'decode_attention']
