"""Block-list attention in plain XLA: a loop over query tiles that gathers.

Each step of the outer loop takes one tile of queries (the G heads of a kv
head stacked as rows, so that they share the gathered keys), and walks its
list in chunks with a dynamic trip count: work is proportional to the counts
and nothing larger than one tile of scores exists. The softmax is the online
one of FlashAttention (Dao et al. 2022, Alg. 1); the backward pass recomputes
the probabilities from the log-sum-exp and adds into dk and dv block by block,
in list order, so it is deterministic. It holds its tiles keys first, [keys,
rows]: two of its three products with them are then plain ones.

One tile a step on purpose: on CPU, batching small products with vmap is an
order of magnitude slower than this loop, which keeps both cores in GEMM.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from psa_jax.kernels import softmax
from psa_jax.kernels.tiles import Tiles

# Keys gathered at a time. Large enough for an efficient product, small enough
# that a tile of scores stays in the second-level cache and that little of the
# last chunk of a list is wasted (experiments/LOG.md).
CHUNK_KEYS = 512


def block_sparse_attention(q, k, v, ids, counts, segments, *, spec):
  """See `api.block_sparse_attention`."""
  return _attention(spec, q, k, v, ids, counts, segments)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(spec, q, k, v, ids, counts, segments):
  return _forward(spec, q, k, v, ids, counts, segments)


class _Lists(NamedTuple):
  """What the tile loop reads besides q, k and v."""

  ids: jax.Array  # [B * K * nq, chunks, chunk]
  counts: jax.Array  # [B * K * nq]
  q_seg: jax.Array | None  # [B * nq, block_q]
  kv_seg: jax.Array | None  # [B * nk, block_k]


def _pack_lists(tiles, ids, counts, segments):
  chunk = max(1, min(CHUNK_KEYS // tiles.block_k, ids.shape[-1]))
  counts = jnp.clip(counts, 0, ids.shape[-1]).reshape(-1)
  pad = -ids.shape[-1] % chunk
  ids = jnp.pad(jnp.clip(ids, 0, tiles.nk - 1), [(0, 0)] * 3 + [(0, pad)])
  ids = ids.reshape(len(counts), -1, chunk)
  if segments is None:
    return _Lists(ids, counts, None, None)
  return _Lists(ids, counts, *tiles.pack_segments(*segments))


def _chunk_mask(spec, tiles, lists, tile, c):
  """[rows, chunk * block_k] bool: which query of the tile reads which key."""
  ids = lists.ids[tile, c]
  slot = c * ids.shape[0] + jnp.arange(ids.shape[0])
  pos = ids[:, None] * spec.block_k + jnp.arange(spec.block_k)[None]
  used = (slot < lists.counts[tile])[:, None] & (pos < tiles.S)
  # A key that must not be read gets a position after every query.
  far = jnp.iinfo(jnp.int32).max
  pos = jnp.where(used, pos, far).reshape(1, -1)
  t = tiles.q_positions(tile, spec.q_offset)[:, None]
  mask = pos <= t if spec.causal else pos < far
  if spec.window is not None:
    mask = mask & (pos > t - spec.window)
  if lists.q_seg is not None:
    b = tile // (tiles.nq * tiles.K)
    q_seg = tiles.q_segments(lists.q_seg, tile)
    kv_seg = lists.kv_seg[b * tiles.nk + ids].reshape(1, -1)
    mask = mask & (q_seg[:, None] == kv_seg)
  return mask


def _trips(lists, tile):
  chunk = lists.ids.shape[-1]
  return (lists.counts[tile] + chunk - 1) // chunk


def _forward(spec, q, k, v, ids, counts, segments):
  acc = jnp.promote_types(q.dtype, jnp.float32)
  tiles = Tiles.of(q, k, spec.block_q, spec.block_k)
  lists = _pack_lists(tiles, ids, counts, segments)
  qt, factor = softmax.prescale(tiles.pack_q(q), spec.scale, acc)
  kb, vb = tiles.pack_k(k), tiles.pack_k(v)

  def tile_out(tile):
    base = (tile // tiles.nq) * tiles.nk

    def step(c, run):
      at = base + lists.ids[tile, c]
      kc = kb[at].reshape(-1, kb.shape[-1])
      vc = vb[at].reshape(-1, vb.shape[-1])
      s = softmax.dot('rh,sh->rs', qt[tile], kc, acc) * factor
      s = jnp.where(_chunk_mask(spec, tiles, lists, tile, c), s, softmax.MASKED)
      return softmax.add(run, s, vc)

    run = softmax.start(tiles.rows, vb.shape[-1], acc)
    run = lax.fori_loop(0, _trips(lists, tile), step, run)
    return softmax.finish(run, v.dtype)

  out, lse = lax.map(tile_out, jnp.arange(qt.shape[0]))
  return tiles.unpack_q(out), tiles.unpack_q(lse)


def _forward_rule(spec, q, k, v, ids, counts, segments):
  out, lse = _forward(spec, q, k, v, ids, counts, segments)
  # Named so that a rematerialisation policy can keep them: then the backward
  # pass recomputes the projections but not the attention.
  out = checkpoint_name(out, 'attn_out')
  lse = checkpoint_name(lse, 'attn_lse')
  return (out, lse), (q, k, v, ids, counts, segments, out, lse)


def _backward_rule(spec, saved, grads):
  q, k, v, ids, counts, segments, out, lse = saved
  d_out, d_lse = grads
  acc = lse.dtype
  tiles = Tiles.of(q, k, spec.block_q, spec.block_k)
  lists = _pack_lists(tiles, ids, counts, segments)
  qt, factor = softmax.prescale(tiles.pack_q(q), spec.scale, acc)
  dot_ = tiles.pack_q(d_out)
  kb, vb = tiles.pack_k(k), tiles.pack_k(v)
  rows = softmax.Backward.of(out, lse, d_out, d_lse)
  rows = jax.tree.map(tiles.pack_q, rows)

  def tile_grads(carry, tile):
    base = (tile // tiles.nq) * tiles.nk
    dk, dv = carry

    def step(c, carry):
      dq, dk, dv = carry
      at = base + lists.ids[tile, c]
      kc = kb[at].reshape(-1, kb.shape[-1])
      vc = vb[at].reshape(-1, vb.shape[-1])
      s = softmax.dot('sh,rh->sr', kc, qt[tile], acc) * factor
      mask = _chunk_mask(spec, tiles, lists, tile, c).T
      p = jnp.where(mask, jnp.exp(s - rows.lse[tile][None]), 0)
      dp = softmax.dot('sh,rh->sr', vc, dot_[tile], acc)
      ds = (p * (dp - rows.delta[tile][None])).astype(q.dtype)
      dv_c = softmax.dot('sr,rh->sh', p.astype(v.dtype), dot_[tile], acc)
      dk_c = softmax.dot('sr,rh->sh', ds, qt[tile], acc)
      dq = dq + softmax.dot('sr,sh->rh', ds, kc, acc)
      dk = dk.at[at].add(dk_c.reshape(-1, *dk.shape[1:]))
      dv = dv.at[at].add(dv_c.reshape(-1, *dv.shape[1:]))
      return dq, dk, dv

    dq = jnp.zeros((qt.shape[1], qt.shape[2]), acc)
    trips = _trips(lists, tile)
    dq, dk, dv = lax.fori_loop(0, trips, step, (dq, dk, dv))
    return (dk, dv), (dq * spec.scale).astype(q.dtype)

  init = jnp.zeros(kb.shape, acc), jnp.zeros(vb.shape, acc)
  (dk, dv), dq = lax.scan(tile_grads, init, jnp.arange(qt.shape[0]))
  dq = tiles.unpack_q(dq)
  dk = tiles.unpack_k((dk * factor).astype(k.dtype))
  dv = tiles.unpack_k(dv.astype(v.dtype))
  return dq, dk, dv, None, None, None


_attention.defvjp(_forward_rule, _backward_rule)
