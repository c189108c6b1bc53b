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
SEGMENT, POSITION, LSE, DELTA, TOP = range(5)


class Call(NamedTuple):
  """What is static in a call.

  Attributes:
    spec: see `api.Spec`.
    shape: padded sizes.
    M: width of the lists.
    segmented: whether there are segment ids.
    dtype: of queries, keys and values.
    interpret: see `platform.Target`.
  """

  spec: Any
  shape: Shape
  M: int
  segmented: bool
  dtype: Any
  interpret: Any

  @classmethod
  def of(cls, spec, q, k, v, ids, segments, interpret) -> 'Call':
    """The static part of a call with these arrays."""
    tiles = Tiles.of(q, k, spec.block_q, spec.block_k)
    shape = Shape.of(tiles, q, v)
    cut = segments is not None
    return cls(spec, shape, ids.shape[-1], cut, k.dtype, interpret)

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

  @property
  def together(self):
    """Pieces a step of their loop.

    Two take 2 to 4 % fewer bundles than one after the other, and twice the
    code, with twice the spills in it. In bf16 there are two branches of it.
    """
    once = self.dtype != jnp.float32 or self.shape.rows % (2 * self.piece)
    return 1 if once else 2

  def cost(self, widths: int, traffic: int, inputs) -> pl.CostEstimate:
    """An estimate from full lists: counts are not known when compiling.

    Args:
      widths: sum of the widths of the products of queries and keys.
      traffic: bytes that are gathered.
      inputs: arrays that are read or written once.
    """
    pairs = self.tile_count * self.shape.tiles.rows * self.M * self.spec.block_k
    once = sum(x.size * jnp.dtype(x.dtype).itemsize for x in inputs)
    return pl.CostEstimate(
      flops=2 * pairs * widths,
      transcendentals=pairs,
      bytes_accessed=traffic + once,
    )

  def gathered_keys(self, dtype) -> int:
    """Bytes of keys and values that full lists read."""
    block = self.shape.keys * self.shape.kv_width * jnp.dtype(dtype).itemsize
    return self.tile_count * self.M * block

  def vmem(self, dtype) -> int:
    """About how many bytes the kernel of dq needs, the larger of the two."""
    shape, item = self.shape, jnp.dtype(dtype).itemsize
    keys = self.chunk * shape.keys
    # Inputs and outputs twice; the sum and registers of a row's statistics.
    row = 2 * item * (2 * shape.q_width + shape.v_width)
    known = 6 if self.spec.softmax.needs_top else 5
    row += 4 * (shape.q_width + known * mosaic.LANES)
    buffers = 2 * keys * shape.kv_width * item
    return shape.rows * row + buffers + 24 * self.piece * keys

  def cuts(self, ids, counts) -> jax.Array:
    """[B, K, nq, chunks] int32: 1 where a chunk of a list needs a mask.

    It needs none where every query of the tile reads every key of the chunk.
    Rows and tokens that are padding count for nothing: nobody reads what they
    give. Segments and padded keys may cut any chunk.
    """
    tiles, block_k = self.shape.tiles, self.spec.block_k
    first = jnp.arange(tiles.nq, dtype=jnp.int32) * tiles.block_q
    first = (first + self.spec.q_offset)[None, None, :, None]
    past = self.end_of(first)
    free = jnp.arange(self.M)[None, None, None] < counts[..., None]
    free &= (ids + 1) * block_k <= past
    if self.spec.window is not None:
      last = first + (tiles.block_q - 1)
      free &= ids * block_k > last - self.spec.window
    pad = -self.M % self.chunk
    free = jnp.pad(free, [(0, 0)] * 3 + [(0, pad)])
    free = free.reshape(*free.shape[:3], -1, self.chunk).all(-1)
    return (~free).astype(jnp.int32)

  def cut_keys(self, j, least, most):
    """Whether a query of tiles `least` to `most` misses a key of block j."""
    tiles, block_k = self.shape.tiles, self.spec.block_k
    first = least * tiles.block_q + self.spec.q_offset
    cut = (j + 1) * block_k > self.end_of(first)
    if self.spec.window is not None:
      last = (most + 1) * tiles.block_q - 1 + self.spec.q_offset
      cut |= j * block_k <= last - self.spec.window
    return cut

  def end_of(self, t):
    """One past the last key that a query at position t may read."""
    S = self.shape.tiles.S
    return jnp.minimum(t + 1, S) if self.spec.causal else S

  @property
  def always_cut(self) -> bool:
    """Whether every chunk takes the mask, wherever it lies.

    In f32 the products take so long that a mask costs nothing, and a second
    branch only code.
    """
    padded = self.shape.keys != self.spec.block_k
    return self.segmented or padded or self.dtype == jnp.float32

  def positions(self, i, at) -> jax.Array:
    """[piece, 128] positions of the rows of query tile i from `at` on."""
    block_q = self.spec.block_q
    row = lax.broadcasted_iota(jnp.int32, (self.piece, mosaic.LANES), 0) + at
    power = block_q & (block_q - 1) == 0
    token = row & (block_q - 1) if power else lax.rem(row, block_q)
    return token + (i * block_q + self.spec.q_offset)

  def mask(self, position, t, same_segment):
    """Who reads whom: key positions, query positions, equality of segments."""
    mask = position <= t if self.spec.causal else position < FAR
    if self.spec.window is not None:
      mask = mask & (position > t - self.spec.window)
    return mask if same_segment is None else mask & same_segment


