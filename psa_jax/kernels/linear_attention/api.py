"""Attention whose weights are products q . k, without a softmax.

  out[t] = sum_s (q[t] . k[s]) v[s] / (sum_s q[t] . k[s] + eps)

over the visible keys s. The sums over s do not depend on t, so their state of
H x Hv numbers takes the place of the keys (Katharopoulos et al. 2020,
arXiv 2006.16236): O(T H Hv) instead of O(T^2 (H + Hv)). Queries and keys have
passed through a feature map before, and must not be negative: then the
denominator is a sum of terms >= 0, and eps keeps it from being 0.

Not done: Pallas kernels; the products are large enough for XLA's.
"""

import dataclasses

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from psa_jax.kernels import arguments, platform, unread
from psa_jax.kernels.linear_attention import reference, xla
from psa_jax.kernels.platform import Implementation

IMPLEMENTATIONS = {
  'xla': Implementation(xla.linear_attention),
  'reference': Implementation(reference.linear_attention, automatic=False),
}


@dataclasses.dataclass(frozen=True)
class Spec:
  """The static part of a call."""

  causal: bool
  eps: float


def linear_attention(
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B S K H'],
  v: Float[Array, 'B S K Hv'],
  *,
  causal: bool = True,
  segment_ids: Int[Array, 'B T'] | None = None,
  eps: float = 1e-6,
  implementation: str = 'auto',
) -> Float[Array, 'B T N Hv']:
  """Linear attention, in memory linear in T forward and backward.

  Args:
    q: queries >= 0; head `n` reads kv head `n // (N // K)`.
    k: keys >= 0; S = T.
    v: values.
    causal: a query reads keys up to its own position, else all.
    segment_ids: a query reads keys of its own segment only; the tokens of a
      segment lie next to each other.
    eps: added to the denominator.
    implementation: a key of `IMPLEMENTATIONS`, or `auto`.

  Returns:
    In the dtype of `v`; sums are f32 (f64 for f64 inputs) whatever that is,
    for a bf16 sum stops growing after a few hundred keys.

  Raises:
    ValueError: shapes that do not fit, or an implementation that cannot run.
  """
  arguments.check_attention(q, k, v, segment_ids, segment_ids)
  if q.shape[1] != k.shape[1]:
    raise ValueError(f'q {q.shape} and k {k.shape} must be of one length')
  spec = Spec(causal, eps)
  bad = ~(unread.finite(k) & unread.finite(v))
  bad = jnp.repeat(
    _read_by(bad, segment_ids, causal), q.shape[2] // k.shape[2], 2
  )
  bad = bad | ~unread.finite(q)
  args = *(unread.clean(x) for x in (q, k, v)), segment_ids
  run = platform.pick(implementation, IMPLEMENTATIONS, *args, spec=spec)
  return unread.spoil(run(*args, spec=spec), bad)


def _read_by(bad, segment_ids, causal):
  """[B, T, K] bool: which query reads one of the keys that `bad` names."""
  at = jnp.arange(bad.shape[1])[None, :, None]
  last = lax.cummax(jnp.where(bad, at, -1), axis=1)
  if segment_ids is None:
    reads = last >= 0
  else:
    new = jnp.diff(segment_ids, axis=1, prepend=segment_ids[:, :1]) != 0
    reads = last >= lax.cummax(jnp.where(new[..., None], at, 0), axis=1)
  if causal:
    return reads
  if segment_ids is not None:
    segment_ids = jnp.flip(segment_ids, 1)
  after = _read_by(jnp.flip(bad, 1), segment_ids, causal=True)
  return reads | jnp.flip(after, 1)
