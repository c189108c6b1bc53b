"""Attention over the k best keys of every query; see `api.py`."""

from psa_jax.kernels.topk_attention.api import IMPLEMENTATIONS, topk_attention

__all__ = ['IMPLEMENTATIONS', 'topk_attention']
