"""Training: one step, one loop, and everything a run leaves behind."""

from psa_jax import extras

extras.require('train')
