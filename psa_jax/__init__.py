"""Progressive sparse attention in JAX."""

from psa_jax import attention as attention
from psa_jax.attention.registry import MechanismSpec as MechanismSpec
from psa_jax.attention.registry import register as register
