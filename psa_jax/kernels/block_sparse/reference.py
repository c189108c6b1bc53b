"""The definition of block-list attention, in a few plain lines.

It expands the list to a [T, S] mask: memory is quadratic, so this is the
oracle for small shapes and for float64, not a path to train with.
"""

import jax
import jax.numpy as jnp

from psa_jax.kernels import softmax, unread


def block_sparse_attention(q, k, v, ids, counts, segments, cubic, *, spec):
  """See `api.block_sparse_attention`."""
  mask = read_mask(ids, counts, q.shape[1], k.shape[1], segments, spec)
  return masked_attention(q, k, v, mask, spec.scale, spec.softmax, cubic)


def masked_attention(q, k, v, mask, scale, kind=softmax.EXACT, cubic=None):
  """Softmax attention where `mask` [B, K, T, S] says who reads what.

  Returns the output [B, T, N, Hv] and the log-sum-exp [B, T, N]; a row with
  nothing to read gives 0 and -inf.
  """
  G = q.shape[2] // k.shape[2]
  # NaN where it is read, see `unread.py`; apart from the products, so that
  # the gradients' are spared it too.
  bad = ~(unread.finite(k) & unread.finite(v)).swapaxes(1, 2)
  bad = (mask & bad[:, :, None]).any(-1).repeat(G, 1).swapaxes(1, 2)
  some = mask.any(-1).repeat(G, 1).swapaxes(1, 2)
  bad = bad | (some & ~unread.finite(q))
  q, k, v = (unread.clean(x) for x in (q, k, v))
  acc = jnp.promote_types(q.dtype, jnp.float32)
  mask = jnp.repeat(mask, G, axis=1)
  k, values = (jnp.repeat(x, G, axis=2).astype(acc) for x in (k, v))
  s = jnp.einsum('btnh,bsnh->bnts', q.astype(acc), k) * scale
  s = jnp.where(mask, kind.scores(s, cubic), -jnp.inf)
  top = jax.lax.stop_gradient(jnp.max(s, axis=-1, keepdims=True))
  top = jnp.where(jnp.isfinite(top), top, 0)
  e = jnp.where(mask, kind.weights(jnp.where(mask, s, 0) - top), 0)
  total = e.sum(-1, keepdims=True)
  some = total > 0
  total = jnp.where(some, total, 1)
  out = jnp.einsum('bnts,bsnh->btnh', e / total, values).astype(v.dtype)
  lse = jnp.where(some, jnp.log(total) + top, -jnp.inf)
  lse = lse[..., 0].transpose(0, 2, 1)
  return unread.spoil(out, bad), jnp.where(bad, jnp.nan, lse)


def read_mask(ids, counts, T, S, segments, spec):
  """[B, K, T, S] bool: which query reads which key."""
  blocks = -(-S // spec.block_k)
  M = ids.shape[-1]
  used = jnp.arange(M)[None, None, None] < counts[..., None]
  every = jnp.arange(blocks).reshape(1, 1, 1, 1, -1)
  hit = (ids[..., None] == every) & used[..., None]
  mask = jnp.repeat(hit.any(-2), spec.block_q, axis=2)[:, :, :T]
  mask = jnp.repeat(mask, spec.block_k, axis=3)[..., :S]
  t = jnp.arange(T).reshape(1, 1, T, 1) + spec.q_offset
  s = jnp.arange(S).reshape(1, 1, 1, S)
  if spec.causal:
    mask = mask & (s <= t)
  if spec.window is not None:
    mask = mask & (s > t - spec.window)
  if segments is not None:
    q_seg, kv_seg = segments
    mask = mask & (q_seg[:, None, :, None] == kv_seg[:, None, None, :])
  return mask
