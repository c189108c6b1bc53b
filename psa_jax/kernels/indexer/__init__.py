"""The lightning indexer of DSA: which keys matter, by a small learned score."""

from psa_jax.kernels.indexer.divergence import divergence as divergence
from psa_jax.kernels.indexer.scores import Index as Index
from psa_jax.kernels.indexer.scores import block_importance as block_importance
