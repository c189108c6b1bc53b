"""One attention layer under cascade pruning: fewer rows, fewer heads, measured.

What `SelfAttention` does, with the heads that are left and with the importance
of what it read as a third result.
"""

from typing import Any

import jax
from jaxtyping import Array, Float

from psa_jax.attention.attend import on_mesh
from psa_jax.attention.cascade.attention import (
  Importance,
  Pruning,
  attend_and_measure,
  head_importance,
)
from psa_jax.attention.context import AttentionContext
from psa_jax.attention.layer import SelfAttention
from psa_jax.attention.projections import project, project_rows, take_heads
from psa_jax.attention.rotary import rotate


def attend_pruned(
  layer: SelfAttention,
  x: Float[Array, 'B T D'],
  pruning: Pruning,
  *,
  context: AttentionContext,
) -> tuple[Float[Array, 'B T D'], dict[str, jax.Array], Importance]:
  """Attends with the heads that are left, and measures.

  Args:
    layer: its projections.
    x: rows that are left, normalised; T may be anything.
    pruning: heads that are left, and which rows count.
    context: with the rotary table of the rows' own positions.

  Returns:
    Output, scalars, and what this layer adds to the importance of the rows
    and of the kv heads that are left.
  """
  kernels = layer.wq, layer.wk, layer.wv, layer.wo
  biases = layer.bq, layer.bk, layer.bv
  apply: Any = project
  heads = pruning.heads
  if heads is not None:
    groups = layer.config.num_kv_heads
    kernels = tuple(
      take_heads(kernel, heads, groups, axis)
      for kernel, axis in zip(kernels, (1, 1, 1, 0), strict=True)
    )
    biases = tuple(
      None if bias is None else take_heads(bias, heads, groups, 0)
      for bias in biases
    )
    apply = project if heads.ndim == 1 else project_rows
  wq, wk, wv, wo = kernels
  bq, bk, bv = biases
  k = rotate(apply(x, wk, bk), context.rope)

  def run(q, k, v, context, learned):
    del learned
    return attend_and_measure(
      q, k, v, config=layer.config.attention, context=context
    )

  (out, aux), tokens = on_mesh(
    run,
    rotate(apply(x, wq, bq), context.rope),
    k,
    apply(x, wv, bv),
    context,
    None,
    measured=True,
  )
  size = head_importance(out, k.shape[2], pruning.alive)
  out = apply(out, wo, layer.bo, inputs=2)
  return out, aux, Importance(tokens, size)
