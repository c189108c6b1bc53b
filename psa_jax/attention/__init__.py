"""The mechanisms, one file each; and `psa_jax.attention(...)`, the call.

Importing any module of a package sets the package as an attribute of its
parent, so a function `psa_jax.attention` would last until the first
`import psa_jax.attention.psa`. The package itself is callable instead.
"""

import sys
import types


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
