"""The forward kernel for GPUs: a tile of queries against its listed blocks.

One block of threads takes a part of a query tile's rows, one product's worth
for each of one or two computing warpgroups; one more warpgroup walks the list
and copies the named blocks of keys and values into a ring of shared-memory
buffers. Scores and probabilities are in registers; the softmax is the online
one of FlashAttention (Dao et al. 2022, Alg. 1), in powers of two. Where the
products' operands and sums are is the affair of `wgmma.py` and `tcgen05.py`.

The trip count is the list's traced count, so the work is proportional to it.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from psa_jax.kernels import nvidia, products, softmax
from psa_jax.kernels import warpgroups as wg
from psa_jax.kernels.block_sparse.gpu_rows import QueryRows
from psa_jax.kernels.nvidia import Rows

LOG2E = math.log2(math.e)


class Edges(NamedTuple):
  """The blocks of each batch row at which what may be read begins and ends.

  They are read from here, and what lies further out too, which nobody reads:
  a cache may hold anything there, but p @ v would be NaN.

  Attributes:
    low_edge: [B] number of the first block,
    high_edge: and of the last.
    k_edges: [B, 2 * block_k, K, H] the keys of both, as `unread.mark` has them.
    v_edges: [B, 2 * block_k, K, Hv] the values.
  """

  low_edge: jax.Array
  high_edge: jax.Array
  k_edges: jax.Array
  v_edges: jax.Array


class Lists(NamedTuple):
  """Who reads what.

  Attributes:
    ids: [lists, M] key blocks, all in range.
    counts: [lists] how many of them are read.
    per_tile: consecutive lists that share a query tile, each with its own
      result; 1 unless lists were cut to be walked side by side.
  """

  ids: jax.Array
  counts: jax.Array
  per_tile: int = 1


def forward(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  lists: Lists,
  rows: Rows,
  kv_segment: jax.Array | None,
  *,
  queries: QueryRows,
  scale: float,
  dtype,
  cores: nvidia.Cores,
  edges: Edges | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Output, shaped as `queries` says, and log-sum-exp [lists, rows].

  Args:
    q: as `queries` says, of which rows are `cores.padded`. Lists that share a
      tile write [lists, rows, Hv], which takes packed queries.
    k: [B, S, K, H], S a multiple of `block_k`.
    v: [B, S, K, Hv].
    lists: see `Lists`.
    rows: of [B * nq, rows].
    kv_segment: [B, S] if `rows` has segments, S a multiple of
      `nvidia.VECTOR` behind the first key of the last block.
    queries: how queries are given.
    scale: factor on the scores.
    dtype: of the output.
    cores: see `nvidia.Cores.for_queries`.
    edges: see `Edges`; None where keys and values are marked everywhere.
  """
  kept = q.dtype.itemsize * q.shape[-1]
  if not in_place(q.shape[-1], v.shape[3], q.dtype, dtype):
    kept += jnp.dtype(dtype).itemsize * v.shape[3]
  plan = Plan.of(q, v, lists, queries, rows, scale, dtype, cores, kept=kept)
  shape = queries.shape(plan.Hv)
  if lists.per_tile > 1:
    shape = (plan.lists, plan.rows, plan.Hv)
  kernel = wg.launch(
    functools.partial(_kernel, plan),
    [
      jax.ShapeDtypeStruct(shape, dtype),
      jax.ShapeDtypeStruct((plan.lists, plan.rows), jnp.float32),
    ],
    blocks=plan.lists * plan.parts,
    computing=cores.computing,
    name='block_sparse_forward',
    cost=_cost(plan, q, k, v, dtype),
  )
  # One more column, because the next entry is read ahead.
  ids = jnp.pad(lists.ids, ((0, 0), (0, 1)))
  inputs = dict(q=q, k=k, v=v, ids=ids, counts=lists.counts)
  if edges is not None:
    inputs |= edges._asdict()
  out, lse = kernel(inputs | plan.optional(rows, kv_segment))
  return out, lse


