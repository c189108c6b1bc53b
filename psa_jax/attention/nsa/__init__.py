"""Native sparse attention (`nsa`, `nsa_tile`), arXiv 2502.11089."""

import dataclasses

from psa_jax.attention.nsa.branches import NsaConfig, nsa, nsa_tile
from psa_jax.attention.nsa.parameters import NsaParameters
from psa_jax.attention.registry import MechanismSpec, register

SPEC = MechanismSpec(
  name='nsa',
  function=nsa,
  config=NsaConfig,
  section='nsa',
  parameters=NsaParameters,
  needs_learned=True,
  needs_rotary=True,
  axes={
    'wk_compress': ('embed', 'kv', 'head_dim'),
    'wv_compress': ('embed', 'kv', 'head_dim'),
    'wk_window': ('embed', 'kv', 'head_dim'),
    'wv_window': ('embed', 'kv', 'head_dim'),
    'k_place': ('place', 'head_dim'),
    'k_in': ('place', 'head_dim', 'hidden'),
    'k_out': ('hidden', 'head_dim'),
    'v_place': ('place', 'head_dim'),
    'v_in': ('place', 'head_dim', 'hidden'),
    'v_out': ('hidden', 'head_dim'),
    'gate_in': ('embed', 'hidden'),
    'gate_out': ('hidden', 'heads', 'branch'),
  },
  causal_only=True,
  reads_norm=True,
)

register(SPEC)
# The same parameters and settings; it selects for a tile of queries at a time.
SPEC_TILE = register(
  dataclasses.replace(SPEC, name='nsa_tile', function=nsa_tile)
)
