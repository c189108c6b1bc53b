"""Sparse attention by a learned indexer (`dsa`), DSA of DeepSeek-V3.2-Exp."""

from psa_jax.attention.dsa.attention import DsaConfig, dsa
from psa_jax.attention.dsa.parameters import Indexer
from psa_jax.attention.registry import MechanismSpec, register

SPEC = register(
  MechanismSpec(
    name='dsa',
    function=dsa,
    config=DsaConfig,
    parameters=Indexer,
    needs_learned=True,
    needs_rotary=True,
    axes={
      'index_q': ('embed', 'index_heads', 'head_dim'),
      'index_k': ('embed', 'head_dim'),
      'index_w': ('embed', 'index_heads'),
    },
    causal_only=True,
    takes_budget=True,
    reads_norm=True,
  )
)
