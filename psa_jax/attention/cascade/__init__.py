"""Cascade pruning of tokens and heads (`cascade`), SpAtten, arXiv 2012.09852.

What happens inside a layer; `models/cascade.py` runs the layers.
"""

from psa_jax.attention.cascade.attention import cascade
from psa_jax.attention.cascade.parameters import head_importance_of
from psa_jax.attention.cascade.settings import CascadeConfig
from psa_jax.attention.registry import MechanismSpec, register

SPEC = register(
  MechanismSpec(
    name='cascade',
    function=cascade,
    config=CascadeConfig,
    parameters=head_importance_of,
    axes={'head_importance': ('heads_seen',)},
    reads_norm=False,  # a statistic of the output
    prunes_stack=True,
  )
)
