"""Block-list attention in plain XLA, by key block: for lists of few queries.

A list of one token has G rows, too few to make a product of, and gathers every
key anew (`xla.py` with `block_q=1` is slower than dense attention). Here each
key block is walked with the tiles that list it (`lists.transpose`), a chunk of
them at a time: gather their queries, one product of [C * rows, H] with the
block, the step of the online softmax on their running results, which are
gathered and scattered back. Work and memory are those of the lists.

The backward pass goes the same way: gradients of the block's keys and values
have one owner and one order, that of the queries is added into row by row.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from psa_jax.kernels import softmax
from psa_jax.kernels.block_sparse import lists
from psa_jax.kernels.block_sparse.differentiable import differentiable
from psa_jax.kernels.tiles import Tiles

# Rows of queries (tiles times heads times block_q) that are gathered at a time.
# Measured in experiments/LOG.md: more leave the cache, fewer starve products.
ROWS = 2048
# `auto` goes by query tile where one has more rows than this.
MOST_ROWS = 8
# And where a block has fewer keys: each reader is moved for every block.
LEAST_KEYS = 16


def slower(where, q, k, *args, spec):
  """Whether another implementation is faster on this machine."""
  del args
  rows = q.shape[2] // k.shape[2] * spec.block_q
  return (
    where.platform != 'cpu' or rows > MOST_ROWS or spec.block_k < LEAST_KEYS
  )


class _Walk(NamedTuple):
  """Key blocks of all heads, with the tiles that read each.

  Attributes:
    spec: of the call.
    tiles: its sizes.
    offsets: [B * K, nk + 1], where a block's readers are in `readers`.
    readers: [B * K, E], tiles of the head, with room for a chunk behind.
    size: C, tiles of a chunk.
    q_seg: [B * nq, block_q] or None.
    kv_seg: [B * nk, block_k] or None.
  """

  spec: Any
  tiles: Tiles
  offsets: jax.Array
  readers: jax.Array
  size: int
  q_seg: jax.Array | None
  kv_seg: jax.Array | None

  @classmethod
  def of(cls, spec, tiles, ids, counts, segments):
    """The walk over the transposed lists."""
    heads = tiles.B * tiles.K
    counts = jnp.clip(counts, 0, ids.shape[-1])
    inverse = lists.transpose(ids, counts, tiles.nk)
    size = max(1, min(ROWS // tiles.rows, tiles.nq))
    readers = inverse.tiles.reshape(heads, -1)
    readers = jnp.pad(readers, ((0, 0), (0, size)))
    packed = None, None
    if segments is not None:
      packed = tiles.pack_segments(*segments)
    offsets = inverse.offsets.reshape(heads, -1)
    return cls(spec, tiles, offsets, readers, size, *packed)

  def over(self, block, step, carry):
    """`step(chunk, carry)` over the chunks of a block's readers."""
    head, j = block // self.tiles.nk, block % self.tiles.nk
    first, end = self.offsets[head, j], self.offsets[head, j + 1]

    def one(i, carry):
      at = first + i * self.size
      tile = lax.dynamic_slice(self.readers, (head, at), (1, self.size))[0]
      there = at + jnp.arange(self.size) < end
      flat = head * self.tiles.nq + tile
      # Readers ascend: the first one's first query sees the least.
      limit = self.tiles.S
      if self.spec.causal:
        query = self.spec.q_offset + tile[0] * self.tiles.block_q
        limit = jnp.minimum(limit, query + 1)
      whole = (j + 1) * self.tiles.block_k <= limit
      if self.q_seg is not None or self.spec.window is not None:
        whole = False
      mask = functools.partial(self._mask, block, flat)
      return step(_Chunk(flat, there, whole, mask), carry)

    trips = (end - first + self.size - 1) // self.size
    return lax.fori_loop(0, trips, one, carry)

  def _mask(self, block, flat):
    """[C * rows, block_k] bool: which query reads which key of the block."""
    tiles, spec = self.tiles, self.spec
    j = block % tiles.nk
    position = (j * tiles.block_k + jnp.arange(tiles.block_k))[None, None]
    query = jax.vmap(lambda x: tiles.q_positions(x, spec.q_offset))(flat)
    query = query[..., None]
    mask = jnp.broadcast_to(
      position < tiles.S, (*query.shape[:2], tiles.block_k)
    )
    mask = mask & (position <= query) if spec.causal else mask
    if spec.window is not None:
      mask = mask & (position > query - spec.window)
    if self.q_seg is not None and self.kv_seg is not None:
      b = block // (tiles.nk * tiles.K)
      q_seg = jax.vmap(lambda x: tiles.q_segments(self.q_seg, x))(flat)
      kv_seg = self.kv_seg[b * tiles.nk + j]
      mask = mask & (q_seg[..., None] == kv_seg[None, None])
    return mask.reshape(-1, tiles.block_k)


