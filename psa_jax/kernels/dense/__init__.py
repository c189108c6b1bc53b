"""Dense attention in linear memory: the honest opponent; see `api.py`."""

from psa_jax.kernels.dense.api import IMPLEMENTATIONS, dense_attention

__all__ = ['IMPLEMENTATIONS', 'dense_attention']