def stats(call: Call, segments, lse=None, delta=None, top=None) -> jax.Array:
  """[B * K * nq, 8, lanes] what the kernels know of every query.

  Args:
    call: the static part.
    segments: see `api.block_sparse_attention`, or None.
    lse: [B, T, N] f32 to the base of 2, or None.
    delta: likewise.
    top: [B, T, N] f32 row maxima, or None.
  """
  shape, tiles = call.shape, call.shape.tiles
  t = jnp.arange(tiles.T, dtype=jnp.int32) + call.spec.q_offset
  t = jnp.broadcast_to(t[None], (tiles.B, tiles.T))
  segment = jnp.zeros_like(t) if segments is None else segments[0]
  known = [_of_tokens(tiles, segment.astype(jnp.int32)), _of_tokens(tiles, t)]
  if lse is not None:
    known += [lse, delta]
  if top is not None:
    known += [top]
  # Padding reads nothing: its exp(score - inf) is 0.
  fill = [0, -1, jnp.inf, 0.0, 0.0]
  rows = [
    lax.bitcast_convert_type(shape.pack_stat(x, y), jnp.int32)
    for x, y in zip(known, fill, strict=False)
  ]
  blank = jnp.zeros_like(rows[0])
  return jnp.concatenate(rows + [blank] * (8 - len(rows)), 1)


def coefficients(cubic) -> pl.BlockSpec | None:
  """How a kernel gets the coefficients of a polynomial, where there are any."""
  return None if cubic is None else pl.BlockSpec(memory_space=pltpu.SMEM)


def _of_tokens(tiles, x):
  """[B, T] -> [B, T, N]."""
  shape = (tiles.B, tiles.T, tiles.K * tiles.G)
  return jnp.broadcast_to(x[..., None], shape)


def _fill_column(out, row):
  """Writes a reference [1, lanes] as [rows, 128] with equal lanes."""
  lanes = mosaic.LANES
  for at in range(0, out.shape[0], lanes):
    rows = min(lanes, out.shape[0] - at)
    square = jnp.broadcast_to(row[:, at : at + lanes], (lanes, lanes))
    out[at : at + rows] = jnp.transpose(square)[:rows]