def in_place(H: int, Hv: int, dtype, out_dtype) -> bool:
  """Whether the output takes the queries' place in shared memory."""
  return H == Hv and dtype == jnp.dtype(out_dtype)


class Plan(NamedTuple):
  """The static numbers of a call."""

  lists: int
  M: int
  per_tile: int
  queries: QueryRows
  H: int
  Hv: int
  scale: float
  dtype: jnp.dtype
  out_dtype: jnp.dtype
  lowest: bool
  segmented: bool
  cores: nvidia.Cores
  kept: int

  @classmethod
  def of(cls, q, v, lists, queries, rows, scale, out_dtype, cores, kept):
    """The numbers of a call.

    Args:
      q: as `forward` takes it, like those up to `cores`.
      v: likewise.
      lists: likewise.
      queries: likewise.
      rows: likewise.
      scale: likewise.
      out_dtype: likewise.
      cores: likewise.
      kept: bytes of tiles in shared memory that belong to a row.
    """
    return cls(
      *lists.ids.shape,
      per_tile=lists.per_tile,
      queries=queries,
      H=q.shape[-1],
      Hv=v.shape[3],
      scale=scale,
      dtype=q.dtype,
      out_dtype=jnp.dtype(out_dtype),
      lowest=rows.low is not None,
      segmented=rows.segment is not None,
      cores=cores,
      kept=kept,
    )

  @property
  def rows(self):
    """Of a query tile, padding included."""
    return self.queries.rows

  @property
  def block_k(self):
    """Keys a block."""
    return self.queries.tiles.block_k

  @property
  def stages(self):
    """Buffers of keys and values; shared memory has room for so many."""
    rows = self.cores.computing * self.cores.rows
    kept = self.kept
    if self.cores.folded:
      kept += self.block_k * self.dtype.itemsize  # the left operands
    block = self.block_k * self.dtype.itemsize * (self.H + self.Hv)
    # Vectors, which are rounded up to whole kilobytes, and barriers.
    small = 1024 * (4 + len(self.row_names) + 3 * self.segmented)
    room = nvidia.SHARED - rows * kept - small
    return max(1, min(3, room // block))

  @property
  def parts(self):
    """Blocks of threads a query tile."""
    return self.rows // (self.cores.rows * self.cores.computing)

  @property
  def elements(self):
    """Of a swizzled row; one number for all tiles, as products ask."""
    return self.cores.elements(self.H, self.Hv, self.block_k)

  @property
  def row_names(self):
    """The vectors of int32 that say what a row may read."""
    low = ['low'] if self.lowest else []
    return ['high', *low, *(['segment'] if self.segmented else [])]

  def optional(self, rows, kv_segment):
    """The inputs that say what a row may read."""
    arrays = dict(rows._asdict(), kv_segment=kv_segment)
    return {name: x for name, x in arrays.items() if x is not None}

  def tile(self, *shape, dtype=None):
    """Shared memory for a tile that products read."""
    return wg.tile_memory(shape, dtype or self.dtype, self.elements)

  def vectors(self):
    """Shared memory for what a row may read, of all warpgroups."""
    shape = (self.cores.computing, self.cores.rows)
    return {name: plgpu.SMEM(shape, jnp.int32) for name in self.row_names}

  def ring(self):
    """Buffers of key blocks, and the barriers of their coming and going."""
    buffers = dict(
      k=self.tile(self.stages, self.block_k, self.H),
      v=self.tile(self.stages, self.block_k, self.Hv),
    )
    if self.segmented:
      shape = (self.stages, nvidia.up(self.block_k, nvidia.VECTOR))
      buffers['segment'] = plgpu.SMEM(shape, jnp.int32)
    full = plgpu.Barrier(num_arrivals=len(buffers), num_barriers=self.stages)
    free = plgpu.Barrier(
      num_arrivals=self.cores.computing, num_barriers=self.stages
    )
    return buffers, full, free

  def sizes(self, **sums):
    """What is multiplied into sums of so many columns."""
    return wg.Sizes(self.cores, self.block_k, sums, self.dtype, self.elements)

  def where(self):
    """Where a block of threads works."""
    block = lax.axis_index(wg.BLOCK)
    at = lax.div(block, jnp.int32(self.parts))
    part = lax.rem(block, jnp.int32(self.parts))
    tile = lax.div(at, jnp.int32(self.per_tile))
    nq, K = self.queries.tiles.nq, self.queries.tiles.K
    head = lax.div(tile, jnp.int32(nq))
    batch = lax.div(head, jnp.int32(K))
    info = batch * nq + lax.rem(tile, jnp.int32(nq))
    return Where(at, tile, batch, lax.rem(head, jnp.int32(K)), info, part)

  def row_slices(self, array, shared, where, me):
    """(global, shared) memory of the copies of a warpgroup's rows."""
    nq = jnp.int32(self.queries.tiles.nq)
    return self.queries.slices(
      array,
      shared.at[me],
      lax.div(where.tile, nq),
      lax.rem(where.tile, nq),
      where.first(me, self.cores),
      self.cores.rows,
    )

  def ready(self, tiles: int, vectors: int):
    """A barrier a warpgroup, for what it loads before it begins."""
    copies = tiles * self.queries.copies(self.cores.rows) + vectors
    return plgpu.Barrier(num_arrivals=copies, num_barriers=self.cores.computing)


class Where(NamedTuple):
  """Where a block of threads works.

  Attributes:
    at: number of the list.
    tile: of the query tile.
    batch: batch row.
    head: kv head.
    info: row of the arrays in `Rows`.
    part: of the tile's rows.
  """

  at: jax.Array
  tile: jax.Array
  batch: jax.Array
  head: jax.Array
  info: jax.Array
  part: jax.Array

  def first(self, me, cores: nvidia.Cores):
    """The first row of computing warpgroup `me`."""
    return (self.part * cores.computing + me) * cores.rows

  def slice(self, me, cores: nvidia.Cores):
    """The rows of computing warpgroup `me`."""
    return pl.ds(self.first(me, cores), cores.rows)


def _kernel(plan, inputs, out_ref, lse_ref):
  def body(q, out, lse, vectors, scratch, ready, ring):
    me = lax.axis_index(wg.AXIS)
    where = plan.where()
    count = inputs['counts'][where.at]

    @pl.when(me < plan.cores.computing)
    def _compute():
      if plan.cores.computing > 1:
        plgpu.set_max_registers(wg.COMPUTE_REGISTERS, action='increase')
      load_rows(
        plan.row_slices(inputs['q'], q, where, me)
        + row_copies(plan, inputs, vectors, where, me),
        ready.at[me],
      )
      made = products.of(sizes, scratch, me)
      result = _walk(plan, inputs, where, count, q.at[me], vectors, ring, made)
      # The queries were read for the last time.
      made_in = q if out is None else out
      made_in.at[me][...], lse.at[me][...] = _finish(plan, *result)
      plgpu.commit_smem()
      rows = where.slice(me, plan.cores)
      targets = [(out_ref.at[where.at, rows], made_in.at[me])]
      if plan.per_tile == 1:
        targets = plan.row_slices(out_ref, made_in, where, me)
      for target, source in targets:
        plgpu.copy_smem_to_gmem(source, target)
      plgpu.copy_smem_to_gmem(lse.at[me], lse_ref.at[where.at, rows])
      plgpu.wait_smem_to_gmem(0)

    @pl.when(me == plan.cores.computing)
    def _copy():
      if plan.cores.computing > 1:
        plgpu.set_max_registers(wg.COPY_REGISTERS, action='decrease')
      copy_blocks(plan, inputs, where, count, ring)

  n, rows = plan.cores.computing, plan.cores.rows
  sizes = plan.sizes(out=plan.Hv)._replace(ahead=plan.stages > 1)
  vectors = plan.vectors()
  out = None
  if not in_place(plan.H, plan.Hv, plan.dtype, plan.out_dtype):
    out = plan.tile(n, rows, plan.Hv, dtype=plan.out_dtype)
  wg.scoped(
    body,
    plan.tile(n, rows, plan.H),
    out,
    plgpu.SMEM((n, rows), jnp.float32),
    vectors,
    products.scratch(sizes),
    plan.ready(1, len(vectors)),
    plan.ring(),
  )


def load_rows(pairs, ready) -> None:
  """Copies what a computing warpgroup keeps, and waits for it."""
  for source, target in pairs:
    plgpu.copy_gmem_to_smem(source, target, ready)
  plgpu.barrier_wait(ready)


def row_copies(plan, inputs, vectors, where, me):
  """(source, target) of the vectors that say what a row may read."""
  rows = where.slice(me, plan.cores)
  return [
    (inputs[name].at[where.info, rows], target.at[me])
    for name, target in vectors.items()
  ]


def copy_blocks(plan, inputs, where, count, ring) -> None:
  """The copying warpgroup: the listed blocks, in the list's order."""
  buffers, full, free = ring
  edged = 'k_edges' in inputs

  def pair(k, v, first, slot):
    keys = pl.ds(first, plan.block_k)
    for name, source in (('k', k), ('v', v)):
      source = inputs[source].at[where.batch, keys, where.head]
      plgpu.copy_gmem_to_smem(source, buffers[name].at[slot], full.at[slot])

  def copy(i, slot):
    block = inputs['ids'][where.at, i]
    first = block * plan.block_k
    arrived = full.at[slot]
    if edged:
      behind = block >= inputs['high_edge'][where.batch]
      edge = behind | (block <= inputs['low_edge'][where.batch])
      at = jnp.where(behind, jnp.int32(plan.block_k), jnp.int32(0))
      pl.when(edge)(lambda: pair('k_edges', 'v_edges', at, slot))
      pl.when(jnp.logical_not(edge))(lambda: pair('k', 'v', first, slot))
    else:
      pair('k', 'v', first, slot)
    if plan.segmented:
      keys = pl.ds(first, nvidia.up(plan.block_k, nvidia.VECTOR))
      source = inputs['kv_segment'].at[where.batch, keys]
      plgpu.copy_gmem_to_smem(source, buffers['segment'].at[slot], arrived)

  wg.copy_loop(count, plan.stages, copy, free)


def may_read(plan, vectors, me, block, segment_ref) -> jax.Array:
  """[rows, block_k] bool: which row may read which key of a block."""
  shape = (plan.cores.rows, plan.block_k)

  def row(name):
    vector = wg.load_vector(vectors[name].at[me], plan.cores, axis=0)
    return wg.spread(vector, shape, 0, plan.cores)

  key = wg.positions(shape, 1, plan.cores) + block * plan.block_k
  may = key <= row('high')
  if plan.lowest:
    may = may & (key >= row('low'))
  if plan.segmented:
    keys = segment_ref.at[pl.ds(0, plan.block_k)]
    keys = wg.load_vector(keys, plan.cores, axis=1)
    may = may & (wg.spread(keys, shape, 1, plan.cores) == row('segment'))
  return may


def walk(plan, inputs, where, count, ring, step, carry):
  """A computing warpgroup's loop over a list.

  Args:
    plan: of the call.
    inputs: of the kernel.
    where: the list is.
    count: blocks to read.
    ring: buffers of keys and values, and their barriers.
    step: takes the buffer, the block and the carry.
    carry: the first one.
  """
  _, full, free = ring

  def body(i, carry):
    block, carry = carry
    # Known one step ahead: the way to global memory is long.
    following = inputs['ids'][where.at, i + 1]
    slot = lax.rem(i, jnp.int32(plan.stages))
    plgpu.barrier_wait(full.at[slot])
    carry = step(slot, block, carry)
    _release(plan, free.at[slot])
    return following, carry

  first = inputs['ids'][where.at, 0]
  return lax.fori_loop(jnp.int32(0), count, body, (first, carry))[1]


def _walk_ahead(plan, inputs, where, count, ring, made, q, step, carry):
  """`walk`, with the scores of the next block begun before a step."""
  buffers, full, free = ring

  def arrive(i, condition):
    slot = lax.rem(i, jnp.int32(plan.stages))
    pl.when(condition)(lambda: plgpu.barrier_wait(full.at[slot]))
    return buffers['k'].at[slot]

  def body(i, carry):
    block, begun, carry = carry
    following = inputs['ids'][where.at, i + 1]
    slot = lax.rem(i, jnp.int32(plan.stages))
    scores = made.take(begun)
    more = i + 1 < count
    keys = arrive(i + 1, more)
    carry, begun = made.meanwhile(
      more, q, keys, lambda: step(scores, slot, block, carry)
    )
    _release(plan, free.at[slot])
    return following, begun, carry

  keys = arrive(jnp.int32(0), count > 0)
  begun = made.begin(count > 0, q, keys)
  first = inputs['ids'][where.at, 0]
  carry = first, begun, carry
  return lax.fori_loop(jnp.int32(0), count, body, carry)[2]


def _release(plan, free) -> None:
  """Says that a buffer was read."""
  wg.release(free, loaded=plan.segmented or not plan.cores.hardware)


def _walk(plan, inputs, where, count, q, vectors, ring, made):
  """(weighted values, largest score, sum) by row; scores times log2(e)."""
  me = lax.axis_index(wg.AXIS)
  buffers = ring[0]
  shape = (plan.cores.rows, plan.block_k)

  def step(s, slot, block, carry):
    out, top, total = carry
    segment = buffers['segment'].at[slot] if plan.segmented else None
    may = may_read(plan, vectors, me, block, segment)
    s = jnp.where(may, s * (plan.scale * LOG2E), softmax.MASKED)
    higher = jnp.maximum(top, s.max(1))
    p = jnp.exp2(s - wg.spread(higher, shape, 0, plan.cores))
    old = jnp.exp2(top - higher)
    total = total * old + p.sum(1)
    out = made.scaled('out', out, old)
    values = buffers['v'].at[slot]
    out = made.plus('out', out, p.astype(plan.dtype), values)
    return out, higher, total

  def rows(value):
    x = jnp.full((plan.cores.rows,), value, jnp.float32)
    return wg.in_layout(x, plan.cores, 0)

  start = made.zero('out'), rows(softmax.MASKED / 2), rows(0.0)
  if made.ahead:
    results = _walk_ahead(
      plan, inputs, where, count, ring, made, q, step, start
    )
  else:

    def plain(slot, block, carry):
      scores = made.scores(q, buffers['k'].at[slot])
      return step(scores, slot, block, carry)

    results = walk(plan, inputs, where, count, ring, plain, start)
  out, *rest = results
  return made.read('out', out), *rest


def _finish(plan, out, top, total):
  """Output and log-sum-exp; 0 and -inf where nothing was read."""
  none = total == 0.0  # what `> 0` would take NaN for
  total = jnp.where(none, 1.0, total)
  lse = jnp.where(none, -jnp.inf, top / LOG2E + jnp.log(total))
  out = out / wg.spread(total, out.shape, 0, plan.cores)
  return out.astype(plan.out_dtype), lse


def _cost(plan, q, k, v, out_dtype) -> pl.CostEstimate:
  """If every list is full: the counts are not known yet."""
  pairs = plan.lists * plan.rows * plan.M * plan.block_k
  read = plan.lists * plan.parts * plan.M * plan.block_k * (plan.H + plan.Hv)
  out = plan.lists * plan.rows * plan.Hv * jnp.dtype(out_dtype).itemsize
  return pl.CostEstimate(
    flops=2 * pairs * (plan.H + plan.Hv),
    transcendentals=pairs,
    bytes_accessed=q.size * q.dtype.itemsize + read * k.dtype.itemsize + out,
  )
