"""Attention that reads only the listed key blocks.

The contract between *which* and *how fast* is a block list: for every batch
row, kv head and tile of `block_q` queries, `block_ids` names key blocks (most
important first, no duplicates) and `block_counts` says how many of them are
read. Counts are traced, so they may change at every step without compiling
again, and the work done is proportional to them.

Not done here: choosing the blocks; see `psa_jax/attention`.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from psa_jax.kernels import arguments, platform, unread
from psa_jax.kernels import softmax as softmax_lib
from psa_jax.kernels.block_sparse import (
  lists,
  pallas_gpu,
  pallas_tpu,
  reference,
  xla,
  xla_keys,
)
from psa_jax.kernels.platform import Implementation


def _on_gpu(*args, spec):
  """The kernel that knows the exact softmax only, without coefficients."""
  return pallas_gpu.block_sparse_attention(*args[:-1], spec=spec)


def _gpu_refusal(where, *args, spec):
  if spec.softmax.name != 'exact':
    return f'its softmax is exact, not {spec.softmax.name}'
  return pallas_gpu.refusal(where, *args[:-1], spec=spec)


IMPLEMENTATIONS = {
  'pallas_tpu': Implementation(
    pallas_tpu.block_sparse_attention, pallas_tpu.refusal, platform='tpu'
  ),
  'pallas_gpu': Implementation(_on_gpu, _gpu_refusal, platform='gpu'),
  'xla_keys': Implementation(
    xla_keys.block_sparse_attention, slower=xla_keys.slower
  ),
  'xla': Implementation(xla.block_sparse_attention),
  'reference': Implementation(
    reference.block_sparse_attention, automatic=False
  ),
}


@dataclasses.dataclass(frozen=True)
class Spec:
  """The static part of a call."""

  block_q: int
  block_k: int
  causal: bool
  window: int | None
  q_offset: int
  scale: float
  softmax: softmax_lib.Kind = softmax_lib.EXACT


def block_sparse_attention(
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B S K H'],
  v: Float[Array, 'B S K Hv'],
  block_ids: Int[Array, 'B K Tb M'],
  block_counts: Int[Array, 'B K Tb'],
  *,
  block_q: int,
  block_k: int,
  causal: bool = True,
  window: int | None = None,
  q_segment_ids: Int[Array, 'B T'] | None = None,
  kv_segment_ids: Int[Array, 'B S'] | None = None,
  q_offset: int = 0,
  scale: float | None = None,
  softmax: str | softmax_lib.Kind = 'exact',
  coefficients: Float[Array, '4'] | None = None,
  check_lists: bool = False,
  implementation: str = 'auto',
) -> tuple[Float[Array, 'B T N Hv'], Float[Array, 'B T N']]:
  """Softmax attention over the keys of the listed blocks.

  Args:
    q: queries; query head `n` reads kv head `n // (N // K)`.
    k: keys.
    v: values; `Hv` may differ from `H`.
    block_ids: per tile of queries, indices of key blocks in [0, ceil(S /
      block_k)), without duplicates among the first `block_counts`. Entries
      past the count may hold anything.
    block_counts: how many entries of `block_ids` to read; traced.
    block_q: queries that share one list; the last tile may be partial.
    block_k: keys a block; the last block may be partial.
    causal: a query at position `t + q_offset` reads keys at positions up to
      its own.
    window: on top of the list, a query reads only the `window` keys up to and
      including its own position.
    q_segment_ids: with `kv_segment_ids`, a query reads keys of its own
      segment only.
    kv_segment_ids: see `q_segment_ids`.
    q_offset: position of the first query, for prefill in chunks.
    scale: factor on the scores; None means H ** -0.5.
    softmax: `exact`, `polynomial` or `sas`, see `psa_jax/kernels/softmax.py`;
      a `Kind` sets the polynomial's clamp too.
    coefficients: (a0, a1, a2, a3) of the polynomial; traced, with gradients.
    check_lists: for debugging: the running program stops with the first list
      that names a block twice or one that is not there. Costs a copy of the
      lists to the host.
    implementation: a key of `IMPLEMENTATIONS`, or `auto` for the platform's
      best.

  Returns:
    The output in the dtype of `v`, and the log-sum-exp of the scores that were
    read (f32, or f64 for f64 inputs). A query that reads nothing gives 0 and
    -inf. Softmax and accumulations are f32 whatever the inputs' dtype.

  Raises:
    ValueError: shapes that do not fit, naming both; an implementation that
      cannot run here, saying why.
  """
  arguments.check_attention(q, k, v, q_segment_ids, kv_segment_ids)
  _check_lists(q, k, block_ids, block_counts, block_q, block_k)
  if window is not None and (window < 1 or not causal):
    raise ValueError(f'window={window} must be >= 1 and needs causal=True')
  spec = Spec(
    block_q,
    block_k,
    causal,
    window,
    q_offset,
    arguments.scale_or_default(q, scale),
    arguments.softmax_kind(softmax, coefficients),
  )
  segments = arguments.segments(q_segment_ids, kv_segment_ids)
  ids = jax.lax.stop_gradient(block_ids.astype(jnp.int32))
  counts = jax.lax.stop_gradient(block_counts.astype(jnp.int32))
  if check_lists:
    lists.check_when_run(ids, counts, -(-k.shape[1] // block_k))
  args = q, *unread.mark(k, v), ids, counts, segments, coefficients
  run = platform.pick(implementation, IMPLEMENTATIONS, *args, spec=spec)
  return run(*args, spec=spec)


def _check_lists(q, k, ids, counts, block_q, block_k):
  if block_q < 1 or block_k < 1:
    raise ValueError(f'block_q={block_q} and block_k={block_k} must be >= 1')
  tiles = -(-q.shape[1] // block_q)
  want = (q.shape[0], k.shape[2], tiles)
  if ids.shape[:3] != want or counts.shape != want:
    raise ValueError(
      f'block_ids {ids.shape} and block_counts {counts.shape} must start with '
      f'[B, K, ceil(T / block_q)] = {want}'
    )
