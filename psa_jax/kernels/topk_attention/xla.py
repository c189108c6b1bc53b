"""Top-k attention in plain XLA: whole rows of scores, a few at a time.

A tile of queries (the G heads of a kv head stacked as rows) is scored against
all keys that any of them may see, its rows are cut by the top-k engine, and
what survives is weighed. Nothing larger than one tile of scores exists.

The forward pass keeps two numbers a row beside the log-sum-exp: the smallest
score that survived, and where the last such key lies. The backward pass makes
the scores again and compares with them, which costs one pass and not a second
selection. The key at that position is kept by its place, so that a score which
comes out one bit smaller (a fusion of another kind) does not lose it.

A causal call is cut into parts along T, and the first part's tiles are as wide
as the first part only: of four parts 5/8 of the square is scored.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from psa_jax.kernels import softmax, topk, unread
from psa_jax.kernels.tiles import Tiles

TILE_SCORES = 2**20  # scores of a tile; with fewer than
MIN_ROWS = 64  # rows the products are too thin
PARTS = 4  # of a causal call


class _Rows(NamedTuple):
  """What a row of a tile knows of itself; packed: [tiles, rows]."""

  begin: jax.Array
  end: jax.Array
  counts: jax.Array


class _Bad(NamedTuple):
  """Which keys and values are not finite; packed: [B * K, S]."""

  k: jax.Array
  v: jax.Array

  @classmethod
  def of(cls, tiles, k, v):
    """Of [B, S, K, *]."""
    return cls(
      *(tiles.pack_k(~unread.finite(x)[..., None])[..., 0] for x in (k, v))
    )


class _Cut(NamedTuple):
  """What the backward pass knows of a row's choice, [B, T, N].

  Attributes:
    score: the smallest that was kept; +inf where none was.
    last: position of the last kept key with that score; -1 where none was.
  """

  score: jax.Array
  last: jax.Array


def topk_attention(q, k, v, coeffs, rows, *, spec):
  """See `api.topk_attention`."""
  return _attention(spec, q, k, v, coeffs, rows)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(spec, q, k, v, coeffs, rows):
  return _forward(spec, q, k, v, coeffs, rows)[0]


def _parts(spec, q, k):
  """(first query, one past the last, tiling) of every part."""
  T, N = q.shape[1:3]
  S, K = k.shape[1:3]
  G = N // K
  block_q = max(1, max(MIN_ROWS, TILE_SCORES // S) // G)
  size = -(-T // PARTS) if spec.causal else T
  size = -(-size // block_q) * block_q
  parts = []
  for first in range(0, T, size):
    stop = min(first + size, T)
    keys = stop if spec.causal else S
    parts.append(
      (
        first,
        stop,
        Tiles.of(q[:, first:stop], k[:, :keys], min(block_q, T), keys),
      )
    )
  return parts


def _pack_rows(tiles, rows, first, stop):
  heads = tiles.K * tiles.G

  def pack(x):
    x = x[:, first:stop, None]
    return tiles.pack_q(jnp.broadcast_to(x, (*x.shape[:2], heads)))

  return _Rows(*map(pack, rows))


def _visible(row, keys):
  """[rows, keys] bool."""
  pos = jnp.arange(keys)[None]
  return (pos >= row.begin[:, None]) & (pos < row.end[:, None])


def _forward(spec, q, k, v, coeffs, rows):
  """The output, the log-sum-exp of e, and the cut of every row."""
  acc = jnp.promote_types(q.dtype, jnp.float32)
  outputs = []
  for first, stop, tiles in _parts(spec, q, k):
    packed = _pack_rows(tiles, rows, first, stop)
    qt, factor = softmax.prescale(
      tiles.pack_q(q[:, first:stop]), spec.scale, acc
    )
    keys, values = k[:, : tiles.S], v[:, : tiles.S]
    bad = _Bad.of(tiles, keys, values)
    kb = tiles.pack_k(unread.clean(keys))
    vb = tiles.pack_k(unread.clean(values))

    def tile_out(
      i, tiles=tiles, packed=packed, qt=qt, kb=kb, vb=vb, bad=bad, f=factor
    ):
      row = jax.tree.map(lambda x: x[i], packed)
      head = i // tiles.nq
      s = softmax.dot('rh,sh->rs', qt[i], kb[head], acc) * f
      bad = _Bad(bad.k[head], bad.v[head])
      return _weigh(spec, s, vb[head], coeffs, row, bad)

    part = lax.map(tile_out, jnp.arange(qt.shape[0]))
    outputs.append(jax.tree.map(tiles.unpack_q, part))
  return jax.tree.map(lambda *parts: jnp.concatenate(parts, 1), *outputs)


def _weigh(spec, s, values, coeffs, row, bad):
  """Output, lse and cut of a tile's rows, from their scores.

  A key that is not finite has the largest score, so it is kept where it is
  seen, and the row is NaN. A value is read only where it is kept.
  """
  mask = _visible(row, s.shape[1])
  s = jnp.where(mask, jnp.where(bad.k[None], jnp.nan, s), -jnp.inf)
  kept = mask & topk.select(
    s.astype(jnp.float32),
    row.counts,
    max_k=min(spec.max_count, s.shape[1]),
  )
  score = jnp.where(kept, s, jnp.inf).min(-1)
  pos = jnp.arange(s.shape[1])[None]
  last = jnp.where(kept & (s == score[:, None]), pos, -1).max(-1)
  # Not of -inf: a cubic of it is NaN, and so is its gradient.
  e = spec.kind.scores(jnp.where(kept, s, 0), coeffs)
  e = jnp.where(bad.v[None], jnp.nan, e)
  e = jnp.where(kept, e, softmax.MASKED)
  run = softmax.start(len(s), values.shape[-1], s.dtype)
  out, lse = softmax.finish(softmax.add(run, e, values), values.dtype)
  return out, lse, _Cut(score, last)


def _forward_rule(spec, q, k, v, coeffs, rows):
  out, lse, cut = _forward(spec, q, k, v, coeffs, rows)
  # Named for the policy of rematerialisation, see `block_sparse/xla.py`; the
  # cut is to this mechanism what the block list is to others.
  out = checkpoint_name(out, 'attn_out')
  lse = checkpoint_name(lse, 'attn_lse')
  cut = _Cut(*(checkpoint_name(x, 'attn_ids') for x in cut))
  return out, (q, k, v, coeffs, rows, out, lse, cut)


def _backward_rule(spec, saved, d_out):
  q, k, v, coeffs, rows, out, lse, cut = saved
  q, k, v = (unread.clean(x) for x in (q, k, v))
  acc = lse.dtype
  known = softmax.Backward.of(out, lse, d_out, jnp.zeros((), acc))
  dk, dv = jnp.zeros(k.shape, acc), jnp.zeros(v.shape, acc)
  d_coeffs, dq = jnp.zeros(4, acc), []
  for first, stop, tiles in _parts(spec, q, k):
    at = slice(first, stop)
    part = jax.tree.map(
      lambda x, at=at, tiles=tiles: tiles.pack_q(x[:, at]),
      (q, d_out, known, cut),
    )
    keys, values = k[:, : tiles.S], v[:, : tiles.S]
    packed = _pack_rows(tiles, rows, first, stop)
    got = _part_grads(spec, tiles, *part, packed, keys, values, coeffs, acc)
    dq.append(tiles.unpack_q(got[0]))
    dk = dk.at[:, : tiles.S].add(tiles.unpack_k(got[1]))
    dv = dv.at[:, : tiles.S].add(tiles.unpack_k(got[2]))
    d_coeffs += got[3]
  return (
    jnp.concatenate(dq, 1),
    dk.astype(k.dtype),
    dv.astype(v.dtype),
    d_coeffs.astype(coeffs.dtype),
    None,
  )


def _part_grads(
  spec, tiles, q, d_out, known, cut, packed, keys, values, coeffs, acc
):
  """Gradients of a part's queries, and what it adds to the others."""
  qt, factor = softmax.prescale(q, spec.scale, acc)
  kb, vb = tiles.pack_k(keys), tiles.pack_k(values)
  pos = jnp.arange(tiles.S)[None]

  def tile_grads(carry, i):
    dk, dv, d_coeffs = carry
    head = i // tiles.nq
    row, mine, top = jax.tree.map(lambda x: x[i], (packed, cut, known))
    s = softmax.dot('rh,sh->rs', qt[i], kb[head], acc) * factor
    score, last = mine.score[:, None], mine.last[:, None]
    kept = (s > score) | (pos == last) | ((s == score) & (pos < last))
    kept = kept & _visible(row, tiles.S)
    s = jnp.where(kept, s, 0)
    e = spec.kind.scores(s, coeffs)
    p = jnp.where(kept, jnp.exp(e - top.lse[:, None]), 0)
    dp = softmax.dot('rh,sh->rs', d_out[i], vb[head], acc)
    d_e = p * (dp - top.delta[:, None])
    ds, more = softmax.through_polynomial(d_e, s, coeffs, spec.kind)
    d_coeffs, ds = d_coeffs + more, ds.astype(q.dtype)
    weights = p.astype(values.dtype)
    dv = dv.at[head].add(softmax.dot('rs,rh->sh', weights, d_out[i], acc))
    dk = dk.at[head].add(softmax.dot('rs,rh->sh', ds, qt[i], acc) * factor)
    dq = softmax.dot('rs,sh->rh', ds, kb[head], acc) * spec.scale
    return (dk, dv, d_coeffs), dq.astype(q.dtype)

  init = jnp.zeros(kb.shape, acc), jnp.zeros(vb.shape, acc), jnp.zeros(4, acc)
  carry, dq = lax.scan(tile_grads, init, jnp.arange(qt.shape[0]))
  return dq, *carry


_attention.defvjp(_forward_rule, _backward_rule)
