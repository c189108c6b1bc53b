"""Decoding by block list on TPU: only the listed blocks leave HBM.

One grid step is a kv head of a sequence; the T queries of its G heads are the
rows of one small tile. The blocks of its list are copied into two buffers in
turn, as in `block_sparse/pallas_tpu.py`, but never one more than the count:
here bytes are all the cost.

Where H and Hv are multiples of 128 and `block_k` is a multiple of 128 or a
power of two of at least 8 (bf16: 16), a cache is read in place:

* stored as [B, S, K, *], which is how it is passed, if it is f32, or if K is
  even. The copy of a head's block is strided. In memory bf16 rows are
  interleaved in pairs, so that of two kv heads both are read, and one used;
* stored as [B, K, S, *] and passed as `cache.swapaxes(1, 2)` with
  `heads_first`, if S is a multiple of `block_k`. Only what is listed is read.

Any other cache is copied first, at every call: narrow heads above all, which
XLA itself stores with S last.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from psa_jax.kernels import mosaic, platform, softmax
from psa_jax.kernels.mosaic import Gather, Listed, Shape
from psa_jax.kernels.mosaic_softmax import Running
from psa_jax.kernels.tiles import Tiles

CHUNK_KEYS = 512  # keys fetched and multiplied at a time


class Stored(NamedTuple):
  """How the kernel reads the cache.

  Attributes:
    in_place: as [B, S, K, *], head by head; else as [B * K * nk, keys, *].
    paired: two heads at a time, as halves of 32-bit numbers.
  """

  in_place: bool
  paired: bool

  @classmethod
  def of(cls, spec, shape: Shape, dtype) -> 'Stored':
    """What these sizes allow."""
    tiles, paired = shape.tiles, dtype == jnp.bfloat16
    in_place = (
      not spec.heads_first
      and shape.H % mosaic.LANES == 0
      and shape.Hv % mosaic.LANES == 0
      and shape.keys == tiles.block_k <= tiles.S
      and not (paired and tiles.K % 2)
    )
    return cls(in_place, in_place and paired)

  def arrays(self, shape: Shape, k, v):
    """What the kernel is given."""
    if self.in_place:
      return k, v
    return tuple(_pad(shape.tiles.pack_k(x), shape.keys) for x in (k, v))

  def buffer(self, shape: Shape, chunk: int, x):
    """Two chunks of such an array in VMEM."""
    dtype = jnp.int32 if self.paired else x.dtype
    return pltpu.VMEM((2, chunk, shape.keys, x.shape[-1]), dtype)

  def gather(self, sources, buffers, sems) -> Gather:
    """Copies of blocks of these references."""
    if self.paired:
      sources = tuple(x.bitcast(jnp.int32) for x in sources)
    some = (0, pl.ds(0, buffers[0].shape[2]), 0) if self.in_place else 0
    return Gather(sources, buffers, sems, some)

  def row(self, shape: Shape, b, h, block) -> Any:
    """Where a block lies in them."""
    tiles = shape.tiles
    if not self.in_place:
      return (b * tiles.K + h) * tiles.nk + block
    begin = jnp.minimum(block * tiles.block_k, tiles.S - tiles.block_k)
    return b, pl.ds(begin, tiles.block_k), h // 2 if self.paired else h

  def load(self, buffer, half, h, dtype):
    """[keys, *] of a half of a buffer, of head h."""
    x = buffer[half].reshape(-1, buffer.shape[-1])
    if not self.paired:
      return x
    high = jnp.where(h % 2 == 1, x, x << 16) & jnp.int32(-(2**16))
    return lax.bitcast_convert_type(high, jnp.float32).astype(dtype)


def refusal(
  where, q, k, v, ids, counts, lengths, starts, *, spec
) -> str | None:
  """Why these arguments cannot run on the target; None if they can."""
  reason = mosaic.refusal(where, q, k, v)
  if reason:
    return reason
  shape = Shape.of(Tiles.of(q, k, q.shape[1], spec.block_k), q, v)
  keys = shape.keys * mosaic.chunk_of(shape.keys, CHUNK_KEYS, ids.shape[-1])
  width = shape.q_width + shape.v_width
  row = 24 * keys + 4 * (3 * width + 2 * mosaic.LANES)
  item = 4 if Stored.of(spec, shape, k.dtype).paired else q.dtype.itemsize
  return mosaic.too_large(shape.rows * row + 2 * keys * width * item)


def decode_attention(q, k, v, ids, counts, lengths, starts, *, spec):
  """See `api.decode_attention`."""
  tiles = Tiles.of(q, k, q.shape[1], spec.block_k)
  shape = Shape.of(tiles, q, v)
  chunk = mosaic.chunk_of(shape.keys, CHUNK_KEYS, ids.shape[-1])
  counts = jnp.where(lengths[:, None] > 0, counts, 0)
  listed = Listed.pack(ids, counts, tiles.nk)
  bounds = jnp.stack([lengths, starts], -1)[:, None]
  qt = _pad(tiles.pack_q(q), shape.rows)
  stored = Stored.of(spec, shape, k.dtype)
  kb, vb = stored.arrays(shape, k, v)
  heads = tiles.B * tiles.K
  results = (
    jax.ShapeDtypeStruct((heads, shape.rows, shape.Hv), v.dtype),
    jax.ShapeDtypeStruct((heads, 1, mosaic.lanes_of(shape.rows)), jnp.float32),
  )
  smem = pltpu.SMEM

  def of_head(b, h):
    return b * tiles.K + h, 0, 0

  def after(b, h):
    return b * tiles.K + jnp.minimum(h + 1, tiles.K - 1), 0, 0

  def block(x, where=of_head, space=None):
    return pl.BlockSpec((None, *x.shape[1:]), where, memory_space=space)

  anywhere = pl.BlockSpec(memory_space=pl.ANY)
  out, lse = pl.pallas_call(
    functools.partial(_kernel, spec, shape, stored),
    grid=(tiles.B, tiles.K),
    in_specs=(
      block(listed, space=smem),
      block(listed, after, smem),
      block(bounds, lambda b, h: (b, 0, 0), smem),
      block(qt),
      anywhere,
      anywhere,
    ),
    out_specs=tuple(map(block, results)),
    out_shape=results,
    scratch_shapes=(
      stored.buffer(shape, chunk, kb),
      stored.buffer(shape, chunk, vb),
      pltpu.SemaphoreType.DMA((2,)),
      pltpu.SMEM((1,), jnp.int32),
      *Running.scratch(shape.rows, shape.Hv),
    ),
    cost_estimate=_cost(shape, stored, ids.shape[-1], qt, results),
    compiler_params=mosaic.compiler_params(),
    interpret=platform.current().interpret,
    name='decode',
  )(listed, listed, bounds, qt, kb, vb)
  return (
    tiles.unpack_q(out[:, : tiles.rows]),
    tiles.unpack_q(lse[:, 0, : tiles.rows]),
  )


def _pad(x, rows):
  """[n, r, H] -> [n, rows, H]."""
  return jnp.pad(x, [(0, 0), (0, rows - x.shape[1]), (0, 0)])


def _cost(shape, stored, M, q, results):
  """From full lists: counts are not known when compiling."""
  heads, width = len(q), shape.H + shape.Hv
  keys = heads * M * shape.keys
  once = sum(x.size * jnp.dtype(x.dtype).itemsize for x in (q, *results))
  return pl.CostEstimate(
    flops=2 * keys * shape.tiles.rows * width,
    transcendentals=keys * shape.tiles.rows,
    bytes_accessed=keys * width * (4 if stored.paired else q.dtype.itemsize)
    + once,
  )


def _kernel(
  spec,
  shape,
  stored,
  listed,
  following,
  bounds,
  q,
  kb,
  vb,
  out,
  lse,
  k_buffer,
  v_buffer,
  sems,
  parity,
  *running,
):
  b, h = pl.program_id(0), pl.program_id(1)
  tiles, chunk = shape.tiles, k_buffer.shape[1]
  listed, following = Listed(listed), Listed(following)
  gather = stored.gather((kb, vb), (k_buffer, v_buffer), sems)
  run = Running(*running)
  run.start()

  @pl.when(h == 0)
  def _():
    # What the last chunk of a list leaves unwritten has a probability of 0;
    # with a number there, not whatever memory held, the product is 0 too.
    v_buffer[...] = jnp.zeros_like(v_buffer)

  def start(listed, c, half, h):
    gather.start(
      half,
      lambda n: (stored.row(shape, b, h, listed.block(c * chunk + n)),) * 2,
      listed.blocks_in(c, chunk),
    )

  def start_next(half):
    @pl.when((h + 1 < tiles.K) & (following.count > 0))
    def _():
      start(following, 0, half, h + 1)

  def add(c, half):
    k = stored.load(k_buffer, half, h, kb.dtype)
    v = stored.load(v_buffer, half, h, vb.dtype)
    s = mosaic.dot(q[...], k, (1, 1)) * (spec.scale * mosaic.LOG2_E)
    position = listed.positions(c, chunk, shape, clamped=stored.in_place)
    mask = _mask(spec, shape, bounds, position)
    whole = jnp.min(jnp.where(mask, 1, 0)) > 0

    @pl.when(whole)
    def _():
      run.add(slice(None), s, v)

    @pl.when(~whole)
    def _():
      # The rest of the room may hold anything, NaN too; see `unread.py`.
      values, bad = _fit(v, shape.rows)
      masked = jnp.where(mask & ~bad, s, softmax.MASKED)
      run.add(slice(None), jnp.where(mask & bad, jnp.nan, masked), values)

  mosaic.pipeline(
    parity,
    h == 0,
    listed.trips(chunk),
    lambda c, half: start(listed, c, half, h),
    start_next,
    lambda c, half: gather.wait(half, listed.blocks_in(c, chunk)),
    add,
  )
  run.finish(out, lse)


def _fit(v, rows):
  """Values that are finite, and [rows, keys] bool of those that were not."""
  wide = v.astype(jnp.float32)
  finite = wide - wide == 0
  # How many channels are not, in the lanes of the scores.
  ones = jnp.ones((rows, v.shape[1]), v.dtype)
  bad = mosaic.dot(ones, jnp.where(finite, 0, 1).astype(v.dtype), (1, 1))
  return jnp.where(finite, wide, 0).astype(v.dtype), bad > 0


def _mask(spec, shape, bounds, position):
  """[rows, keys] bool: which query reads which key."""
  T = shape.tiles.T
  length, start = bounds[0, 0], bounds[0, 1]
  row = lax.broadcasted_iota(jnp.int32, (shape.rows, 1), 0)
  t = length - T + (lax.rem(row, T) if T > 1 else 0 * row)
  mask = (position <= t) & (position >= start)
  if spec.window is not None:
    mask = mask & (position > t - spec.window)
  return mask
