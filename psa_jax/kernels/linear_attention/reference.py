"""The definition of linear attention in a few lines, with quadratic memory."""

import jax.numpy as jnp


def linear_attention(q, k, v, segment_ids, *, spec):
  """See `api.linear_attention`."""
  B, T, N, H = q.shape
  K = k.shape[2]
  acc = jnp.promote_types(q.dtype, jnp.float32)
  q, k, x = (a.astype(acc) for a in (q, k, v))
  weight = jnp.einsum('btkgh,bskh->bkgts', q.reshape(B, T, K, N // K, H), k)
  mask = jnp.ones((1, T, T), bool)
  if spec.causal:
    mask = jnp.tril(mask)
  if segment_ids is not None:
    mask = mask & (segment_ids[:, :, None] == segment_ids[:, None, :])
  weight = jnp.where(mask[:, None, None], weight, 0)
  out = jnp.einsum('bkgts,bskv->btkgv', weight, x)
  total = jnp.moveaxis(weight.sum(-1), 3, 1)[..., None]
  return (out / (total + spec.eps)).reshape(B, T, N, -1).astype(v.dtype)
