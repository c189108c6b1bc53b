"""Normalisation layers: RMSNorm, LayerNorm, BatchNorm, RepBN and PRepBN."""

from psa_jax.norm.prepbn import Norm as Norm
from psa_jax.norm.prepbn import gamma as gamma
