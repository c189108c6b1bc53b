"""The walk of a query tile over its list, shared by two of the TPU kernels.

The forward kernel and the kernel of dq read the same things in the same
order: a grid step is a query tile, `Walk.run` brings its keys and values to
fast memory a chunk at a time.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from psa_jax.kernels import mosaic
from psa_jax.kernels.mosaic import FAR, Gather, Listed, Shape
from psa_jax.kernels.tiles import Tiles

CHUNK_KEYS = 512  # keys fetched and multiplied at a time
PIECE_ROWS = 256  # query rows that meet them at a time

# Rows of the statistics of a tile, int32 so that one copy brings them all;
# the floats among them are bit patterns.
SEGMENT, POSITION, LSE, DELTA = range(4)


class Call(NamedTuple):
  """What is static in a call.

  Attributes:
    spec: see `api.Spec`.
    shape: padded sizes.
    M: width of the lists.
    segmented: whether there are segment ids.
    interpret: see `platform.Target`.
  """

  spec: Any
  shape: Shape
  M: int
  segmented: bool
  interpret: Any

  @classmethod
  def of(cls, spec, q, k, v, ids, segments, interpret) -> 'Call':
    """The static part of a call with these arrays."""
    tiles = Tiles.of(q, k, spec.block_q, spec.block_k)
    shape = Shape.of(tiles, q, v)
    return cls(spec, shape, ids.shape[-1], segments is not None, interpret)

  @property
  def grid(self):
    """Kv heads of all batch rows, query tiles."""
    tiles = self.shape.tiles
    return tiles.B * tiles.K, tiles.nq

  @property
  def tile_count(self):
    """Query tiles of all heads."""
    return self.grid[0] * self.grid[1]

  @property
  def chunk(self):
    """Key blocks fetched at a time."""
    return mosaic.chunk_of(self.shape.keys, CHUNK_KEYS, self.M)

  @property
  def piece(self):
    """Rows multiplied at a time."""
    rows = self.shape.rows
    whole = rows <= PIECE_ROWS or rows % PIECE_ROWS
    return rows if whole else PIECE_ROWS

  def cost(self, widths: int, moved: int, inputs) -> pl.CostEstimate:
    """An estimate from full lists: counts are not known when compiling.

    Args:
      widths: sum of the widths of the products of queries and keys.
      moved: bytes that are gathered.
      inputs: arrays that are read or written once.
    """
    pairs = self.tile_count * self.shape.tiles.rows * self.M * self.spec.block_k
    once = sum(x.size * jnp.dtype(x.dtype).itemsize for x in inputs)
    return pl.CostEstimate(
      flops=2 * pairs * widths,
      transcendentals=pairs,
      bytes_accessed=moved + once,
    )

  def gathered_keys(self, dtype) -> int:
    """Bytes of keys and values that full lists read."""
    block = self.shape.keys * self.shape.kv_width * jnp.dtype(dtype).itemsize
    return self.tile_count * self.M * block

  def vmem(self, dtype) -> int:
    """About how many bytes the kernel of dq needs, the larger of the two."""
    shape, item = self.shape, jnp.dtype(dtype).itemsize
    keys = self.chunk * shape.keys
    # Inputs and outputs twice; the sum and five registers a row of statistics.
    row = 2 * item * (2 * shape.q_width + shape.v_width)
    row += 4 * (shape.q_width + 5 * mosaic.LANES)
    buffers = 2 * keys * shape.kv_width * item
    return shape.rows * row + buffers + 24 * self.piece * keys

  def mask(self, position, t, same_segment):
    """Who reads whom: key positions, query positions, equality of segments."""
    mask = position <= t if self.spec.causal else position < FAR
    if self.spec.window is not None:
      mask = mask & (position > t - self.spec.window)
    return mask if same_segment is None else mask & same_segment


def stats(call: Call, segments, lse=None, delta=None) -> jax.Array:
  """[B * K * nq, 8, lanes] what the kernels know of every query.

  Args:
    call: the static part.
    segments: see `api.block_sparse_attention`, or None.
    lse: [B, T, N] f32 to the base of 2, or None.
    delta: likewise.
  """
  shape, tiles = call.shape, call.shape.tiles
  t = jnp.arange(tiles.T, dtype=jnp.int32) + call.spec.q_offset
  t = jnp.broadcast_to(t[None], (tiles.B, tiles.T))
  segment = jnp.zeros_like(t) if segments is None else segments[0]
  known = [_of_tokens(tiles, segment.astype(jnp.int32)), _of_tokens(tiles, t)]
  if lse is not None:
    known += [lse, delta]
  # Padding reads nothing: its exp(score - inf) is 0.
  fill = [0, -1, jnp.inf, 0.0]
  rows = [
    lax.bitcast_convert_type(shape.pack_stat(x, y), jnp.int32)
    for x, y in zip(known, fill, strict=False)
  ]
  blank = jnp.zeros_like(rows[0])
  return jnp.concatenate(rows + [blank] * (8 - len(rows)), 1)


def _of_tokens(tiles, x):
  """[B, T] -> [B, T, N]."""
  shape = (tiles.B, tiles.T, tiles.K * tiles.G)
  return jnp.broadcast_to(x[..., None], shape)


class Walk(NamedTuple):
  """References of the walk; segments are None where there are none.

  Attributes:
    listed: this tile's list.
    following: the next tile's.
    stats: [1, 8, lanes] of this tile.
    kv: keys and values in HBM.
    kv_seg: segments of the keys in HBM.
    buffer: two chunks of `kv`.
    seg_buffer: two chunks of `kv_seg`.
    columns: [known, rows, 128], `stats` with a query a row, equal lanes.
    sems: one for each half of the buffers.
    parity: which half comes first.
  """

  listed: Any
  following: Any
  stats: Any
  kv: Any
  kv_seg: Any
  buffer: Any
  seg_buffer: Any
  columns: Any
  sems: Any
  parity: Any

  @staticmethod
  def inputs(call: Call, ids, counts, stats, kv, kv_seg):
    """The arrays of the first five, and their block specs."""
    nq = call.shape.tiles.nq
    lists = Listed.pack(ids, counts, call.shape.tiles.nk)

    def this(bh, i):
      return bh * nq + i, 0, 0

    def after(bh, i):
      return bh * nq + jnp.minimum(i + 1, nq - 1), 0, 0

    block = (None, 1, lists.shape[-1])
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    specs = (
      pl.BlockSpec(block, this, memory_space=pltpu.SMEM),
      pl.BlockSpec(block, after, memory_space=pltpu.SMEM),
      pl.BlockSpec((None, *stats.shape[1:]), this),
      anywhere,
      None if kv_seg is None else anywhere,
    )
    return (lists, lists, stats, kv, kv_seg), specs

  @staticmethod
  def scratch(call: Call, dtype, known: int):
    """Shapes of the last five; the first `known` statistics are used."""
    shape = call.shape
    half = (2, call.chunk)
    seg = pltpu.VMEM((*half, 1, mosaic.lanes_of(shape.keys)), jnp.int32)
    return (
      pltpu.VMEM((*half, shape.keys, shape.kv_width), dtype),
      seg if call.segmented else None,
      pltpu.VMEM((known, shape.rows, mosaic.LANES), jnp.int32),
      pltpu.SemaphoreType.DMA((2,)),
      pltpu.SMEM((1,), jnp.int32),
    )

  def run(self, call: Call, body) -> None:
    """Calls `body(at, k, v, mask)` for every chunk and piece of rows.

    Args:
      call: the static part.
      body: `at` is the piece's first row; `mask` is [piece, keys].
    """
    tiles = call.shape.tiles
    bh, i = pl.program_id(0), pl.program_id(1)
    columns = jnp.transpose(self.stats[...])[: call.shape.rows]
    for n in range(self.columns.shape[0]):
      self.columns[n] = jnp.broadcast_to(
        columns[:, n : n + 1], self.columns.shape[1:]
      )
    gather = Gather(
      (self.kv,) if self.kv_seg is None else (self.kv, self.kv_seg),
      (self.buffer,) if self.kv_seg is None else (self.buffer, self.seg_buffer),
      self.sems,
    )
    bases = (bh * tiles.nk, lax.div(bh, tiles.K) * tiles.nk)

    def start(listed, c, half):
      def index(n):
        block = listed.block(c * call.chunk + n)
        return tuple(base + block for base in bases[: len(gather.sources)])

      gather.start(half, index)

    listed, following = Listed(self.listed), Listed(self.following)

    def start_next(half):
      @pl.when((i + 1 < tiles.nq) & (following.count > 0))
      def _():
        start(following, 0, half)

    mosaic.pipeline(
      self.parity,
      i == 0,
      listed.trips(call.chunk),
      lambda c, half: start(listed, c, half),
      start_next,
      lambda c, half: gather.wait(half),
      lambda c, half: self._chunk(call, listed, c, half, body),
    )

  def _chunk(self, call, listed, c, half, body):
    shape, chunk = call.shape, call.chunk
    kv = self.buffer[half].reshape(chunk * shape.keys, shape.kv_width)
    k, v = shape.split(kv)
    position = listed.positions(c, chunk, shape)
    segment = None
    if self.seg_buffer is not None:
      segment = mosaic.side_by_side(self.seg_buffer[half], shape.keys)

    def piece(n, carry):
      at = pl.multiple_of(n * call.piece, call.piece)
      rows = pl.ds(at, call.piece)
      t = mosaic.spread(self.columns[POSITION, rows], len(k))
      same = None
      if segment is not None:
        same = mosaic.spread(self.columns[SEGMENT, rows], len(k)) == segment
      body(rows, k, v, call.mask(position, t, same))
      return carry

    pieces = shape.rows // call.piece
    lax.fori_loop(0, pieces, piece, 0, unroll=pieces <= 4)
