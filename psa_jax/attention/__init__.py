"""The mechanisms, one file each; and `psa_jax.attention(...)`, the call.

Importing any module of a package sets the package as an attribute of its
parent, so a function `psa_jax.attention` would last until the first
`import psa_jax.attention.psa`. The package itself is callable instead.

Importing a mechanism registers it. A new one is a file here and a line below.
"""

import sys
import types

# In the order in which the configuration shows them.
# isort: off
from psa_jax.attention import dense as dense
from psa_jax.attention import psa as psa
from psa_jax.attention import topk as topk
from psa_jax.attention import hybrid as hybrid
from psa_jax.attention import on_demand as on_demand
from psa_jax.attention import nsa as nsa
from psa_jax.attention import dsa as dsa
from psa_jax.attention import sla as sla
from psa_jax.attention import cascade as cascade

# isort: on
from psa_jax.attention.attend import attend as attend
from psa_jax.attention.context import AttentionContext as AttentionContext
from psa_jax.attention.registry import MechanismSpec as MechanismSpec
from psa_jax.attention.registry import register as register


class _CallablePackage(types.ModuleType):
  def __call__(self, *args, **kwargs):
    from psa_jax.attention.call import attention

    return attention(*args, **kwargs)

  @property
  def __signature__(self):
    import inspect

    from psa_jax.attention.call import attention

    return inspect.signature(attention)


sys.modules[__name__].__class__ = _CallablePackage
