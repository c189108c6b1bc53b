"""Attention over the keys with the largest scores, token by token.

Every query keeps the `counts` largest raw scores among the keys it sees, ties
by position (`psa_jax/kernels/topk`), and weighs them by the softmax of a
polynomial of the clamped score (`kernels/softmax.py`). Every other key has
weight exactly 0. The choice is made before clamp and polynomial: an even one
may give a low score a high weight, but not a place.

What is saved is which values count, not the scores: to know the k best of a
row all of it is scored, so the work is that of dense attention plus the
selection. Memory is linear in T and S: rows stream, and the backward pass
makes their scores again.

Not done here: how many keys a query keeps, which is the mechanism's; kernels
for accelerators, which take `xla` (the selection inside is Pallas on a TPU).
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from psa_jax.kernels import arguments, platform, softmax
from psa_jax.kernels.platform import Implementation
from psa_jax.kernels.topk_attention import reference, xla

IMPLEMENTATIONS = {
  'xla': Implementation(xla.topk_attention),
  'reference': Implementation(reference.topk_attention, automatic=False),
}


@dataclasses.dataclass(frozen=True)
class Spec:
  """The static part of a call."""

  causal: bool
  max_count: int
  kind: softmax.Kind
  scale: float


def topk_attention(
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B S K H'],
  v: Float[Array, 'B S K Hv'],
  coeffs: Float[Array, '4'],
  *,
  begin: Int[Array, 'B T'],
  end: Int[Array, 'B T'],
  counts: Int[Array, 'B T'],
  causal: bool,
  max_count: int | None = None,
  clamp: float = 0.0,
  scale: float | None = None,
  implementation: str = 'auto',
) -> Float[Array, 'B T N Hv']:
  """Polynomial softmax over the largest scores of every query.

  Differentiable in q, k, v and the coefficients; which keys are kept is
  constant.

  Args:
    q: queries; query head `n` reads kv head `n // (N // K)` and chooses for
      itself.
    k: keys.
    v: values; `Hv` may differ from `H`.
    coeffs: a0 to a3, ascending; (0, 1, 0, 0) is the softmax. a0 moves no
      weight, for it adds the same to every key, and its gradient is exactly 0:
      the noise of rounding in its place is what Adam would make steps of.
    begin: the first key that each query sees, and
    end: one past the last.
    counts: keys that each query keeps, of those it sees; traced. At most the
      number of these, and of `max_count`, are.
    causal: a promise that S = T and no query sees past its own position, which
      saves the work of what none of them sees.
    max_count: a static bound on the counts, which makes the search faster
      where it is far below S. None means S.
    clamp: scores are cut to [-clamp, clamp] before the polynomial; 0 is off.
    scale: factor on the scores; None means H ** -0.5.
    implementation: a key of `IMPLEMENTATIONS`, or `auto`.

  Returns:
    The output in the dtype of `v`; 0 for a query that keeps nothing. Scores
    and weights are f32 whatever the inputs' dtype.

  Raises:
    ValueError: shapes that do not fit, naming both; an implementation that
      cannot run here, saying why.
  """
  arguments.check_attention(q, k, v, None, None)
  S = k.shape[1]
  if causal and q.shape[1] != S:
    raise ValueError(
      f'causal=True is for queries {q.shape} and keys {k.shape} of one '
      'length; give begin and end with causal=False'
    )
  if clamp < 0:
    raise ValueError(f'clamp={clamp} must be >= 0; 0 turns it off')
  most = S if max_count is None else min(max(max_count, 1), S)
  scale = arguments.scale_or_default(q, scale)
  kind = softmax.Kind('polynomial', clamp=float(clamp) or math.inf)
  spec = Spec(causal, most, kind, scale)
  begin, end = (jnp.clip(x.astype(jnp.int32), 0, S) for x in (begin, end))
  counts = jnp.clip(counts.astype(jnp.int32), 0, jnp.maximum(end - begin, 0))
  rows = jax.lax.stop_gradient((begin, end, jnp.minimum(counts, most)))
  a0 = jax.lax.stop_gradient(coeffs[:1])
  args = q, k, v, jnp.concatenate([a0, coeffs[1:]]), rows
  run = platform.pick(implementation, IMPLEMENTATIONS, *args, spec=spec)
  return run(*args, spec=spec)
