"""The backward kernels for GPUs: probabilities again, from the log-sum-exp.

`query_gradient` walks a tile's list as the forward kernel does. For
`key_gradients` a block of threads owns 64 keys: the copying warpgroup walks
the tiles that read them, 64 rows at a time, and the two computing warpgroups
take every other piece; at the end one hands its sums to the other through
shared memory, always in the same order.

With s the scores, p = exp(s - lse) and dp = d_out v^T, the gradient of the
scores is p (dp - delta) (FlashAttention, Dao et al. 2022, Alg. 4).

Not done: a block of keys that every tile reads (a sink) is walked by one block
of threads. It comes first in the grid, so that the others fill the time.
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
from psa_jax.kernels.block_sparse import pallas_gpu_forward as forward
from psa_jax.kernels.block_sparse.lists import Readers
from psa_jax.kernels.nvidia import ROWS, Rows

STAGES = 4  # buffers of query rows; even, so that each has one reader


class Inputs(NamedTuple):
  """What both kernels read; see `pallas_gpu_forward.forward`.

  Keys and values may be longer than their blocks.

  Attributes:
    q: [tiles, rows, H].
    d_out: [tiles, rows, Hv].
    k: [B, S, K, H].
    v: [B, S, K, Hv].
    lse: [tiles, rows]; +inf where a row read nothing.
    delta: [tiles, rows].
    rows: what the rows may read.
    kv_segment: [B, S] or None.
  """

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
    given = self._asdict()
    given |= given.pop('rows')._asdict() | dict(lse=self.lse * forward.LOG2E)
    return {name: x for name, x in given.items() if x is not None}


def query_gradient(
  inputs: Inputs, ids, counts, *, block_k, scale, cores: nvidia.Cores
) -> jax.Array:
  """Gradient [tiles, rows, H]; lists are [B, K, Tb, M] and [B, K, Tb]."""
  q, k, v = inputs.q, inputs.k, inputs.v
  lists = forward.Lists(ids.reshape(-1, ids.shape[-1]), counts.reshape(-1))
  kept = q.dtype.itemsize * (q.shape[2] + v.shape[3])
  plan = forward.Plan.of(
    q, k, v, lists, inputs.rows, block_k, scale, q.dtype, cores, kept=kept
  )
  pairs = plan.lists * plan.rows * plan.M * block_k
  read = plan.parts * plan.lists * plan.M * block_k * (plan.H + plan.Hv)
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
  ids = jnp.pad(lists.ids, ((0, 0), (0, 1)))
  [dq] = kernel(inputs.arrays() | dict(ids=ids, counts=lists.counts))
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
      rows = where.slice(me, plan.cores)
      mine = [
        (inputs[name].at[where.tile, rows], target.at[me])
        for name, target in (tiles | sums).items()
      ]
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
      plgpu.copy_smem_to_gmem(q, dq_ref.at[where.at, rows])
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
  arrivals = len(tiles) + len(sums) + len(vectors)
  ready = plgpu.Barrier(num_arrivals=arrivals, num_barriers=n)
  wg.scoped(
    body,
    tiles,
    sums,
    vectors,
    products.scratch(sizes),
    ready,
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

  def step(s, slot, block, dq):
    segment = buffers['segment'].at[slot] if plan.segmented else None
    may = forward.may_read(plan, vectors, me, block, segment)
    p = jnp.exp2(s * (plan.scale * forward.LOG2E) - row('lse'))
    p = jnp.where(may, p, 0.0)
    dp = made.scores(d_out, buffers['v'].at[slot])
    ds = (p * (dp - row('delta'))).astype(plan.dtype)
    return made.plus('dq', dq, ds, buffers['k'].at[slot])

  start = made.zero('dq')
  dq = forward.walk(plan, inputs, where, count, ring, made, q, step, start)
  return made.read('dq', dq)


class KeyPlan(NamedTuple):
  """The static numbers of a call of `key_gradients`."""

  B: int
  K: int
  nq: int
  nk: int
  rows: int
  H: int
  Hv: int
  block_k: int
  scale: float
  dtype: jnp.dtype
  lowest: bool
  segmented: bool
  cores: nvidia.Cores

  @property
  def groups(self):
    """Pieces of 64 rows a query tile."""
    return -(-self.rows // ROWS)

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
    full = plgpu.Barrier(num_arrivals=len(buffers), num_barriers=STAGES)
    return buffers, full, plgpu.Barrier(num_barriers=STAGES)

  def exchange(self):
    """Where one warpgroup hands its sums of dk and dv to the other."""
    widths = sorted({self.H, self.Hv})
    return {n: self.tile(ROWS, n, dtype=jnp.float32) for n in widths}

  def where(self):
    """(batch row, kv head, block, first key within it)."""
    at = lax.axis_index(wg.BLOCK)
    part = lax.rem(at, jnp.int32(self.parts))
    at = lax.div(at, jnp.int32(self.parts))
    block = lax.rem(at, jnp.int32(self.nk))
    at = lax.div(at, jnp.int32(self.nk))
    batch = lax.div(at, jnp.int32(self.K))
    return batch, lax.rem(at, jnp.int32(self.K)), block, part * ROWS


def key_gradients(
  inputs: Inputs, readers: Readers, *, rows, block_k, scale
) -> tuple[jax.Array, jax.Array]:
  """Of keys and values, [B, S, K, H] and [B, S, K, Hv]; S ends with a block.

  Args:
    inputs: see `Inputs`.
    readers: who reads which block.
    rows: of a query tile without its padding.
    block_k: keys a block.
    scale: factor on the scores.
  """
  q, k, v, limits = inputs.q, inputs.k, inputs.v, inputs.rows
  B, _, K, H = k.shape
  plan = KeyPlan(
    B,
    K,
    q.shape[0] // (B * K),
    readers.offsets.shape[-1] - 1,
    rows,
    H,
    v.shape[3],
    block_k,
    scale,
    q.dtype,
    limits.low is not None,
    limits.segment is not None,
    nvidia.Cores.for_keys(),
  )
  S = plan.nk * plan.parts * ROWS
  pairs = readers.tiles.size * plan.rows * plan.parts * ROWS
  kernel = wg.launch(
    functools.partial(_key_kernel, plan),
    [jax.ShapeDtypeStruct((B, S, K, n), q.dtype) for n in (H, plan.Hv)],
    blocks=B * K * plan.nk * plan.parts,
    computing=plan.cores.computing,
    name='block_sparse_key_gradients',
    cost=pl.CostEstimate(
      flops=4 * pairs * (H + plan.Hv),
      transcendentals=pairs,
      bytes_accessed=q.dtype.itemsize
      * (pairs // ROWS * (H + plan.Hv) + 2 * k.size + 2 * v.size),
    ),
  )
  grads = kernel(
    inputs.arrays()
    | dict(
      offsets=readers.offsets.reshape(B * K, -1),
      tiles=readers.tiles.reshape(B * K, -1),
    )
  )

  def cut(x):
    x = x.reshape(B, plan.nk, -1, *x.shape[2:])[:, :, :block_k]
    return x.reshape(B, -1, *x.shape[3:])

  dk, dv = grads
  return cut(dk), cut(dv)


def _key_kernel(plan, inputs, dk_ref, dv_ref):
  def body(own, segment, exchange, scratch, ready, handed, ring):
    me = lax.axis_index(wg.AXIS)
    batch, head, block, first = plan.where()
    row = batch * plan.K + head
    begin = inputs['offsets'][row, block]
    count = (inputs['offsets'][row, block + 1] - begin) * plan.groups
    keys = pl.ds(block * plan.block_k + first, ROWS)

    @pl.when(me < plan.cores.computing)
    def _compute():
      plgpu.set_max_registers(wg.COMPUTE_REGISTERS, action='increase')
      plgpu.barrier_wait(ready)
      made = products.of(plan.sizes, scratch, me)
      sums = _key_walk(plan, count, block, first, own, segment, ring, made)
      _join(plan, sums, exchange, handed, own)

      @pl.when(me == 0)
      def _store():
        out = pl.ds((block * plan.parts) * ROWS + first, ROWS)
        plgpu.commit_smem()
        for name, ref in (('k', dk_ref), ('v', dv_ref)):
          plgpu.copy_smem_to_gmem(own[name], ref.at[batch, out, head])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(me == plan.cores.computing)
    def _copy():
      plgpu.set_max_registers(wg.COPY_REGISTERS, action='decrease')
      for name in ('k', 'v'):
        source = inputs[name].at[batch, keys, head]
        plgpu.copy_gmem_to_smem(source, own[name], ready)
      if plan.segmented:
        source = inputs['kv_segment'].at[batch, keys]
        plgpu.copy_gmem_to_smem(source, segment, ready)
      _copy_rows(plan, inputs, batch, row, begin, count, ring)

  own = dict(k=plan.tile(ROWS, plan.H), v=plan.tile(ROWS, plan.Hv))
  wg.scoped(
    body,
    own,
    plgpu.SMEM((ROWS,), jnp.int32) if plan.segmented else None,
    plan.exchange(),
    products.scratch(plan.sizes),
    plgpu.Barrier(num_arrivals=len(own) + plan.segmented),
    (plgpu.Barrier(), plgpu.Barrier()),
    plan.ring(),
  )


def _copy_rows(plan, inputs, batch, row, begin, count, ring):
  """The copying warpgroup: the rows that read the block, 64 by 64."""
  buffers, full, free = ring

  def copy(i, slot):
    tile = inputs['tiles'][row, begin + lax.div(i, jnp.int32(plan.groups))]
    rows = pl.ds(lax.rem(i, jnp.int32(plan.groups)) * ROWS, ROWS)
    for name, buffer in buffers.items():
      limit = name in Rows._fields
      at = (batch if limit else row) * plan.nq + tile
      source = inputs[name].at[at, rows]
      plgpu.copy_gmem_to_smem(source, buffer.at[slot], full.at[slot])

  wg.copy_loop(count, STAGES, copy, free)


def _key_walk(plan, count, block, first, own, segment, ring, made):
  """(dk, dv) of every other piece, f32; keys are rows here, rows columns."""
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

    s = made.scores(own['k'], q)
    p = jnp.exp2(s * (plan.scale * forward.LOG2E) - column('lse'))
    may = _read_by(plan, column, block, first, segment)
    p = jnp.where(may, p, 0.0)
    dv = made.plus('dv', dv, p.astype(plan.dtype), d_out)
    dp = made.scores(own['v'], d_out)
    ds = (p * (dp - column('delta'))).astype(plan.dtype)
    dk = made.plus('dk', dk, ds, q)
    wg.release(free.at[slot], loaded=True)
    return dk, dv

  start = made.zero('dk'), made.zero('dv')
  mine = lax.div(count + 1 - me, jnp.int32(2))
  dk, dv = lax.fori_loop(jnp.int32(0), mine, step, start)
  return made.read('dk', dk), made.read('dv', dv)


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


def _join(plan, sums, exchange, handed, own):
  """Adds the second warpgroup's sums to the first's; stores the results."""
  given, taken = handed
  me = lax.axis_index(wg.AXIS)
  dk, dv = sums
  at_k, at_v = exchange[plan.H], exchange[plan.Hv]

  @pl.when(me == 1)
  def _give():
    at_k[...] = dk
    plgpu.barrier_arrive(given)
    plgpu.barrier_wait(taken)
    at_v[...] = dv
    plgpu.barrier_arrive(given)

  @pl.when(me == 0)
  def _take():
    plgpu.barrier_wait(given)
    both = dk + at_k[...]
    plgpu.barrier_arrive(taken)
    own['k'][...] = (both * plan.scale).astype(plan.dtype)
    plgpu.barrier_wait(given)
    own['v'][...] = (dv + at_v[...]).astype(plan.dtype)
