"""Progressive sparse attention in JAX: what a program imports.

  attention(query, key, value, kind='psa', is_causal=True, keep=0.25)
  attention_fn('psa', keep=schedules.linear(1, 0.25, length=1000))
  nnx.SparseAttention, nnx.PRepBN        Flax NNX modules
  sparse_poly_softmax, top_k             the operations below them
  schedules, at_step                     how much, as a function of the step
  register, MechanismSpec                mechanisms of one's own

`attention` is also the package of the mechanisms, which can be called:
`psa_jax/attention/__init__.py`. It is imported at once, because the
configuration asks the mechanisms which settings there are; the other names are
loaded when they are first used.
"""

import importlib
from typing import TYPE_CHECKING

from psa_jax.attention.registry import MechanismSpec as MechanismSpec
from psa_jax.attention.registry import register as register

if TYPE_CHECKING:
  from psa_jax import nnx as nnx
  from psa_jax import schedules as schedules
  from psa_jax.attention.call import at_step as at_step
  from psa_jax.attention.call import attention as attention
  from psa_jax.attention.call import attention_fn as attention_fn
  from psa_jax.attention.call import sparse_poly_softmax as sparse_poly_softmax
  from psa_jax.attention.call import top_k as top_k
  from psa_jax.types import AttnOut as AttnOut
  from psa_jax.types import Learned as Learned

__version__ = '0.1.0'

_MODULES = ('nnx', 'schedules')
# Public name -> the module that defines it.
_HOMES = {
  'at_step': 'psa_jax.attention.call',
  'attention_fn': 'psa_jax.attention.call',
  'sparse_poly_softmax': 'psa_jax.attention.call',
  'top_k': 'psa_jax.attention.call',
  'AttnOut': 'psa_jax.types',
  'Learned': 'psa_jax.types',
}
__all__ = [  # noqa: PLE0604
  '__version__',
  'attention',
  'MechanismSpec',
  'register',
  *_MODULES,
  *_HOMES,
]


def __getattr__(name: str):
  if name in _MODULES:
    return importlib.import_module(f'psa_jax.{name}')
  if name in _HOMES:
    return getattr(importlib.import_module(_HOMES[name]), name)
  raise AttributeError(f"module 'psa_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
  return sorted([*globals(), *_MODULES, *_HOMES])
