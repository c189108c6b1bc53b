"""Attention to compressed keys in plain XLA: FlashAttention's loops.

As `dense/xla.py`, with another rule of causality: compressed key m is seen
from position `m d + l - 1` on. Tiles that all queries see as a whole pay for
no mask, tiles that none sees are not visited, so memory is linear in T and
the work is that of the visible half. The backward pass recomputes the
probabilities, keys first.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from psa_jax.kernels import softmax, unread
from psa_jax.kernels.compressed.ranking import newest
from psa_jax.kernels.tiles import Tiles

# Rows of a score tile over all G heads, and keys of one; see `dense/xla.py`.
# Unlike there a tile may have few queries: they see almost the same keys.
ROWS, KEYS = 1024, 512


def compressed_attention(q, k, v, starts, *, spec):
  """See `api.compressed_attention`."""
  return _attention(spec, q, k, v, starts)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(spec, q, k, v, starts):
  return _forward(spec, q, k, v, starts)


def _tiles(q, k):
  G = q.shape[2] // k.shape[2]
  block_q = min(max(1, ROWS // G), q.shape[1])
  return Tiles.of(q, k, block_q, min(KEYS, k.shape[1]))


def _ranges(spec, tiles, tile, starts):
  """First key block that is seen, first that needs a mask, first unseen."""
  t = (tile % tiles.nq) * tiles.block_q
  whole = (
    jnp.maximum(newest(t, spec.block, spec.stride) + 1, 0) // tiles.block_k
  )
  last = newest(t + tiles.block_q - 1, spec.block, spec.stride)
  stop = jnp.clip(last // tiles.block_k + 1, 0, tiles.nk)
  if starts is None:
    return 0, jnp.minimum(whole, stop), stop
  # Documents begin in order: the tile's first query sees furthest back.
  b = tile // (tiles.nq * tiles.K)
  begin = starts[b * tiles.nq + tile % tiles.nq, 0] // spec.stride
  begin = jnp.minimum(begin // tiles.block_k, stop)
  return begin, begin, stop


def _mask(spec, tiles, tile, j, starts):
  """[rows, block_k] bool: which query of the tile sees which key."""
  m = j * tiles.block_k + jnp.arange(tiles.block_k)[None]
  t = tiles.q_positions(tile, 0)[:, None]
  mask = (m <= newest(t, spec.block, spec.stride)) & (m < tiles.S)
  if starts is not None:
    mask = mask & (m * spec.stride >= tiles.q_segments(starts, tile)[:, None])
  return mask


def _pack_starts(tiles, starts):
  """[B, T] -> [B * nq, block_q]; rows that are padding are in no document."""
  if starts is None:
    return None
  pad = tiles.nq * tiles.block_q - tiles.T
  starts = jnp.pad(starts, ((0, 0), (0, pad)), constant_values=2**30)
  return starts.reshape(-1, tiles.block_q)


def _forward(spec, q, k, v, starts):
  acc = jnp.promote_types(q.dtype, jnp.float32)
  tiles = _tiles(q, k)
  starts = _pack_starts(tiles, starts)
  qt, factor = softmax.prescale(tiles.pack_q(q), spec.scale, acc)
  kb, vb = tiles.pack_k(k), tiles.pack_k(v)

  def tile_out(tile):
    base = (tile // tiles.nq) * tiles.nk

    def step(masked, j, run):
      s = softmax.dot('rh,sh->rs', qt[tile], kb[base + j], acc) * factor
      if masked:
        s = jnp.where(_mask(spec, tiles, tile, j, starts), s, softmax.MASKED)
      return softmax.add(run, s, vb[base + j])

    run = softmax.start(tiles.rows, vb.shape[-1], acc)
    begin, plain, stop = _ranges(spec, tiles, tile, starts)
    run = lax.fori_loop(begin, plain, functools.partial(step, False), run)
    run = lax.fori_loop(plain, stop, functools.partial(step, True), run)
    return softmax.finish(run, v.dtype)

  out, lse = lax.map(tile_out, jnp.arange(qt.shape[0]))
  return tiles.unpack_q(out), tiles.unpack_q(lse)


def _forward_rule(spec, q, k, v, starts):
  out, lse = _forward(spec, q, k, v, starts)
  out = checkpoint_name(out, 'attn_out')
  lse = checkpoint_name(lse, 'attn_lse')
  return (out, lse), (q, k, v, starts, out, lse)


def _backward_rule(spec, saved, grads):
  q, k, v, starts, out, lse = saved
  d_out, d_lse = grads
  q, k = unread.clean(q), unread.clean(k)
  acc = lse.dtype
  tiles = _tiles(q, k)
  starts = _pack_starts(tiles, starts)
  qt, factor = softmax.prescale(tiles.pack_q(q), spec.scale, acc)
  dot_ = tiles.pack_q(d_out)
  kb, vb = tiles.pack_k(k), tiles.pack_k(v)
  rows = softmax.Backward.of(out, lse, d_out, d_lse)
  rows = jax.tree.map(tiles.pack_q, rows)

  def tile_grads(carry, tile):
    base = (tile // tiles.nq) * tiles.nk

    def step(masked, j, carry):
      dq, dk, dv = carry
      at = base + j
      s = softmax.dot('sh,rh->sr', kb[at], qt[tile], acc) * factor
      p = jnp.exp(s - rows.lse[tile][None])
      if masked:
        p = jnp.where(_mask(spec, tiles, tile, j, starts).T, p, 0)
      dp = softmax.dot('sh,rh->sr', vb[at], dot_[tile], acc)
      ds = (p * (dp - rows.delta[tile][None])).astype(q.dtype)
      dv = dv.at[at].add(
        softmax.dot('sr,rh->sh', p.astype(v.dtype), dot_[tile], acc)
      )
      dk = dk.at[at].add(softmax.dot('sr,rh->sh', ds, qt[tile], acc))
      return dq + softmax.dot('sr,sh->rh', ds, kb[at], acc), dk, dv

    dq = jnp.zeros((tiles.rows, q.shape[-1]), acc)
    begin, plain, stop = _ranges(spec, tiles, tile, starts)
    carry = dq, *carry
    carry = lax.fori_loop(begin, plain, functools.partial(step, False), carry)
    carry = lax.fori_loop(plain, stop, functools.partial(step, True), carry)
    dq, dk, dv = carry
    return (dk, dv), (dq * spec.scale).astype(q.dtype)

  init = jnp.zeros(kb.shape, acc), jnp.zeros(vb.shape, acc)
  (dk, dv), dq = lax.scan(tile_grads, init, jnp.arange(qt.shape[0]))
  # As in `block_sparse/xla.py`: the queries in dk may carry the scale already.
  dk = tiles.unpack_k((dk * factor).astype(k.dtype))
  return tiles.unpack_q(dq), dk, tiles.unpack_k(dv.astype(v.dtype)), None


_attention.defvjp(_forward_rule, _backward_rule)