class Walk(NamedTuple):
  """References of the walk; segments are None where there are none.

  Attributes:
    listed: this tile's list.
    following: the next tile's.
    stats: [8, lanes] of this tile; None if no column is wanted.
    kv: keys and values in HBM.
    kv_seg: segments of the keys in HBM.
    buffer: two chunks of `kv`.
    seg_buffer: two chunks of `kv_seg`.
    columns: rows of `stats` as [rows, 128] each, a query a row, equal lanes;
      None for those that are not wanted.
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
    lists = Listed.pack(
      ids, counts, call.shape.tiles.nk, call.cuts(ids, counts)
    )

    def this(bh, i):
      return bh * nq + i, 0, 0

    def after(bh, i):
      return bh * nq + jnp.minimum(i + 1, nq - 1), 0, 0

    block = (None, 1, lists.shape[-1])
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    specs = (
      pl.BlockSpec(block, this, memory_space=pltpu.SMEM),
      pl.BlockSpec(block, after, memory_space=pltpu.SMEM),
      None if stats is None else pl.BlockSpec((None, *stats.shape[1:]), this),
      anywhere,
      None if kv_seg is None else anywhere,
    )
    return (lists, lists, stats, kv, kv_seg), specs

  @staticmethod
  def scratch(call: Call, dtype, *known: int):
    """Shapes of the last five; `known` statistics are used, and segments."""
    shape = call.shape
    half = (2, call.chunk)
    seg = pltpu.VMEM((*half, 1, mosaic.lanes_of(shape.keys)), jnp.int32)
    known += (SEGMENT,) * call.segmented
    column = pltpu.VMEM((shape.rows, mosaic.LANES), jnp.int32)
    planes = shape.kv_width // mosaic.LANES
    return (
      pltpu.VMEM((*half, planes, shape.keys, mosaic.LANES), dtype),
      seg if call.segmented else None,
      tuple(column if n in known else None for n in range(TOP + 1)),
      pltpu.SemaphoreType.DMA((2,)),
      pltpu.SMEM((1,), jnp.int32),
    )

  def run(self, call: Call, *bodies) -> None:
    """Calls `body(rows, k, v, mask)` for every chunk and piece of rows.

    Args:
      call: the static part.
      *bodies: one for each pass over the list; `rows` is a slice; `mask` is
        [piece, keys], or None where all is read.
    """
    tiles = call.shape.tiles
    bh, i = pl.program_id(0), pl.program_id(1)
    if self.stats is not None:
      for n, column in enumerate(self.columns):
        if column is not None:
          _fill_column(column, self.stats.at[n : n + 1])
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
    trips = listed.trips(call.chunk)

    def start_again(c, half):
      for _ in bodies[1:]:
        c = jnp.where(c >= trips, c - trips, c)
      start(listed, c, half)

    def visit(c, half):
      if len(bodies) == 1:
        self._chunk(call, i, listed, c, half, bodies[0])
        return
      for n, body in enumerate(bodies):

        @pl.when((c >= n * trips) & (c < (n + 1) * trips))
        def _(n=n, body=body):
          self._chunk(call, i, listed, c - n * trips, half, body)

    def start_next(half):
      @pl.when((i + 1 < tiles.nq) & (following.count > 0))
      def _():
        start(following, 0, half)

    mosaic.pipeline(
      self.parity,
      i == 0,
      trips * len(bodies),
      start_again,
      start_next,
      lambda c, half: gather.wait(half),
      visit,
    )

  def _chunk(self, call, i, listed, c, half, body):
    if call.always_cut:
      self._masked(call, i, listed, c, half, body)
      return
    cut = listed.ref[0, call.M + c] == 1

    @pl.when(cut)
    def _():
      self._masked(call, i, listed, c, half, body)

    @pl.when(~cut)
    def _():
      self._pieces(call, half, lambda rows, k, v: body(rows, k, v, None))

  def _masked(self, call, i, listed, c, half, body):
    position = listed.positions(c, call.chunk, call.shape)
    keys = position.shape[1]
    segment = None
    if self.seg_buffer is not None:
      segment = mosaic.side_by_side(self.seg_buffer[half], call.shape.keys)

    def piece(rows, k, v):
      t = mosaic.spread(call.positions(i, rows.start), keys)
      same = None
      if segment is not None:
        same = mosaic.spread(self.columns[SEGMENT][rows], keys) == segment
      body(rows, k, v, call.mask(position, t, same))

    self._pieces(call, half, piece)

  def _pieces(self, call, half, body):
    """Calls `body(rows, k, v)`."""
    shape, together = call.shape, call.together

    def plane(n):
      return self.buffer[half, :, n].reshape(-1, mosaic.LANES)

    def piece(n, carry):
      for m in range(together):
        at = pl.multiple_of((n * together + m) * call.piece, call.piece)
        body(pl.ds(at, call.piece), *shape.split(plane))
      return carry

    steps = shape.rows // (call.piece * together)
    lax.fori_loop(0, steps, piece, 0, unroll=steps == 1)
