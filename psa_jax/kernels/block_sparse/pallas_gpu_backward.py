"""The backward kernels for GPUs: probabilities again, from the log-sum-exp.

`query_gradient` walks a tile's list as the forward kernel does. For
`key_gradients` a block of threads owns 64 keys: the copying warpgroup walks
the tiles that read them, 64 rows at a time, and the two computing warpgroups
take every other piece; at the end one hands its sums to the other through
shared memory, always in the same order.

With s the scores, p = exp(s - lse) and dp = d_out v^T, the gradient of the
scores is p (dp - delta) (FlashAttention, Dao et al. 2022, Alg. 4).

A key block that many tiles read (a sink) is dealt out to several blocks of
threads, whose sums are added afterwards, in f32 and in order (`lists.Shares`).
They come first in the grid, so that the others fill the time.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from psa_jax.kernels import nvidia, products
from psa_jax.kernels import warpgroups as wg
from psa_jax.kernels.block_sparse import lists
from psa_jax.kernels.block_sparse import pallas_gpu_forward as forward
from psa_jax.kernels.block_sparse.gpu_rows import QueryRows
from psa_jax.kernels.block_sparse.lists import Readers
from psa_jax.kernels.nvidia import ROWS, Rows

FEWEST_READERS = 16  # query tiles of a share
STAGES = 4  # buffers of query rows; even, so that each has one reader


class Inputs(NamedTuple):
  """What both kernels read; see `pallas_gpu_forward.forward`.

  Keys and values may be longer than their blocks.

  Attributes:
    queries: how queries are given.
    q: as `queries` says.
    d_out: likewise.
    k: [B, S, K, H].
    v: [B, S, K, Hv].
    lse: [tiles, rows]; +inf where a row read nothing.
    delta: [tiles, rows].
    rows: what the rows may read.
    kv_segment: [B, S] or None.
  """

  queries: QueryRows
  q: jax.Array
  d_out: jax.Array
  k: jax.Array
  v: jax.Array
  lse: jax.Array
  delta: jax.Array
  rows: Rows
  kv_segment: jax.Array | None

  def arrays(self):
    """By name, without those that are not there; lse for powers of two."""
    arrays = self._asdict()
    del arrays['queries']
    arrays |= arrays.pop('rows')._asdict() | dict(lse=self.lse * forward.LOG2E)
    return {name: x for name, x in arrays.items() if x is not None}


def query_gradient(
  inputs: Inputs, ids, counts, *, scale, cores: nvidia.Cores
) -> jax.Array:
  """Gradient, shaped as the queries; lists are [B, K, Tb, M], [B, K, Tb]."""
  q, v, queries = inputs.q, inputs.v, inputs.queries
  listed = forward.Lists(ids.reshape(-1, ids.shape[-1]), counts.reshape(-1))
  kept = q.dtype.itemsize * (q.shape[-1] + v.shape[3])
  plan = forward.Plan.of(
    q, v, listed, queries, inputs.rows, scale, q.dtype, cores, kept=kept
  )
  pairs = plan.lists * plan.rows * plan.M * plan.block_k
  read = plan.parts * plan.lists * plan.M * plan.block_k * (plan.H + plan.Hv)
  kernel = wg.launch(
    functools.partial(_query_kernel, plan),
    [jax.ShapeDtypeStruct(q.shape, q.dtype)],
    blocks=plan.lists * plan.parts,
    computing=cores.computing,
    name='block_sparse_query_gradient',
    cost=pl.CostEstimate(
      flops=2 * pairs * (2 * plan.H + plan.Hv),
      transcendentals=pairs,
      bytes_accessed=q.dtype.itemsize * (read + 2 * q.size + inputs.d_out.size),
    ),
  )
  ids = jnp.pad(listed.ids, ((0, 0), (0, 1)))
  [dq] = kernel(inputs.arrays() | dict(ids=ids, counts=listed.counts))
  return dq


def _query_kernel(plan, inputs, dq_ref):
  def body(tiles, sums, vectors, scratch, ready, ring):
    me = lax.axis_index(wg.AXIS)
    where = plan.where()
    count = inputs['counts'][where.at]

    @pl.when(me < plan.cores.computing)
    def _compute():
      if plan.cores.computing > 1:
        plgpu.set_max_registers(wg.COMPUTE_REGISTERS, action='increase')
      mine = []
      for name, target in tiles.items():
        mine += plan.row_slices(inputs[name], target, where, me)
      rows = where.slice(me, plan.cores)
      for name, target in sums.items():
        mine.append((inputs[name].at[where.tile, rows], target.at[me]))
      limits = forward.row_copies(plan, inputs, vectors, where, me)
      forward.load_rows(mine + limits, ready.at[me])
      made = products.of(sizes, scratch, me)
      dq = _query_walk(
        plan, inputs, where, count, tiles, sums, vectors, ring, made
      )
      # The queries were read for the last time.
      q = tiles['q'].at[me]
      q[...] = (dq * plan.scale).astype(plan.dtype)
      plgpu.commit_smem()
      for target, source in plan.row_slices(dq_ref, tiles['q'], where, me):
        plgpu.copy_smem_to_gmem(source, target)
      plgpu.wait_smem_to_gmem(0)

    @pl.when(me == plan.cores.computing)
    def _copy():
      if plan.cores.computing > 1:
        plgpu.set_max_registers(wg.COPY_REGISTERS, action='decrease')
      forward.copy_blocks(plan, inputs, where, count, ring)

  n, rows = plan.cores.computing, plan.cores.rows
  sizes = plan.sizes(dq=plan.H)
  vectors = plan.vectors()
  sums = {x: plgpu.SMEM((n, rows), jnp.float32) for x in ('lse', 'delta')}
  tiles = dict(q=plan.tile(n, rows, plan.H), d_out=plan.tile(n, rows, plan.Hv))
  wg.scoped(
    body,
    tiles,
    sums,
    vectors,
    products.scratch(sizes),
    plan.ready(len(tiles), len(sums) + len(vectors)),
    plan.ring(),
  )


def _query_walk(plan, inputs, where, count, tiles, sums, vectors, ring, made):
  """[rows, H] f32: the sum of ds @ k over the list."""
  me = lax.axis_index(wg.AXIS)
  shape = (plan.cores.rows, plan.block_k)
  q, d_out = tiles['q'].at[me], tiles['d_out'].at[me]
  buffers = ring[0]

  def row(name):
    vector = wg.load_vector(sums[name].at[me], plan.cores, axis=0)
    return wg.spread(vector, shape, 0, plan.cores)

  def probabilities(s, slot, block):
    segment = buffers['segment'].at[slot] if plan.segmented else None
    may = forward.may_read(plan, vectors, me, block, segment)
    p = jnp.exp2(s * (plan.scale * forward.LOG2E) - row('lse'))
    return jnp.where(may, p, 0.0)

  def step(slot, block, dq):
    keys = buffers['k'].at[slot]
    p, dp = made.both_scores(
      (q, keys),
      (d_out, buffers['v'].at[slot]),
      lambda s: probabilities(s, slot, block),
    )
    ds = (p * (dp - row('delta'))).astype(plan.dtype)
    return made.plus('dq', dq, ds, keys)

  start = made.zero('dq')
  dq = forward.walk(plan, inputs, where, count, ring, step, start)
  return made.read('dq', dq)


class KeyPlan(NamedTuple):
  """The static numbers of a call of `key_gradients`."""

  queries: QueryRows
  H: int
  Hv: int
  extra: int
  scale: float
  dtype: jnp.dtype
  lowest: bool
  segmented: bool
  cores: nvidia.Cores

  @property
  def tiles(self):
    """The tiling."""
    return self.queries.tiles

  @property
  def heads(self):
    """Kv heads of all batch rows."""
    return self.tiles.B * self.tiles.K

  @property
  def block_k(self):
    """Keys a block."""
    return self.tiles.block_k

  @property
  def groups(self):
    """Pieces of 64 rows a query tile, without its padding."""
    return -(-self.tiles.rows // ROWS)

  @property
  def parts(self):
    """Pieces of 64 keys a block; the last may reach into the next block."""
    return -(-self.block_k // ROWS)

  @property
  def elements(self):
    """Of a swizzled row; one number for all tiles, as products ask."""
    return self.cores.elements(self.H, self.Hv, ROWS)

  @property
  def sizes(self):
    """What is multiplied."""
    sums = dict(dk=self.H, dv=self.Hv)
    return wg.Sizes(self.cores, ROWS, sums, self.dtype, self.elements)

  def tile(self, *shape, dtype=None):
    """Shared memory for a tile that products read."""
    return wg.tile_memory(shape, dtype or self.dtype, self.elements)

  def ring(self):
    """Buffers of query rows, and the barriers of their coming and going."""
    names = ['high', *(['low'] if self.lowest else [])]
    names += ['segment'] if self.segmented else []
    vectors = {name: plgpu.SMEM((STAGES, ROWS), jnp.int32) for name in names}
    buffers = vectors | dict(
      q=self.tile(STAGES, ROWS, self.H),
      d_out=self.tile(STAGES, ROWS, self.Hv),
      lse=plgpu.SMEM((STAGES, ROWS), jnp.float32),
      delta=plgpu.SMEM((STAGES, ROWS), jnp.float32),
    )
    copies = len(buffers) - 2 + 2 * self.queries.copies(ROWS)
    full = plgpu.Barrier(num_arrivals=copies, num_barriers=STAGES)
    return buffers, full, plgpu.Barrier(num_barriers=STAGES)

  def exchange(self):
    """Where one warpgroup hands its sums of dk and dv to the other."""
    widths = sorted({self.H, self.Hv})
    return {n: self.tile(ROWS, n, dtype=jnp.float32) for n in widths}

  def where(self):
    """(kv head of all, share, part of its block)."""
    at = lax.axis_index(wg.BLOCK)
    part = lax.rem(at, jnp.int32(self.parts))
    at = lax.div(at, jnp.int32(self.parts))
    heads = jnp.int32(self.heads)
    return lax.rem(at, heads), lax.div(at, heads), part


def most_readers(tiles, readers: Readers) -> int:
  """Query tiles that one block of threads walks through.

  Half of what each multiprocessor has to do on average, so that the longest
  walk does not decide how long the kernel takes.
  """
  every = tiles.B * tiles.K * readers.tiles.shape[-1]
  return max(FEWEST_READERS, every // nvidia.BLOCKS)


def key_gradients(
  inputs: Inputs, readers: Readers, *, scale
) -> tuple[jax.Array, jax.Array]:
  """Of keys and values, [B, S, K, H] and [B, S, K, Hv]; S ends with a block.

  Args:
    inputs: see `Inputs`.
    readers: who reads which block.
    scale: factor on the scores.
  """
  q, k, v, limits = inputs.q, inputs.k, inputs.v, inputs.rows
  tiles = inputs.queries.tiles
  most = most_readers(tiles, readers)
  shares = lists.share_out(readers, tiles.nq, most)
  plan = KeyPlan(
    inputs.queries,
    q.shape[-1],
    v.shape[3],
    shares.extra,
    scale,
    q.dtype,
    limits.low is not None,
    limits.segment is not None,
    nvidia.Cores.for_keys(),
  )
  size = plan.parts * ROWS
  widths = (plan.H, plan.Hv)
  out_type = [
    jax.ShapeDtypeStruct((tiles.B, tiles.nk * size, tiles.K, n), q.dtype)
    for n in widths
  ]
  if shares.extra:
    shape = (plan.heads, shares.extra * size)
    out_type += [jax.ShapeDtypeStruct((*shape, n), jnp.float32) for n in widths]
  pairs = readers.tiles.size * tiles.rows * size
  kernel = wg.launch(
    functools.partial(_key_kernel, plan),
    out_type,
    blocks=plan.heads * shares.block.shape[-1] * plan.parts,
    computing=plan.cores.computing,
    name='block_sparse_key_gradients',
    cost=pl.CostEstimate(
      flops=4 * pairs * sum(widths),
      transcendentals=pairs,
      bytes_accessed=q.dtype.itemsize
      * (pairs // ROWS * sum(widths) + 2 * k.size + 2 * v.size),
    ),
  )
  tables = dict(
    block=shares.block,
    first=shares.first,
    count=shares.count,
    tiles=readers.tiles,
  )
  tables = {x: y.reshape(plan.heads, -1) for x, y in tables.items()}
  outputs = kernel(inputs.arrays() | tables)

  def finish(whole, partial):
    whole = whole.reshape(tiles.B, tiles.nk, size, *whole.shape[2:])
    if partial is not None:
      shape = (tiles.B, tiles.K, shares.extra, size, -1)
      partial = partial.reshape(shape)
      whole = lists.join_shares(whole, partial, readers, tiles.nq, most)
    whole = whole[:, :, : plan.block_k]
    return whole.reshape(tiles.B, -1, *whole.shape[3:])

  partial = outputs[2:] if shares.extra else (None, None)
  return finish(outputs[0], partial[0]), finish(outputs[1], partial[1])


def _key_kernel(plan, inputs, dk_ref, dv_ref, *partial):
  def body(block_kv, segment, exchange, scratch, ready, handed, ring):
    me = lax.axis_index(wg.AXIS)
    row, share, part = plan.where()
    K = jnp.int32(plan.tiles.K)
    batch, head = lax.div(row, K), lax.rem(row, K)
    block = inputs['block'][row, share]
    count = inputs['count'][row, share] * plan.groups
    first = part * ROWS
    keys = pl.ds(block * plan.block_k + first, ROWS)

    @pl.when(me < plan.cores.computing)
    def _compute():
      plgpu.set_max_registers(wg.COMPUTE_REGISTERS, action='increase')
      plgpu.barrier_wait(ready)
      made = products.of(plan.sizes, scratch, me)
      sums = _key_walk(plan, count, block, first, block_kv, segment, ring, made)
      at = share * plan.parts * ROWS + first
      rest = [ref.at[row, pl.ds(at, ROWS)] for ref in partial]
      _join(plan, sums, exchange, handed, block_kv, share < plan.extra, rest)

      @pl.when((me == 0) & (share >= plan.extra))
      def _store():
        out = pl.ds((block * plan.parts) * ROWS + first, ROWS)
        plgpu.commit_smem()
        for name, ref in (('k', dk_ref), ('v', dv_ref)):
          plgpu.copy_smem_to_gmem(block_kv[name], ref.at[batch, out, head])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(me == plan.cores.computing)
    def _copy():
      plgpu.set_max_registers(wg.COPY_REGISTERS, action='decrease')
      for name in ('k', 'v'):
        source = inputs[name].at[batch, keys, head]
        plgpu.copy_gmem_to_smem(source, block_kv[name], ready)
      if plan.segmented:
        source = inputs['kv_segment'].at[batch, keys]
        plgpu.copy_gmem_to_smem(source, segment, ready)
      begin = inputs['first'][row, share]
      _copy_rows(plan, inputs, batch, row, begin, count, ring)

  block_kv = dict(k=plan.tile(ROWS, plan.H), v=plan.tile(ROWS, plan.Hv))
  wg.scoped(
    body,
    block_kv,
    plgpu.SMEM((ROWS,), jnp.int32) if plan.segmented else None,
    plan.exchange(),
    products.scratch(plan.sizes),
    plgpu.Barrier(num_arrivals=len(block_kv) + plan.segmented),
    (plgpu.Barrier(), plgpu.Barrier()),
    plan.ring(),
  )


def _copy_rows(plan, inputs, batch, row, begin, count, ring):
  """The copying warpgroup: the rows that read the block, 64 by 64."""
  buffers, full, free = ring

  def copy(i, slot):
    tile = inputs['tiles'][row, begin + lax.div(i, jnp.int32(plan.groups))]
    first = lax.rem(i, jnp.int32(plan.groups)) * ROWS
    for name, buffer in buffers.items():
      at = (batch if name in Rows._fields else row) * plan.tiles.nq + tile
      pairs = [(inputs[name].at[at, pl.ds(first, ROWS)], buffer.at[slot])]
      if name in ('q', 'd_out'):
        pairs = plan.queries.slices(
          inputs[name], buffer.at[slot], row, tile, first, ROWS
        )
      for source, target in pairs:
        plgpu.copy_gmem_to_smem(source, target, full.at[slot])

  wg.copy_loop(count, STAGES, copy, free)


def _key_walk(plan, count, block, first, block_kv, segment, ring, made):
  """(dk, dv) of every other piece, f32; keys are rows here, rows columns.

  They are returned as functions, so that not both have to be in registers.
  """
  me = lax.axis_index(wg.AXIS)
  buffers, full, free = ring
  shape = (ROWS, ROWS)

  def step(i, carry):
    dk, dv = carry
    slot = lax.rem(2 * i + me, jnp.int32(STAGES))
    plgpu.barrier_wait(full.at[slot])
    q, d_out = buffers['q'].at[slot], buffers['d_out'].at[slot]

    def column(name):
      vector = wg.load_vector(buffers[name].at[slot], plan.cores, axis=1)
      return wg.spread(vector, shape, 1, plan.cores)

    def probabilities(s):
      p = jnp.exp2(s * (plan.scale * forward.LOG2E) - column('lse'))
      may = _read_by(plan, column, block, first, segment)
      return jnp.where(may, p, 0.0)

    p, dp = made.both_scores(
      (block_kv['k'], q), (block_kv['v'], d_out), probabilities
    )
    ds = (p * (dp - column('delta'))).astype(plan.dtype)
    dk, dv = made.plus_both(
      ('dk', 'dv'), (dk, dv), (ds, q), (p.astype(plan.dtype), d_out)
    )
    wg.release(free.at[slot], loaded=True)
    return dk, dv

  start = made.zero('dk'), made.zero('dv')
  mine = lax.div(count + 1 - me, jnp.int32(2))
  dk, dv = lax.fori_loop(jnp.int32(0), mine, step, start)
  return (lambda: made.read('dk', dk)), (lambda: made.read('dv', dv))


def _read_by(plan, column, block, first, segment) -> jax.Array:
  """[keys, rows] bool: which key of the block may be read by which row."""
  shape = (ROWS, ROWS)
  inside = wg.positions(shape, 0, plan.cores) + first
  key = inside + block * plan.block_k
  may = key <= column('high')
  if plan.lowest:
    may = may & (key >= column('low'))
  if plan.block_k % ROWS:
    may = may & (inside < plan.block_k)
  if plan.segmented:
    keys = wg.load_vector(segment, plan.cores, axis=0)
    may = may & (wg.spread(keys, shape, 0, plan.cores) == column('segment'))
  return may


def _join(plan, sums, exchange, handed, block_kv, extra, partial):
  """Adds the second warpgroup's sums to the first's; stores the results.

  Args:
    plan: of the call.
    sums: this warpgroup's, as functions.
    exchange: shared memory for the second one's, by width.
    handed: barriers.
    block_kv: keys and values, which the results replace.
    extra: whether this is an extra share.
    partial: where its results go instead; empty if there are none.
  """
  sent, received = handed
  me = lax.axis_index(wg.AXIS)
  dk, dv = sums
  at_k, at_v = exchange[plan.H], exchange[plan.Hv]

  def store(result, buffer, to):
    if not partial:
      block_kv[to][...] = result.astype(plan.dtype)
      return

    @pl.when(jnp.logical_not(extra))
    def _result():
      block_kv[to][...] = result.astype(plan.dtype)

    @pl.when(extra)
    def _partial():
      buffer[...] = result
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(buffer, partial['kv'.index(to)])
      plgpu.wait_smem_to_gmem(0)

  @pl.when(me == 1)
  def _give():
    at_k[...] = dk()
    plgpu.barrier_arrive(sent)
    plgpu.barrier_wait(received)
    at_v[...] = dv()
    plgpu.barrier_arrive(sent)

  @pl.when(me == 0)
  def _take():
    plgpu.barrier_wait(sent)
    store((dk() + at_k[...]) * plan.scale, at_k, 'k')
    plgpu.barrier_arrive(received)
    plgpu.barrier_wait(sent)
    store(dv() + at_v[...], at_v, 'v')
