"""The definition of dense attention: a [T, S] softmax, quadratic in memory."""

import jax.numpy as jnp

from psa_jax.kernels.block_sparse import reference as block_sparse


def dense_attention(q, k, v, segments, *, spec):
  """See `api.dense_attention`."""
  mask = jnp.ones((q.shape[0], k.shape[2], q.shape[1], k.shape[1]), bool)
  if spec.causal:
    t = jnp.arange(q.shape[1])[:, None] + spec.q_offset
    mask = mask & (jnp.arange(k.shape[1])[None] <= t)[None, None]
  if segments is not None:
    q_seg, kv_seg = segments
    mask = mask & (q_seg[:, None, :, None] == kv_seg[:, None, None, :])
  return block_sparse.masked_attention(q, k, v, mask, spec.scale)
