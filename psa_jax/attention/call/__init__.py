"""Attention as a library call, for models that are not ours.

`attention` has the letters, arguments and meaning of
`jax.nn.dot_product_attention`; `attention_fn` makes of it what Flax's attention
modules call. What a mechanism cannot do is refused by the argument's name.
"""

from psa_jax.attention.call.api import attention as attention
from psa_jax.attention.call.flax_fn import attention_fn as attention_fn
from psa_jax.attention.call.operations import (
  sparse_poly_softmax as sparse_poly_softmax,
)
from psa_jax.attention.call.operations import top_k as top_k
from psa_jax.attention.call.steps import at_step as at_step
