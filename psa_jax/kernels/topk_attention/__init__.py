"""Attention over the k best keys of every query; see `api.py`."""

from psa_jax.kernels.topk_attention.api import IMPLEMENTATIONS, topk_attention
from psa_jax.kernels.topk_attention.polynomial import clamped, value

__all__ = ['IMPLEMENTATIONS', 'clamped', 'topk_attention', 'value']
