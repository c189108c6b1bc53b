"""The online softmax that the tiled kernels share.

A tile of queries meets its keys in pieces. `start`, `add` and `finish` keep
the running maximum, sum and output of FlashAttention (Dao et al. 2022, Alg.
1); `Backward` recomputes the probabilities from the log-sum-exp.

Not done: the polynomial softmax and SAS, which will join here.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Masked scores. Half of it is the initial row maximum, so that a row that has
# read nothing yet has exp(MASKED - MASKED / 2) = 0 and not exp(0).
MASKED = -1e30


class Running(NamedTuple):
  """What a tile has read so far; all in the accumulation dtype.

  Attributes:
    out: [rows, Hv] weighted sum of the values.
    top: [rows] largest score.
    total: [rows] sum of exp(score - top).
  """

  out: jax.Array
  top: jax.Array
  total: jax.Array


def dot(equation: str, a: jax.Array, b: jax.Array, acc) -> jax.Array:
  """An einsum of two operands with sums in `acc`."""
  return jnp.einsum(equation, a, b, preferred_element_type=acc)


def prescale(q: jax.Array, scale: float, acc) -> tuple[jax.Array, float]:
  """Queries that carry the scale, and the factor that scores still need.

  One product a query instead of one a score; low-precision queries keep theirs
  for the scores, where it costs no rounding.
  """
  return (q * scale, 1.0) if q.dtype == acc else (q, scale)


def start(rows: int, width: int, acc) -> Running:
  """Nothing was read yet."""
  return Running(
    jnp.zeros((rows, width), acc),
    jnp.full((rows,), MASKED / 2, acc),
    jnp.zeros((rows,), acc),
  )


def add(run: Running, scores: jax.Array, values: jax.Array) -> Running:
  """Reads values [keys, Hv] with scores [rows, keys], but not MASKED ones."""
  top = jnp.maximum(run.top, scores.max(-1))
  p = jnp.exp(scores - top[:, None])
  old = jnp.exp(run.top - top)
  read = dot('rs,sh->rh', p.astype(values.dtype), values, scores.dtype)
  return Running(
    run.out * old[:, None] + read, top, run.total * old + p.sum(-1)
  )


def finish(run: Running, dtype) -> tuple[jax.Array, jax.Array]:
  """Output in `dtype` and log-sum-exp; 0 and -inf where nothing was read."""
  some = run.total > 0
  total = jnp.where(some, run.total, 1)
  lse = jnp.where(some, run.top + jnp.log(total), -jnp.inf)
  return (run.out / total[:, None]).astype(dtype), lse


class Backward(NamedTuple):
  """What the backward pass knows of every row.

  Attributes:
    lse: log-sum-exp; +inf where nothing was read, so that its exp is 0.
    delta: what every score's gradient has in common.
  """

  lse: jax.Array
  delta: jax.Array

  @classmethod
  def of(cls, out, lse, d_out, d_lse) -> 'Backward':
    """From the forward pass's results [B, T, N, ...] and their gradients."""
    dtype = lse.dtype
    delta = (d_out.astype(dtype) * out.astype(dtype)).sum(-1) - d_lse
    return cls(jnp.where(lse == -jnp.inf, jnp.inf, lse), delta)


def merge(
  outs: Sequence[Float[Array, 'B T N Hv']],
  lses: Sequence[Float[Array, 'B T N']],
) -> tuple[Float[Array, 'B T N Hv'], Float[Array, 'B T N']]:
  """Attention over the union of disjoint sets of keys, from its parts.

  Exact, and differentiable in both arguments: the log-sum-exp of a part is all
  that its share of the whole softmax depends on.

  Args:
    outs: outputs over each set.
    lses: their log-sum-exps; -inf where a query reads nothing of a set.

  Returns:
    Output in the dtype of the parts, and log-sum-exp; 0 and -inf where a query
    reads nothing at all.
  """
  lse = jnp.stack(list(lses))
  top = jax.lax.stop_gradient(lse.max(0))
  top = jnp.where(jnp.isfinite(top), top, 0)
  # exp(-inf) has a gradient of 0 * inf in some rules: leave those parts out.
  some = lse > -jnp.inf
  weight = jnp.where(some, jnp.exp(jnp.where(some, lse, 0) - top[None]), 0)
  total = weight.sum(0)
  read = total > 0
  total = jnp.where(read, total, 1)
  out = sum(
    w[..., None] * part.astype(lse.dtype)
    for w, part in zip(weight / total[None], outs, strict=True)
  )
  merged = jnp.where(read, jnp.log(total) + top, -jnp.inf)
  return jnp.asarray(out).astype(outs[0].dtype), merged
