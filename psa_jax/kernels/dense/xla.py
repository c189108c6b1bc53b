"""Dense attention in plain XLA: FlashAttention's loops without a mask.

Tiles below the diagonal are visible as a whole and pay for no mask; only the
few on it do (all of them when segments are cut). See Dao et al. 2022 (Alg. 1)
for the online softmax and the recomputation in the backward pass. Everything
is a loop over tiles, so memory is linear in T and S. Heads that are one tile
have `short.py`.

The backward pass holds its tiles keys first, [keys, rows], and sums dq
transposed: then no product has to turn a large operand, which saves a quarter
of its time on CPU (experiments/LOG.md).
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from psa_jax.kernels import softmax, unread
from psa_jax.kernels.dense import short
from psa_jax.kernels.tiles import Tiles

# Rows of a score tile over all G heads, and keys of one that needs a mask.
# Where none does, `WIDE` blocks of keys make one product: on CPU a product of
# 64-wide heads is faster the more keys it has (experiments/LOG.md).
ROWS, KEYS, MIN_BLOCK_Q = 1024, 512, 128
WIDE = 4


def dense_attention(q, k, v, segments, *, spec):
  """See `api.dense_attention`."""
  return _attention(spec, q, k, v, segments)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(spec, q, k, v, segments):
  return _forward(spec, q, k, v, segments)


def _tiles(q, k):
  G = q.shape[2] // k.shape[2]
  block_q = min(max(MIN_BLOCK_Q, ROWS // G), q.shape[1])
  return Tiles.of(q, k, block_q, min(KEYS, k.shape[1]))


def _ranges(spec, tiles, tile, segments):
  """First key block that needs a mask, and first that is not visible."""
  first = spec.q_offset + (tile % tiles.nq) * tiles.block_q
  if spec.causal:
    plain = (first + 1) // tiles.block_k
    stop = (first + tiles.block_q - 1) // tiles.block_k + 1
  else:
    plain, stop = tiles.S // tiles.block_k, tiles.nk
  # A partial last block needs a mask for its padding.
  plain = jnp.minimum(plain, tiles.S // tiles.block_k)
  if segments is not None:
    plain = 0
  return plain, jnp.clip(stop, 0, tiles.nk)


def _walk(spec, tiles, tile, segments, wide, step, carry):
  """`step(masked, first block, blocks, carry)` over what the tile sees."""
  plain, stop = _ranges(spec, tiles, tile, segments)
  done = 0
  # Of a single such chunk the compiler would take the work out of the loop.
  if tiles.nk > wide:
    done = plain // wide * wide
    carry = lax.fori_loop(
      0, plain // wide, lambda i, c: step(False, i * wide, wide, c), carry
    )
  carry = lax.fori_loop(done, plain, lambda j, c: step(False, j, 1, c), carry)
  return lax.fori_loop(plain, stop, lambda j, c: step(True, j, 1, c), carry)


def _keys(blocks, first, count):
  """[count * block_k, *]: consecutive blocks of one head."""
  read = lax.dynamic_slice_in_dim(blocks, first, count)
  return read.reshape(-1, blocks.shape[-1])


def _add(blocks, first, count, values):
  """Adds `values` to what `_keys` reads."""
  values = values.reshape(count, *blocks.shape[1:])
  sums = lax.dynamic_slice_in_dim(blocks, first, count) + values
  return lax.dynamic_update_slice_in_dim(blocks, sums, first, 0)


def _mask(spec, tiles, tile, j, segments):
  """[rows, block_k] bool: which query of the tile reads which key."""
  pos = j * tiles.block_k + jnp.arange(tiles.block_k)[None]
  t = tiles.q_positions(tile, spec.q_offset)[:, None]
  mask = pos < tiles.S
  if spec.causal:
    mask = mask & (pos <= t)
  if segments is not None:
    q_seg, kv_seg = segments
    b = tile // (tiles.nq * tiles.K)
    q_seg = tiles.q_segments(q_seg, tile)[:, None]
    mask = mask & (q_seg == kv_seg[b * tiles.nk + j][None])
  return mask


def _forward(spec, q, k, v, segments):
  acc = jnp.promote_types(q.dtype, jnp.float32)
  tiles = _tiles(q, k)
  if tiles.nq * tiles.nk == 1 and short.fits(q, k):
    return short.forward(spec, q, k, v, segments)
  packed = None if segments is None else tiles.pack_segments(*segments)
  qt, factor = softmax.prescale(tiles.pack_q(q), spec.scale, acc)
  kb, vb = tiles.pack_k(k), tiles.pack_k(v)

  def tile_out(tile):
    base = (tile // tiles.nq) * tiles.nk

    def step(masked, j, count, run):
      keys = _keys(kb, base + j, count)
      s = softmax.dot('rh,sh->rs', qt[tile], keys, acc) * factor
      if masked:
        s = jnp.where(_mask(spec, tiles, tile, j, packed), s, softmax.MASKED)
      return softmax.add(run, s, _keys(vb, base + j, count))

    run = softmax.start(tiles.rows, vb.shape[-1], acc)
    run = _walk(spec, tiles, tile, segments, WIDE, step, run)
    return softmax.finish(run, v.dtype)

  out, lse = lax.map(tile_out, jnp.arange(qt.shape[0]))
  return tiles.unpack_q(out), tiles.unpack_q(lse)


def _forward_rule(spec, q, k, v, segments):
  out, lse = _forward(spec, q, k, v, segments)
  out = checkpoint_name(out, 'attn_out')
  lse = checkpoint_name(lse, 'attn_lse')
  return (out, lse), (q, k, v, segments, out, lse)


def _backward_rule(spec, saved, grads):
  q, k, v, segments, out, lse = saved
  d_out, d_lse = grads
  q, k = unread.clean(q), unread.clean(k)
  acc = lse.dtype
  tiles = _tiles(q, k)
  if tiles.nq * tiles.nk == 1 and short.fits(q, k):
    saved = q, k, v, segments, out, lse
    return *short.backward(spec, saved, grads), None
  packed = None if segments is None else tiles.pack_segments(*segments)
  qt, factor = softmax.prescale(tiles.pack_q(q), spec.scale, acc)
  dot_ = tiles.pack_q(d_out)
  kb, vb = tiles.pack_k(k), tiles.pack_k(v)
  turned = jnp.swapaxes(kb, 1, 2)
  rows = softmax.Backward.of(out, lse, d_out, d_lse)
  rows = jax.tree.map(tiles.pack_q, rows)

  def tile_grads(carry, tile):
    base = (tile // tiles.nq) * tiles.nk

    def step(masked, j, count, carry):
      dq, dk, dv = carry
      at = base + j
      keys, values = _keys(kb, at, count), _keys(vb, at, count)
      s = softmax.dot('sh,rh->sr', keys, qt[tile], acc) * factor
      p = jnp.exp(s - rows.lse[tile][None])
      if masked:
        p = jnp.where(_mask(spec, tiles, tile, j, packed).T, p, 0)
      dp = softmax.dot('sh,rh->sr', values, dot_[tile], acc)
      ds = (p * (dp - rows.delta[tile][None])).astype(q.dtype)
      dv_j = softmax.dot('sr,rh->sh', p.astype(v.dtype), dot_[tile], acc)
      dk_j = softmax.dot('sr,rh->sh', ds, qt[tile], acc)
      dk, dv = _add(dk, at, count, dk_j), _add(dv, at, count, dv_j)
      keys = lax.dynamic_slice_in_dim(turned, at, count)
      keys = jnp.swapaxes(keys, 0, 1).reshape(q.shape[-1], -1)
      return dq + softmax.dot('hs,sr->hr', keys, ds, acc), dk, dv

    dq = jnp.zeros((q.shape[-1], tiles.rows), acc)
    carry = dq, *carry
    dq, dk, dv = _walk(spec, tiles, tile, segments, WIDE, step, carry)
    return (dk, dv), (dq.T * spec.scale).astype(q.dtype)

  init = jnp.zeros(kb.shape, acc), jnp.zeros(vb.shape, acc)
  (dk, dv), dq = lax.scan(tile_grads, init, jnp.arange(qt.shape[0]))
  # As in `block_sparse/xla.py`: the queries in dk may carry the scale already.
  dk = tiles.unpack_k((dk * factor).astype(k.dtype))
  return tiles.unpack_q(dq), dk, tiles.unpack_k(dv.astype(v.dtype)), None


_attention.defvjp(_forward_rule, _backward_rule)
