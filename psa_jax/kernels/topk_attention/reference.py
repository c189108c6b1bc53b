"""The definition of top-k attention in a few plain lines, all at once."""

import jax.numpy as jnp

from psa_jax.kernels import topk, unread


def topk_attention(q, k, v, coeffs, rows, *, spec):
  """See `api.topk_attention`."""
  B, T, N, H = q.shape
  S, K = k.shape[1:3]
  acc = jnp.promote_types(q.dtype, jnp.float32)
  bad_q, bad_k, bad_v = (~unread.finite(x) for x in (q, k, v))
  q, k, v = (unread.clean(x) for x in (q, k, v))
  q = q.reshape(B, T, K, N // K, H).astype(acc) * spec.scale
  s = jnp.einsum('btkgh,bskh->btkgs', q, k.astype(acc))
  begin, end, counts = (x[:, :, None, None, None] for x in rows)
  pos = jnp.arange(S).reshape(1, 1, 1, 1, S)
  mask = (pos >= begin) & (pos < end)
  kept = topk.select(
    jnp.where(mask, s, -jnp.inf).astype(jnp.float32),
    jnp.broadcast_to(counts[..., 0], s.shape[:-1]),
    implementation='reference',
  )
  kept = kept & mask
  e = spec.kind.scores(jnp.where(kept, s, 0), coeffs)
  e = jnp.where(kept, e, -jnp.inf)
  top = jnp.max(e, -1, keepdims=True)
  top = jnp.where(jnp.isfinite(top), top, 0)
  p = jnp.where(kept, jnp.exp(jnp.where(kept, e, 0) - top), 0)
  total = p.sum(-1, keepdims=True)
  p = p / jnp.where(total > 0, total, 1)
  out = jnp.einsum('btkgs,bskh->btkgh', p, v.astype(acc))
  # Every key that is seen is read, but only the values that are kept.
  bad_k, bad_v = (x.swapaxes(1, 2)[:, None, :, None] for x in (bad_k, bad_v))
  bad = ((mask & bad_k) | (kept & bad_v)).any(-1).reshape(B, T, N)
  bad = bad | (bad_q & kept.any(-1).reshape(B, T, N))
  return unread.spoil(out.reshape(B, T, N, -1).astype(v.dtype), bad)
