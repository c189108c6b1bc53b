"""Linear attention in plain XLA.

Causal: a scan over chunks of tokens. A query reads its own chunk by masked
products and everything before it through the state, the sum of k v^T. The
scan's body is rematerialised, so the backward pass keeps one state a chunk
(H * Hv / CHUNK numbers a token) and computes the products of a chunk again.

Bidirectional with documents: the causal sum and the same from the other end,
which leaves the token itself out. Subtracting other documents from a sum over
all of them would cancel digits.

The values carry a last channel of ones, whose sum is the denominator.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

CHUNK = 128


def linear_attention(q, k, v, segment_ids, *, spec):
  """See `api.linear_attention`."""
  B, T, N, H = q.shape
  K = k.shape[2]
  acc = jnp.promote_types(q.dtype, jnp.float32)
  q = q.astype(acc).reshape(B, T, K, N // K, H)
  k, x = k.astype(acc), v.astype(acc)
  x = jnp.concatenate([x, jnp.ones((*x.shape[:-1], 1), acc)], -1)
  if spec.causal:
    sums = _scan(q, k, x, segment_ids, diagonal=True)
  elif segment_ids is None:
    state = jnp.einsum('bskh,bskv->bkhv', k, x)
    sums = jnp.einsum('btkgh,bkhv->btkgv', q, state)
  else:
    ends = (jnp.flip(a, 1) for a in (q, k, x, segment_ids))
    sums = _scan(q, k, x, segment_ids, diagonal=True)
    sums = sums + jnp.flip(_scan(*ends, diagonal=False), 1)
  out = sums[..., :-1] / (sums[..., -1:] + spec.eps)
  return out.reshape(B, T, N, -1).astype(v.dtype)


def _scan(q, k, x, segment_ids, *, diagonal):
  """[B, T, K, G, V]: for each query the sum over keys before it, and itself.

  Args:
    q: [B, T, K, G, H].
    k: [B, T, K, H].
    x: [B, T, K, V].
    segment_ids: [B, T], or None.
    diagonal: whether a query reads the key at its own position.
  """
  B, T = q.shape[:2]
  size = min(CHUNK, T)
  if segment_ids is None:
    segment_ids = jnp.zeros((B, T), jnp.int32)

  def split(a):  # [B, T, *] -> [chunks, B, size, *]; padded keys are 0
    a = jnp.pad(a, [(0, 0), (0, -T % size)] + [(0, 0)] * (a.ndim - 2))
    return jnp.moveaxis(a.reshape(B, -1, size, *a.shape[2:]), 1, 0)

  chunks = tuple(map(split, (q, k, x, segment_ids)))
  state = jnp.zeros((B, *k.shape[2:], x.shape[-1]), x.dtype)
  body = jax.checkpoint(functools.partial(_chunk, diagonal), prevent_cse=False)
  _, sums = lax.scan(body, (state, segment_ids[:, 0]), chunks)
  return jnp.moveaxis(sums, 0, 1).reshape(B, -1, *sums.shape[3:])[:, :T]


def _chunk(diagonal, carry, chunk):
  """Reads one chunk; the state holds keys of the last token's segment."""
  state, held = carry
  q, k, x, segment = chunk
  size = q.shape[1]
  before = jnp.tril(jnp.ones((1, size, size), bool), 0 if diagonal else -1)
  mask = before & (segment[:, :, None] == segment[:, None, :])
  weight = jnp.einsum('btkgh,bskh->bkgts', q, k)
  weight = jnp.where(mask[:, None, None], weight, 0)
  near = jnp.einsum('bkgts,bskv->btkgv', weight, x)
  goes_on = (segment == held[:, None])[..., None, None]
  far = jnp.einsum('btkgh,bkhv->btkgv', q, state)
  last = segment[:, -1]
  kept = jnp.where((segment == last[:, None])[..., None, None], k, 0)
  # A chunk that ends in another document starts the state from zero.
  state = jnp.where((last == held).reshape(-1, 1, 1, 1), state, 0)
  state = state + jnp.einsum('bskh,bskv->bkhv', kept, x)
  return (state, last), near + jnp.where(goes_on[..., None], far, 0)
