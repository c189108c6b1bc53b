"""Dense softmax attention with the same arguments as the sparse kernels.

The fast kernels of accelerators are those that JAX ships: splash attention on
TPU, cuDNN on NVIDIA GPUs. `xla` is portable.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from psa_jax.kernels import arguments, platform, unread
from psa_jax.kernels.dense import cudnn, pallas_tpu, reference, xla
from psa_jax.kernels.platform import Implementation

IMPLEMENTATIONS = {
  'pallas_tpu': Implementation(
    pallas_tpu.dense_attention, pallas_tpu.refusal, platform='tpu'
  ),
  'cudnn': Implementation(cudnn.dense_attention, cudnn.refusal, platform='gpu'),
  'xla': Implementation(xla.dense_attention),
  'reference': Implementation(reference.dense_attention, automatic=False),
}


@dataclasses.dataclass(frozen=True)
class Spec:
  """The static part of a call."""

  causal: bool
  q_offset: int
  scale: float


def dense_attention(
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B S K H'],
  v: Float[Array, 'B S K Hv'],
  *,
  causal: bool = True,
  q_segment_ids: Int[Array, 'B T'] | None = None,
  kv_segment_ids: Int[Array, 'B S'] | None = None,
  q_offset: int = 0,
  scale: float | None = None,
  implementation: str = 'auto',
) -> tuple[Float[Array, 'B T N Hv'], Float[Array, 'B T N']]:
  """Softmax attention over every visible key, in memory linear in T and S.

  Args:
    q: queries; query head `n` reads kv head `n // (N // K)`.
    k: keys.
    v: values; `Hv` may differ from `H`.
    causal: a query at position `t + q_offset` reads keys at positions up to
      its own.
    q_segment_ids: with `kv_segment_ids`, a query reads keys of its own
      segment only.
    kv_segment_ids: see `q_segment_ids`.
    q_offset: position of the first query.
    scale: factor on the scores; None means H ** -0.5.
    implementation: a key of `IMPLEMENTATIONS`, or `auto` for the platform's
      best; `reference` takes quadratic memory.

  Returns:
    The output in the dtype of `v` and the log-sum-exp of the scores (f32, or
    f64 for f64 inputs). A query that sees nothing gives 0 and -inf.

  Raises:
    ValueError: shapes that do not fit, naming them; an implementation that
      cannot run here, saying why.
  """
  arguments.check_attention(q, k, v, q_segment_ids, kv_segment_ids)
  if not (q.size and k.shape[1]):  # nothing is read
    acc = jnp.promote_types(q.dtype, jnp.float32)
    nothing = jnp.zeros((*q.shape[:3], v.shape[-1]), v.dtype)
    return nothing, jnp.full(q.shape[:3], -jnp.inf, acc)
  segments = arguments.segments(q_segment_ids, kv_segment_ids)
  spec = Spec(causal, q_offset, arguments.scale_or_default(q, scale))
  args = q, *unread.mark(k, v), segments
  run = platform.pick(implementation, IMPLEMENTATIONS, *args, spec=spec)
  return run(*args, spec=spec)
