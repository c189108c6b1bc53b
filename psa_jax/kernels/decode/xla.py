"""Decoding by block list in plain XLA: sliced blocks and an online softmax.

One pass over the list of each kv head with a dynamic trip count; the T queries
of the G heads of a group are the rows of one small tile. Listed blocks are
sliced straight out of the cache [B, S, K, H]: a step that repacks or pads the
cache reads all of it, which is what the list is there to avoid. A few blocks
are joined for each product, since on CPU a product costs more to start than
one block's work (and a gather twice as much as these slices).
"""

import jax.numpy as jnp
from jax import lax

from psa_jax.kernels import softmax, unread

CHUNK_KEYS = 512  # keys read at a time, and
CHUNK_BLOCKS = 8  # most slices that they may come in
FEW_ROWS = 4  # products with so few vectors start faster one by one (CPU)


def decode_attention(q, k, v, ids, counts, lengths, starts, *, spec):
  """See `api.decode_attention`."""
  B, T, N, _ = q.shape
  S, K = k.shape[1:3]
  acc = jnp.promote_types(q.dtype, jnp.float32)
  counts = jnp.clip(counts, 0, ids.shape[-1]).reshape(-1)
  ids = _in_chunks(ids, spec.block_k, S)
  chunk = ids.shape[-1]
  width = min(spec.block_k, S)
  rows = _pack(q, K)

  def one_head(i):
    b, head = i // K, i % K
    t = jnp.tile(lengths[b] - T + jnp.arange(T), N // K)[:, None]

    def step(c, run):
      begin = ids[i, c] * spec.block_k
      # A partial last block is sliced where it still fits: the keys before it
      # belong to its neighbour.
      at = jnp.minimum(begin, S - width)
      pos = at[:, None] + jnp.arange(width)[None]
      listed = (c * chunk + jnp.arange(chunk) < counts[i])[:, None]
      listed = listed & (pos >= jnp.maximum(begin, starts[b])[:, None])
      pos = jnp.where(listed, pos, jnp.iinfo(jnp.int32).max).reshape(1, -1)
      mask = pos <= t
      if spec.window is not None:
        mask = mask & (pos > t - spec.window)
      s = _scores(rows[i], _read(k, b, at, head, width), acc)
      s = s * spec.scale

      def whole(run):
        return softmax.add(run, s, _read(v, b, at, head, width))

      def cut(run):
        # The rest of the room may hold anything, NaN too.
        values = _read(v, b, at, head, width)
        bad = ~unread.finite(values)
        masked = jnp.where(bad[None], jnp.nan, s)
        masked = jnp.where(mask, masked, softmax.MASKED)
        return softmax.add(run, masked, unread.clean(values))

      return lax.cond(mask.all(), whole, cut, run)

    run = softmax.start(rows.shape[1], v.shape[-1], acc)
    run = lax.fori_loop(0, (counts[i] + chunk - 1) // chunk, step, run)
    return softmax.finish(run, v.dtype)

  out, lse = lax.map(one_head, jnp.arange(B * K))
  return _unpack(out, B, T), _unpack(lse, B, T)


def _scores(rows, keys, acc):
  """[rows, H] times [keys, H] -> [rows, keys]."""
  if len(rows) > FEW_ROWS:
    return softmax.dot('rh,sh->rs', rows, keys, acc)
  return jnp.stack([softmax.dot('h,sh->s', row, keys, acc) for row in rows])


def _in_chunks(ids, block_k, S):
  """[B, K, M] -> [B * K, chunks, chunk], every entry a block of the cache."""
  most = min(CHUNK_BLOCKS, CHUNK_KEYS // block_k, ids.shape[-1])
  chunk = max(1, most)
  ids = jnp.clip(ids, 0, -(-S // block_k) - 1)
  ids = jnp.pad(ids, ((0, 0), (0, 0), (0, -ids.shape[-1] % chunk)))
  return ids.reshape(ids.shape[0] * ids.shape[1], -1, chunk)


def _read(cache, b, at, head, width):
  """[len(at) * width, H]: the keys from every position of `at` on."""
  sizes = (1, width, 1, cache.shape[-1])
  blocks = [
    lax.dynamic_slice(cache, (b, first, head, 0), sizes)[0, :, 0]
    for first in at
  ]
  return jnp.concatenate(blocks)


def _pack(q, K):
  """[B, T, N, H] -> [B * K, G * T, H]."""
  B, T, N, H = q.shape
  q = jnp.moveaxis(q.reshape(B, T, K, N // K, H), 1, 3)
  return q.reshape(B * K, -1, H)


def _unpack(x, B, T):
  """[B * K, G * T, *] -> [B, T, N, *]."""
  x = x.reshape(B, -1, T, *x.shape[2:])
  return jnp.moveaxis(x, 1, 2)
