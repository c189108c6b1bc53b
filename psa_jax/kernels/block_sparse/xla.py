"""Block-list attention in plain XLA: a loop over query tiles that gathers.

Each step of the outer loop takes one tile of queries (the G heads of a kv
head stacked as rows, so that they share the gathered keys), and walks its
list in chunks with a dynamic trip count: work is proportional to the counts
and nothing larger than one tile of scores exists. The softmax is the online
one of FlashAttention (Dao et al. 2022, Alg. 1); the backward pass recomputes
the probabilities from the log-sum-exp and adds into dk and dv block by block,
in list order, so it is deterministic. It holds its tiles keys first, [keys,
rows], and sums dq transposed: then no product has to turn a large operand.

One tile a step on purpose: on CPU, batching small products with vmap is an
order of magnitude slower than this loop, which keeps both cores in GEMM. A GPU
wants the opposite, for every step is some launches there: it takes many tiles a
step (`_together`), as far as the longest of their lists goes. Then dk and dv
are added to by many tiles at once, in no fixed order.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from psa_jax.kernels import platform, softmax
from psa_jax.kernels.block_sparse.differentiable import differentiable

# Keys gathered at a time. Products are faster the larger they are, so a list
# is read in chunks of the first size while it fills three quarters of one, then
# of the next; the small ones at its end waste little. A tile of scores has at
# most `SCORES` entries. Measured in experiments/LOG.md.
CHUNKS, SCORES = (3072, 1536, 128), 2**21
SCORES_ON_GPU = 2**25  # of all tiles that are taken together


class _Lists(NamedTuple):
  """What the tile loop reads besides q, k and v."""

  ids: jax.Array  # [B * K * nq, M and the largest chunk]
  counts: jax.Array  # [B * K * nq]
  q_seg: jax.Array | None  # [B * nq, block_q]
  kv_seg: jax.Array | None  # [B * nk, block_k]


def _chunk_sizes(tiles, width):
  """Blocks of a chunk, falling; none is much larger than a list can be."""
  small = max(1, min(CHUNKS[-1] // tiles.block_k, width))
  whole = -(-width // small) * small
  sizes = []
  for keys in CHUNKS:
    keys = min(keys, SCORES // tiles.rows)
    size = min(max(keys // tiles.block_k // small, 1) * small, whole)
    if not sizes or size <= sizes[-1] // 2 or size == small < sizes[-1]:
      sizes.append(size)
  return sizes


def _pack_lists(tiles, ids, counts, segments):
  counts = jnp.clip(counts, 0, ids.shape[-1]).reshape(-1)
  # Room for a chunk that the end of a list does not fill.
  pad = _chunk_sizes(tiles, ids.shape[-1])[0]
  # Entries past the count may hold anything: clipped, they name some block,
  # which the mask drops.
  ids = jnp.pad(jnp.clip(ids, 0, tiles.nk - 1), [(0, 0)] * 3 + [(0, pad)])
  ids = ids.reshape(len(counts), -1)
  if segments is None:
    return _Lists(ids, counts, None, None)
  return _Lists(ids, counts, *tiles.pack_segments(*segments))


def _walk(spec, tiles, lists, sizes, tile, step, carry):
  """`step(ids, mask, carry)` over the chunks of a tile's list.

  `mask` is [rows, keys] bool, which query reads which key, or None in the
  branch for chunks that every query of the tile reads whole.
  """

  def visit(first, blocks, carry):
    ids = lax.dynamic_slice_in_dim(lists.ids[tile], first, blocks)

    def masked(carry):
      used = first + jnp.arange(blocks) < lists.counts[tile]
      return step(ids, _mask(spec, tiles, lists, tile, ids, used), carry)

    if lists.q_seg is not None or spec.window is not None:
      return masked(carry)
    # The first position that some query of the tile does not read.
    end = tiles.S
    if spec.causal:
      begin = spec.q_offset + (tile % tiles.nq) * tiles.block_q
      end = jnp.minimum(end, begin + 1)
    whole = (ids.max() + 1) * spec.block_k <= end
    whole = whole & (first + blocks <= lists.counts[tile])
    return lax.cond(whole, lambda c: step(ids, None, c), masked, carry)

  done = jnp.int32(0)
  for size in sizes:
    # The last size reads the rest of the list; a larger one stops where less
    # than three quarters of a chunk are left.
    spare = size - 1 if size == sizes[-1] else size // 4
    trips = jnp.maximum(lists.counts[tile] - done + spare, 0) // size

    def one(i, carry, done=done, size=size):
      return visit(done + i * size, size, carry)

    carry = lax.fori_loop(0, trips, one, carry)
    done = done + trips * size
  return carry


class _Together(NamedTuple):
  """Tiles that are taken together, in groups of equal size.

  Attributes:
    tile: [groups, n] numbers of tiles; those past the last one are not there.
    size: blocks of a chunk.
    count: tiles that there are.
  """

  tile: jax.Array
  size: int
  count: int

  @classmethod
  def of(cls, tiles, sizes, count):
    """The groups on a GPU; None where tiles are taken one by one."""
    if platform.current().platform != 'gpu':
      return None
    scores = tiles.rows * sizes[0] * tiles.block_k
    n = max(1, min(SCORES_ON_GPU // scores, count))
    tile = jnp.arange(-(-count // n) * n).reshape(-1, n)
    return cls(tile, sizes[0], count)

  def trips(self, lists, tile):
    """Chunks of the longest list of a group."""
    counts = jnp.where(tile < self.count, lists.counts[tile], 0)
    return -(-counts.max() // self.size)

  def chunk(self, spec, tiles, lists, tile, i):
    """Ids and mask of the i-th chunk of a tile's list."""
    at = i * self.size + jnp.arange(self.size)
    used = (at < lists.counts[tile]) & (tile < self.count)
    ids = lax.dynamic_slice_in_dim(lists.ids[tile], i * self.size, self.size)
    return ids, _mask(spec, tiles, lists, tile, ids, used)

  def walk(self, spec, tiles, lists, trips, tile, step, carry):
    """`_walk` of a tile among others, so for a given number of chunks."""

    def one(i, carry):
      return step(*self.chunk(spec, tiles, lists, tile, i), carry)

    return lax.fori_loop(0, trips, one, carry)

  def join(self, parts):
    """[groups, n, *] -> [tiles, *]."""
    return jax.tree.map(
      lambda x: x.reshape(-1, *x.shape[2:])[: self.count], parts
    )


