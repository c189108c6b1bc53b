"""Dense attention on NVIDIA GPUs: cuDNN's fused kernels, through JAX.

`jax.nn.dot_product_attention(implementation='cudnn')` is the same call, but it
rounds the log-sum-exp to the inputs' dtype and drops a gradient that arrives
at it without a word; what stands below it keeps the log-sum-exp in f32, and
its gradient is added here. With `P` the probabilities,

  d lse[t] / d q[t] = scale * sum_s P[t, s] k[s]
  d lse[t] / d k[s] = scale * P[t, s] q[t]

so the first is the same attention with the keys for values, and the second
what that attention's backward pass gives for those values: one more call each,
made only where something depends on the log-sum-exp.

Not done: segment ids, and queries that do not start at position 0, for which
cuDNN's causal mask has no setting. `jax.experimental.pallas.ops.gpu` has a
Mosaic kernel for Hopper, too; it has no causal backward pass.
"""

import functools

import jax
import jax.numpy as jnp

from psa_jax.kernels import unread


def refusal(where, q, k, v, segments, *, spec) -> str | None:
  """Why cuDNN cannot run these arguments on `where`, or None."""
  if where.platform != 'gpu' or where.capability < 80:
    return 'cuDNN attention needs an NVIDIA GPU of the Ampere line or newer'
  if where.interpret:
    return 'cuDNN has no simulator'
  dtypes = {x.dtype.name for x in (q, k, v)}
  if len(dtypes) > 1 or not dtypes <= {'float16', 'bfloat16'}:
    return f'cuDNN attention takes float16 or bfloat16, not {sorted(dtypes)}'
  H, Hv = q.shape[-1], v.shape[-1]
  widest = 256 if where.capability >= 90 else 128
  if H != Hv or H % 8 or H > widest:
    return (
      f'cuDNN attention takes keys and values of one width, a multiple of 8 up '
      f'to {widest}, not {H} and {Hv}'
    )
  if segments is not None:
    return 'cuDNN attention takes no segment ids'
  if spec.causal and spec.q_offset:
    return f'cuDNN attention takes no q_offset, here {spec.q_offset}'
  if 0 in (q.shape[1], k.shape[1]):
    return 'cuDNN attention needs at least one query and one key'
  return _missing()


def _missing() -> str | None:
  """Why there is no cuDNN here, or None."""
  # Private to JAX, so imported only where cuDNN is asked for.
  from jax._src.cudnn import fused_attention_stablehlo as fused

  try:
    fused.check_cudnn_version()
  except RuntimeError as error:
    return f'{error} It comes with jax[cuda13]'
  return None


def dense_attention(q, k, v, segments, *, spec):
  """See `api.dense_attention`."""
  assert segments is None
  # What cuDNN makes of NaN in what it masks is its own affair: it gets none.
  bad = _read_by(spec, q, ~unread.finite(k)) | ~unread.finite(q)
  q, k = unread.clean(q), unread.clean(k)
  out, lse = _fused(spec, q, k, v)
  lse = _log_sum_exp(spec, q, k, jax.lax.stop_gradient(lse))
  return unread.spoil(out, bad), jnp.where(bad, jnp.nan, lse)


def _read_by(spec, q, bad):
  """[B, T, N] bool: which query reads one of the keys `bad` [B, S, K]."""
  (_, T, N, _), (_, S, K) = q.shape, bad.shape
  at = jnp.arange(S)[None, :, None]
  first = jnp.where(bad, at, S).min(1, keepdims=True)
  last = jnp.arange(T)[None, :, None] if spec.causal else S - 1
  return jnp.repeat(jnp.broadcast_to(first <= last, (len(q), T, K)), N // K, 2)


def _fused(spec, q, k, v):
  """Output and f32 log-sum-exp; only the output has a gradient."""
  from jax._src.cudnn import fused_attention_stablehlo as fused

  kind = fused.MaskType.CAUSAL if spec.causal else fused.MaskType.NO_MASK
  out, lse = fused.dot_product_attention(
    q, k, v, scale=spec.scale, mask_type=kind, return_residual=True
  )
  return out, jnp.moveaxis(lse, 1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _log_sum_exp(spec, q, k, lse):
  """`lse`, with its gradient in q and k."""
  del spec, q, k
  return lse


def _forward_rule(spec, q, k, lse):
  del spec
  return lse, (q, k)


def _backward_rule(spec, saved, d_lse):
  q, k = saved
  factor = (d_lse * spec.scale)[..., None]
  out, pullback = jax.vjp(lambda v: _fused(spec, q, k, v)[0], k)
  (dk,) = pullback((factor * q).astype(out.dtype))
  return (factor * out).astype(q.dtype), dk, jnp.zeros_like(d_lse)


_log_sum_exp.defvjp(_forward_rule, _backward_rule)
