"""Attention of the newest tokens over a FlashQ cache by block list.

Only listed blocks are restored, from packed codes to INT8, one block of every
head at a time; the scales join scores and values in f32.

Not done: INT8 queries and probabilities (the paper's integer products), and
Pallas kernels: XLA restores a block on its way to the product.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from psa_jax.kernels import softmax
from psa_jax.quant.flashq_cache import Cache, read, read_recent


class _Queries(NamedTuple):
  """Queries of each kv head, and where they are.

  Attributes:
    rows: [B, K, G * T, H], with the factor on the scores in them.
    position: [B, 1, G * T, 1].
  """

  rows: jax.Array
  position: jax.Array


def flashq_attention(
  q: Float[Array, 'B T N H'],
  cache: Cache,
  block_ids: Int[Array, 'B K M'],
  block_counts: Int[Array, 'B K'],
  *,
  scale: float | None = None,
) -> tuple[Float[Array, 'B T N Hv'], Float[Array, 'B T N']]:
  """Softmax attention of the last `T` tokens over the listed blocks.

  Blocks are restored as many times as the longest list has entries.

  Args:
    q: queries of the newest tokens; query `t` of row `b` is at position
      `lengths[b] - T + t`.
    cache: keys and values, those of the new tokens included.
    block_ids: blocks without duplicates among the first `block_counts`; the
      block of the newest tokens counts like the others.
    block_counts: how many entries to read; traced.
    scale: factor on the scores; None means H ** -0.5.

  Returns:
    The output in the dtype of `q` and the f32 log-sum-exp; 0 and -inf where a
    query reads nothing.
  """
  B, T, N, _ = q.shape
  K, M = block_ids.shape[1:]
  queries = _pack(q, K, cache.lengths, scale)
  current = (cache.lengths // cache.keys.block)[:, None]

  def step(c, run):
    ids = lax.dynamic_index_in_dim(block_ids, c, 2, keepdims=False)
    # The block that is not full yet lies in the buffer, which is read last.
    listed = (c < block_counts) & (ids >= 0) & (ids < current)
    keys, values = (
      jax.tree.map(lambda x: x[:, :, 0], read(store, ids[..., None]))
      for store in (cache.keys, cache.values)
    )
    return _add(run, queries, ids, listed, keys, values)

  width = cache.values.recent.shape[-1]
  run = softmax.start(queries.rows.shape[2], width, jnp.float32)
  run = jax.tree.map(lambda x: jnp.broadcast_to(x, (B, K, *x.shape)), run)
  longest = jnp.clip(block_counts.max(), 0, M)
  run = lax.fori_loop(0, longest, step, run)
  used = jnp.arange(M)[None, None] < block_counts[..., None]
  run = _add(
    run,
    queries,
    jnp.broadcast_to(current, (B, K)),
    ((block_ids == current[..., None]) & used).any(-1),
    read_recent(cache.keys),
    read_recent(cache.values),
  )
  out, lse = jax.vmap(jax.vmap(lambda run: softmax.finish(run, q.dtype)))(run)
  return _unpack(out, T), _unpack(lse, T)


def _add(run, queries, ids, listed, keys, values):
  """Reads one block of each kv head: `ids` and `listed` are [B, K]."""
  (k, k_scale), (v, v_scale) = keys, values
  k = k.astype(jnp.float32)
  s = softmax.dot('bkrh,bksh->bkrs', queries.rows, k, k.dtype)
  block = k.shape[2]
  at = ids[..., None] * block + jnp.arange(block)[None, None]
  mask = listed[..., None, None] & (at[:, :, None] <= queries.position)
  s = jnp.where(mask, s * k_scale[..., None, None], softmax.MASKED)
  # A block that is not listed may have a scale of NaN.
  v_scale = jnp.where(listed, v_scale, 0)[..., None, None]
  v = v.astype(jnp.float32) * v_scale
  return jax.vmap(jax.vmap(softmax.add))(run, s, v)


def _pack(q, K, lengths, scale) -> _Queries:
  B, T, N, H = q.shape
  rows = q.astype(jnp.float32) * (H**-0.5 if scale is None else scale)
  rows = jnp.moveaxis(rows.reshape(B, T, K, N // K, H), 1, 3)
  position = lengths[:, None] - T + jnp.arange(T)[None]
  position = jnp.tile(position, (1, N // K))[:, None, :, None]
  return _Queries(rows.reshape(B, K, -1, H), position)


def _unpack(x, T):
  """[B, K, G * T, *] -> [B, T, N, *]."""
  x = x.reshape(*x.shape[:2], -1, T, *x.shape[3:])
  x = jnp.moveaxis(x, 3, 1)
  return x.reshape(x.shape[0], T, -1, *x.shape[4:])
