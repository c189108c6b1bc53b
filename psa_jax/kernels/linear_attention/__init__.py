"""Attention without a softmax, linear in the length."""

from psa_jax.kernels.linear_attention.api import (
  linear_attention as linear_attention,
)
