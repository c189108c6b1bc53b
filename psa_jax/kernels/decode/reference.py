"""The definition of decoding by block list, in a few plain lines."""

import jax.numpy as jnp

from psa_jax.kernels.block_sparse.reference import masked_attention


def decode_attention(q, k, v, ids, counts, lengths, starts, *, spec):
  """See `api.decode_attention`."""
  T, S = q.shape[1], k.shape[1]
  used = jnp.arange(ids.shape[-1])[None, None] < counts[..., None]
  every = jnp.arange(-(-S // spec.block_k))[None, None, None]
  listed = ((ids[..., None] == every) & used[..., None]).any(-2)
  listed = jnp.repeat(listed, spec.block_k, axis=-1)[:, :, None, :S]
  t = (lengths[:, None] - T + jnp.arange(T)[None])[:, None, :, None]
  s = jnp.arange(S)[None, None, None]
  mask = listed & (s <= t) & (s >= starts[:, None, None, None])
  if spec.window is not None:
    mask = mask & (s > t - spec.window)
  return masked_attention(q, k, v, mask, spec.scale)