def _mask(spec, tiles, lists, tile, ids, used):
  """[rows, keys] bool: which query of the tile reads which key of a chunk."""
  pos = ids[:, None] * spec.block_k + jnp.arange(spec.block_k)[None]
  # A key that must not be read gets a position after every query.
  far = jnp.iinfo(jnp.int32).max
  pos = jnp.where(used[:, None] & (pos < tiles.S), pos, far).reshape(1, -1)
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


def _forward(spec, packed, ids, counts, segments, cubic):
  """Output, log-sum-exp, and the row maximum where the softmax needs it."""
  tiles, qt, factor, kb, vb, acc = packed
  lists = _pack_lists(tiles, ids, counts, segments)
  sizes = _chunk_sizes(tiles, ids.shape[-1])
  kind = spec.softmax

  def tile_out(walk, tile):
    base = (tile // tiles.nq) * tiles.nk
    walk = functools.partial(walk, tile)

    def scores(ids, mask):
      keys = _read(kb, base + ids)
      s = softmax.dot('rh,sh->rs', qt[tile], keys, acc) * factor
      s = kind.scores(s, cubic)
      return s if mask is None else jnp.where(mask, s, softmax.MASKED)

    def highest(ids, mask, top):
      return jnp.maximum(top, scores(ids, mask).max(-1))

    def read(ids, mask, run):
      s, values = scores(ids, mask), _read(vb, base + ids)
      if kind.needs_top:
        return softmax.add_below(run, s, values, kind)
      return softmax.add(run, s, values)

    run = softmax.start(tiles.rows, vb.shape[-1], acc)
    if kind.needs_top:
      run = run._replace(top=walk(highest, run.top))
    run = walk(read, run)
    return *softmax.finish(run, vb.dtype), run.top if kind.needs_top else None

  count = qt.shape[0]
  together = _Together.of(tiles, sizes, count)
  if together is None:
    walk = functools.partial(_walk, spec, tiles, lists, sizes)
    return lax.map(functools.partial(tile_out, walk), jnp.arange(count))

  def group(tile):
    trips = together.trips(lists, tile)
    walk = functools.partial(together.walk, spec, tiles, lists, trips)
    return jax.vmap(functools.partial(tile_out, walk))(tile)

  return together.join(lax.map(group, together.tile))


def _read(blocks, at):
  """[keys, *]: the keys of the blocks `at`, one after the other."""
  return blocks[at].reshape(-1, blocks.shape[-1])


def _backward(spec, packed, d_out, rows, ids, counts, segments, cubic):
  """Gradients of the packed queries, keys and values, and of the cubic."""
  tiles, qt, factor, kb, vb, acc = packed
  lists = _pack_lists(tiles, ids, counts, segments)
  sizes = _chunk_sizes(tiles, ids.shape[-1])
  turned = jnp.swapaxes(kb, 1, 2)
  kind = spec.softmax

  def piece(tile, ids, mask):
    """What a chunk of a tile's list adds: to dq, to blocks of dk and dv."""
    at = (tile // tiles.nq) * tiles.nk + ids
    row = jax.tree.map(lambda x: x[tile], rows)
    keys, values = _read(kb, at), _read(vb, at)
    raw = softmax.dot('sh,rh->sr', keys, qt[tile], acc) * factor
    p, slope = row.probabilities(kind.scores(raw, cubic), kind)
    if mask is not None:
      p, slope = jnp.where(mask.T, p, 0), jnp.where(mask.T, slope, 0)
    dp = softmax.dot('sh,rh->sr', values, d_out[tile], acc)
    ds = slope * (dp - row.delta[None])
    more = None
    if cubic is not None:
      ds, more = softmax.through_polynomial(ds, raw, cubic, kind)
    ds = ds.astype(qt.dtype)
    dv_c = softmax.dot('sr,rh->sh', p.astype(vb.dtype), d_out[tile], acc)
    dk_c = softmax.dot('sr,rh->sh', ds, qt[tile], acc)
    keys = jnp.swapaxes(turned[at], 0, 1).reshape(kb.shape[-1], -1)
    dq = softmax.dot('hs,sr->hr', keys, ds, acc)
    blocks = [x.reshape(len(ids), -1, x.shape[-1]) for x in (dk_c, dv_c)]
    return dq, at, *blocks, more

  def add(carry, parts):
    """Also of many tiles at once, whose results lie along a first axis."""
    dq, dk, dv, d_cubic = carry
    more, at, dk_c, dv_c, d_cubic_c = parts
    dk, dv = dk.at[at].add(dk_c), dv.at[at].add(dv_c)
    if cubic is not None:
      d_cubic = d_cubic + d_cubic_c.reshape(-1, *cubic.shape).sum(0)
    return dq + more, dk, dv, d_cubic

  def tile_grads(carry, tile):
    def step(ids, mask, carry):
      return add(carry, piece(tile, ids, mask))

    dq = jnp.zeros((qt.shape[2], qt.shape[1]), acc)
    dq, *carry = _walk(spec, tiles, lists, sizes, tile, step, (dq, *carry))
    return tuple(carry), (dq.T * spec.scale).astype(qt.dtype)

  def group_grads(carry, tile):
    def one(tile, i):
      return piece(tile, *together.chunk(spec, tiles, lists, tile, i))

    def step(i, carry):
      return add(carry, jax.vmap(one, (0, None))(tile, i))

    dq = jnp.zeros((len(tile), qt.shape[2], qt.shape[1]), acc)
    trips = together.trips(lists, tile)
    dq, *carry = lax.fori_loop(0, trips, step, (dq, *carry))
    dq = jnp.swapaxes(dq, 1, 2)
    return tuple(carry), (dq * spec.scale).astype(qt.dtype)

  init = jnp.zeros(kb.shape, acc), jnp.zeros(vb.shape, acc)
  init = *init, None if cubic is None else jnp.zeros_like(cubic, acc)
  together = _Together.of(tiles, sizes, qt.shape[0])
  if together is None:
    carry, dq = lax.scan(tile_grads, init, jnp.arange(qt.shape[0]))
  else:
    carry, dq = lax.scan(group_grads, init, together.tile)
    dq = together.join(dq)
  return dq, *carry


block_sparse_attention = differentiable(_forward, _backward)
