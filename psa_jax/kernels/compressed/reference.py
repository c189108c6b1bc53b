"""The definition of compressed attention and its block scores, quadratic.

Block scores come from a matrix of shared cells here, counted interval by
interval, and not from the sums of equation 9.
"""

import jax
import jax.numpy as jnp

from psa_jax.kernels.block_sparse.reference import masked_attention
from psa_jax.kernels.compressed.ranking import rank


def compressed_attention(q, k, v, starts, *, spec):
  """See `api.compressed_attention`."""
  B, T, _, _ = q.shape
  t = jnp.broadcast_to(jnp.arange(T)[None], (B, T))
  mask = visible(t, starts, k.shape[1], spec)[:, None]
  mask = jnp.broadcast_to(mask, (B, k.shape[2], T, k.shape[1]))
  return masked_attention(q, k, v, mask, spec.scale)


def visible(t, starts, blocks, spec):
  """[B, T, C] bool: which compressed keys a query at position t sees."""
  first = jnp.arange(blocks).reshape(1, 1, -1) * spec.stride
  mask = first + spec.block - 1 <= t[..., None]
  return mask if starts is None else mask & (first >= starts[..., None])


def top_blocks(q, k, lse, positions, starts, ranges, *, blocks, spec):
  """See `api.top_blocks`."""
  B, T, N, H = q.shape
  C, K = k.shape[1:3]
  acc = lse.dtype
  q = q.reshape(B, T, K, N // K, H).astype(acc)
  s = jnp.einsum('btkgh,bckh->bktgc', q, k.astype(acc)) * spec.scale
  lse = jnp.moveaxis(lse.reshape(B, T, K, -1), 1, 2)[..., None]
  mask = visible(positions, starts, C, spec)[:, None, :, None]
  log_p = jnp.where(mask, jnp.where(mask, s - lse, 0), -jnp.inf)
  log_p = jax.nn.logsumexp(log_p, axis=-2)
  first = jnp.arange(C)[:, None] * spec.stride
  begin = jnp.arange(blocks)[None] * spec.select_block
  shared = jnp.minimum(first + spec.block, begin + spec.select_block)
  shared = jnp.maximum(shared - jnp.maximum(first, begin), 0) / spec.stride
  # One block at a time: all at once there would be T x C x blocks numbers.
  scores = jax.lax.map(
    lambda cells: jax.nn.logsumexp(log_p, axis=-1, b=cells.reshape(1, 1, 1, C)),
    shared.astype(acc).T,
  )
  scores = jnp.moveaxis(scores, 0, -1)
  return rank(scores, ranges, spec.width)