class _Chunk(NamedTuple):
  """Tiles that read a block.

  Attributes:
    tile: [C] flat numbers of tiles.
    there: [C] which of them really do; the others may be any.
    whole: whether every query of them reads every key of the block.
    mask: makes [C * rows, block_k] bool, which query reads which key.
  """

  tile: jax.Array
  there: jax.Array
  whole: jax.Array | bool
  mask: Callable[[], jax.Array]

  def keep(self, x, fill, turned=False):
    """`x` [C * rows, block_k], with `fill` where nothing is read."""

    def cut(x):
      mask = self.mask()
      return jnp.where(mask.T if turned else mask, x, fill)

    # Only the scores go through the branch: it copies what it is handed.
    return lax.cond(self.whole, lambda x: x, cut, x)

  def take(self, x):
    """Rows of x [tiles, rows, *] as [C * rows, *]; 0 where none is there."""
    # Zeros for queries and gradients make whatever follows of them zero.
    return jax.tree.map(
      lambda x: (
        x.at[self._at(x)]
        .get(mode='fill', fill_value=0)
        .reshape(-1, *x.shape[2:])
      ),
      x,
    )

  def _at(self, x):
    return jnp.where(self.there, self.tile, x.shape[0])

  def put(self, x, new):
    """`x` [tiles, rows, *] with the rows that are there replaced."""
    new = new.reshape(-1, *x.shape[1:])
    return x.at[self._at(x)].set(new, mode='drop', unique_indices=True)

  def add(self, x, more):
    """`x` [tiles, rows, *] with `more` added to the rows that are there."""
    more = more.reshape(-1, *x.shape[1:])
    return x.at[self._at(x)].add(more, mode='drop', unique_indices=True)


def _forward(spec, packed, ids, counts, segments, cubic):
  """Output, log-sum-exp, and the row maximum where the softmax needs it."""
  tiles, qt, factor, kb, vb, acc = packed
  walk = _Walk.of(spec, tiles, ids, counts, segments)
  kind, (count, rows, _) = spec.softmax, qt.shape

  def scores(block, chunk):
    s = softmax.dot('rh,sh->rs', chunk.take(qt), kb[block], acc) * factor
    return chunk.keep(kind.scores(s, cubic), softmax.MASKED)

  def highest(tops, block):
    def step(chunk, tops):
      top = jnp.maximum(chunk.take(tops), scores(block, chunk).max(-1))
      return chunk.put(tops, top)

    return walk.over(block, step, tops), None

  def read(runs, block):
    def step(chunk, runs):
      s, run = scores(block, chunk), chunk.take(runs)
      if kind.needs_top:
        run = softmax.add_below(run, s, vb[block], kind)
      else:
        run = softmax.add(run, s, vb[block])
      return jax.tree.map(chunk.put, runs, run)

    return walk.over(block, step, runs), None

  start = softmax.start(count * rows, vb.shape[-1], acc)
  runs = jax.tree.map(lambda x: x.reshape(count, rows, *x.shape[1:]), start)
  blocks = jnp.arange(kb.shape[0])
  if kind.needs_top:
    runs = runs._replace(top=lax.scan(highest, runs.top, blocks)[0])
  runs, _ = lax.scan(read, runs, blocks)
  flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), runs)
  out, lse = (
    x.reshape(count, rows, *x.shape[1:]) for x in softmax.finish(flat, vb.dtype)
  )
  return out, lse, runs.top if kind.needs_top else None


def _backward(spec, packed, d_out, rows, ids, counts, segments, cubic):
  """Gradients of the packed queries, keys and values, and of the cubic."""
  tiles, qt, factor, kb, vb, acc = packed
  walk = _Walk.of(spec, tiles, ids, counts, segments)
  kind = spec.softmax

  def block_grads(carry, block):
    keys, values = kb[block], vb[block]

    def step(chunk, carry):
      dq, dk, dv, d_cubic = carry
      queries, d, row = chunk.take((qt, d_out, rows))
      raw = softmax.dot('sh,rh->sr', keys, queries, acc) * factor
      p, slope = row.probabilities(kind.scores(raw, cubic), kind)
      same = slope is p
      p = chunk.keep(p, 0, turned=True)
      slope = p if same else chunk.keep(slope, 0, turned=True)
      dp = softmax.dot('sh,rh->sr', values, d, acc)
      ds = slope * (dp - row.delta[None])
      if cubic is not None:
        ds, more = softmax.through_polynomial(ds, raw, cubic, kind)
        d_cubic = d_cubic + more
      ds = ds.astype(qt.dtype)
      dv = dv + softmax.dot('sr,rh->sh', p.astype(vb.dtype), d, acc)
      dk = dk + softmax.dot('sr,rh->sh', ds, queries, acc)
      dq = chunk.add(dq, softmax.dot('sr,sh->rh', ds, keys, acc))
      return dq, dk, dv, d_cubic

    dq, d_cubic = carry
    own = jnp.zeros(keys.shape, acc), jnp.zeros(values.shape, acc)
    dq, *own, d_cubic = walk.over(block, step, (dq, *own, d_cubic))
    return (dq, d_cubic), tuple(own)

  init = jnp.zeros(qt.shape, acc), None
  if cubic is not None:
    init = init[0], jnp.zeros_like(cubic, acc)
  (dq, d_cubic), (dk, dv) = lax.scan(block_grads, init, jnp.arange(len(kb)))
  return (dq * spec.scale).astype(qt.dtype), dk, dv, d_cubic


block_sparse_attention = differentiable(_forward, _backward)
