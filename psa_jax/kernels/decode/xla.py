"""Decoding by block list in plain XLA: gathered chunks and an online softmax.

One pass over the list of each kv head with a dynamic trip count, as in
`block_sparse/xla.py`; the T queries of the G heads of a group are the rows of
one small tile.
"""

import jax.numpy as jnp
from jax import lax

from psa_jax.kernels import softmax
from psa_jax.kernels.tiles import Tiles

CHUNK_KEYS = 512  # keys gathered at a time


def decode_attention(q, k, v, ids, counts, lengths, starts, *, spec):
  """See `api.decode_attention`."""
  acc = jnp.promote_types(q.dtype, jnp.float32)
  tiles = Tiles.of(q, k, q.shape[1], spec.block_k)
  chunk = max(1, min(CHUNK_KEYS // spec.block_k, ids.shape[-1]))
  pad = -ids.shape[-1] % chunk
  counts = jnp.clip(counts, 0, ids.shape[-1]).reshape(-1)
  ids = jnp.pad(jnp.clip(ids, 0, tiles.nk - 1), ((0, 0), (0, 0), (0, pad)))
  ids = ids.reshape(len(counts), -1, chunk)
  qt, kb, vb = tiles.pack_q(q), tiles.pack_k(k), tiles.pack_k(v)

  def one_head(i):
    b = i // tiles.K
    t = lengths[b] - tiles.T + jnp.arange(tiles.T)
    t = jnp.tile(t, tiles.G)[:, None]

    def step(c, run):
      listed = ids[i, c]
      at = i * tiles.nk + listed
      slot = c * chunk + jnp.arange(chunk)
      pos = listed[:, None] * spec.block_k + jnp.arange(spec.block_k)[None]
      used = (slot < counts[i])[:, None] & (pos >= starts[b])
      pos = jnp.where(used, pos, jnp.iinfo(jnp.int32).max).reshape(1, -1)
      mask = pos <= t
      if spec.window is not None:
        mask = mask & (pos > t - spec.window)
      kc = kb[at].reshape(-1, kb.shape[-1])
      s = softmax.dot('rh,sh->rs', qt[i], kc, acc) * spec.scale
      s = jnp.where(mask, s, softmax.MASKED)
      return softmax.add(run, s, vb[at].reshape(-1, vb.shape[-1]))

    run = softmax.start(tiles.rows, vb.shape[-1], acc)
    trips = (counts[i] + chunk - 1) // chunk
    run = lax.fori_loop(0, trips, step, run)
    return softmax.finish(run, v.dtype)

  out, lse = lax.map(one_head, jnp.arange(len(counts)))
  return tiles.unpack_q(out), tiles.unpack_q(lse)
