"""What the TPU kernels share: padded shapes and the gather of listed blocks.

A TPU works on registers of 8 x 128 numbers. So the rows of a query tile and of
a key block are padded to a power of two of at least one register, or to a
multiple of 128; features are padded to multiples of 128 lanes.

Keys and values of a block lie one after the other in one array, so that one
copy fetches both: in planes of 128 lanes, because rows of more lanes are
interleaved in memory, and two halves of each bf16 register would have to be put
together at every load. Where keys and values fit into 128 lanes together they
share them: the queries are zero where the values are, so the products see only
the keys, and half the bytes are read.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from psa_jax.kernels.tiles import Tiles

LANES = 128
FAR = 2**30  # position of a key that must not be read
VMEM = 31 * 2**19  # bytes a kernel may count on, of 16 MiB by default


def refusal(where, q, k, v) -> str | None:
  """Why no TPU kernel takes these arrays; None if one may."""
  if where.platform != 'tpu':
    return f'it needs a TPU, not {where.platform}'
  if where.kind.lower().replace('tpu', '').strip()[:2] in ('v2', 'v3'):
    return f'{where.kind} has no product of bf16 matrices in Mosaic'
  dtypes = {str(x.dtype) for x in (q, k, v)}
  if dtypes not in ({'float32'}, {'bfloat16'}):
    return f'q, k and v must be all float32 or all bfloat16, not {dtypes}'
  return None


def too_large(need: int) -> str | None:
  """Why a kernel that needs so much fast memory is not run."""
  if need <= VMEM:
    return None
  return (
    f'tiles and blocks of this size need about {need / 2**20:.0f} MiB of VMEM, '
    f'more than {VMEM / 2**20} MiB; take a smaller block_q or block_k'
  )


def round_up(x: int, to: int) -> int:
  """The least multiple of `to` that is not below `x`."""
  return -(-x // to) * to


def padded_rows(rows: int, dtype) -> int:
  """A power of two of whole registers, or a multiple of 128."""
  least = 8 * 4 // jnp.dtype(dtype).itemsize
  if rows >= LANES:
    return round_up(rows, LANES)
  return max(least, 1 << (rows - 1).bit_length())


class Shape(NamedTuple):
  """Padded sizes of one call.

  Attributes:
    tiles: the sizes before padding.
    H: width of a query and key.
    Hv: width of a value.
    rows: padded rows of a query tile.
    keys: padded keys of a block.
  """

  tiles: Tiles
  H: int
  Hv: int
  rows: int
  keys: int

  @classmethod
  def of(cls, tiles: Tiles, q, v) -> 'Shape':
    """The padding of a call's tiles."""
    rows = padded_rows(tiles.rows, q.dtype)
    keys = padded_rows(tiles.block_k, q.dtype)
    return cls(tiles, q.shape[-1], v.shape[-1], rows, keys)

  @property
  def shared(self) -> bool:
    """Whether keys and values fit into the same 128 lanes."""
    return self.H + self.Hv <= LANES

  @property
  def q_width(self) -> int:
    """Lanes of a query."""
    return round_up(self.H, LANES)

  @property
  def v_width(self) -> int:
    """Lanes of an output."""
    return round_up(self.Hv, LANES)

  @property
  def v_lane(self) -> int:
    """First lane of the output that is not padding."""
    return self.H if self.shared else 0

  @property
  def kv_width(self) -> int:
    """Lanes of a key and its value."""
    return LANES if self.shared else self.q_width + self.v_width

  def split(self, planes):
    """Keys and values, of `planes(n)` each: [rows, 128]."""
    count = self.kv_width // LANES
    if self.shared:
      return planes(0), planes(0)
    at = self.q_width // LANES
    return wide(planes, 0, at), wide(planes, at, count)

  def pack_q(self, q):
    """[B, T, N, H] -> [B * K * nq, rows, q_width]."""
    return self._pad(self.tiles.pack_q(q), self.rows, 0, self.q_width)

  def pack_out(self, x):
    """[B, T, N, Hv] -> [B * K * nq, rows, v_width]."""
    x = self.tiles.pack_q(x)
    return self._pad(x, self.rows, self.v_lane, self.v_width)

  def pack_stat(self, x, fill):
    """[B, T, N] -> [B * K * nq, 1, lanes]; padded rows get `fill`."""
    tiles = self.tiles._replace(T=self.tiles.nq * self.tiles.block_q)
    pad = [(0, 0), (0, tiles.T - self.tiles.T), (0, 0)]
    x = tiles.pack_q(jnp.pad(x, pad, constant_values=fill))
    pad = [(0, 0), (0, self.rows - x.shape[1])]
    x = jnp.pad(x, pad, constant_values=fill)
    return jnp.pad(x, [(0, 0), (0, lanes_of(self.rows) - self.rows)])[:, None]

  def pack_segments(self, q_seg, kv_seg):
    """[B, T], [B, S] -> [B * nq, 1, lanes], [B * nk, 1, lanes]."""
    q_seg, kv_seg = self.tiles.pack_segments(q_seg, kv_seg)
    q_seg = jnp.tile(q_seg, (1, self.tiles.G))
    return tuple(
      jnp.pad(x, [(0, 0), (0, lanes_of(rows) - x.shape[1])])[:, None]
      for x, rows in ((q_seg, self.rows), (kv_seg, self.keys))
    )

  def pack_kv(self, k, v):
    """[B, S, K, *] of both -> [B * K * nk, planes, keys, 128]."""
    k, v = self.tiles.pack_k(k), self.tiles.pack_k(v)
    at = self.H if self.shared else self.q_width
    k = self._pad(k, self.keys, 0, at)
    v = self._pad(v, self.keys, 0, self.kv_width - at)
    if self.shared:
      return jnp.concatenate([k, v], -1)[:, None]
    return in_planes(k, v)

  def unpack_q(self, x):
    """The inverse of `pack_q`."""
    return self.tiles.unpack_q(x[:, : self.tiles.rows, : self.H])

  def unpack_out(self, x):
    """The inverse of `pack_out`."""
    x = x[:, : self.tiles.rows, self.v_lane :]
    return self.tiles.unpack_q(x[..., : self.Hv])

  def unpack_stat(self, x):
    """[B * K * nq, 1, rows] -> [B, T, N]."""
    return self.tiles.unpack_q(x[:, 0, : self.tiles.rows])

  def unpack_kv(self, kv):
    """The inverse of `pack_kv`."""
    kv = kv[:, :, : self.tiles.block_k]
    if self.shared:
      k, v = kv[:, 0, :, : self.H], kv[:, 0, :, self.H : self.H + self.Hv]
    else:
      at = self.q_width // LANES
      k = _in_rows(kv[:, :at])[..., : self.H]
      v = _in_rows(kv[:, at:])[..., : self.Hv]
    return self.tiles.unpack_k(k), self.tiles.unpack_k(v)

  @staticmethod
  def _pad(x, rows, lane, width):
    after = width - lane - x.shape[-1]
    return jnp.pad(x, [(0, 0), (0, rows - x.shape[1]), (lane, after)])


def in_planes(*xs) -> jax.Array:
  """[n, rows, width] each -> [n, planes, rows, 128], in one copy."""
  planes = [x.reshape(*x.shape[:2], -1, LANES).swapaxes(1, 2) for x in xs]
  return jnp.concatenate(planes, 1)


def _in_rows(x):
  """[n, planes, rows, 128] -> [n, rows, planes * 128]."""
  return x.swapaxes(1, 2).reshape(len(x), x.shape[2], -1)


def wide(planes, first: int, last: int) -> jax.Array:
  """Planes [rows, 128] of these numbers as one array [rows, width]."""
  return jnp.concatenate([planes(n) for n in range(first, last)], 1)


def compiler_params() -> pltpu.CompilerParams:
  """The first axis may go to several cores; the second runs in order.

  Lists are clipped before they are packed, so no copy can leave its array; the
  checks of it would cost most of the scalar work.
  """
  return pltpu.CompilerParams(
    dimension_semantics=('parallel', 'arbitrary'), disable_bounds_checks=True
  )


def lanes_of(rows: int) -> int:
  """Lanes that a row of one number for each of `rows` takes."""
  return round_up(rows, LANES)


def chunk_of(size: int, target: int, most: int) -> int:
  """How many items of `size` rows are gathered at a time.

  Args:
    size: padded rows of an item.
    target: rows wanted.
    most: items that there are.
  """
  whole = max(1, LANES // size)  # these fill 128 lanes
  return max(whole, min(target // size, round_up(most, whole)))


def dot(a, b, dims: tuple[int, int]) -> jax.Array:
  """Product over one dimension of each; f32 sums, exact f32 factors."""
  precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
  return lax.dot_general(
    a,
    b,
    (((dims[0],), (dims[1],)), ((), ())),
    precision=precision,
    preferred_element_type=jnp.float32,
  )


class Gather(NamedTuple):
  """Copies of blocks from HBM to one of the two halves of a buffer.

  Attributes:
    sources: arrays [blocks, *block] in HBM.
    buffers: for each, [2, chunk, *block] in VMEM.
    sems: a DMA semaphore for each half.
    some: any item's row in a source: waiting needs its size.
  """

  sources: tuple[Any, ...]
  buffers: tuple[Any, ...]
  sems: Any
  some: Any = 0

  def start(
    self, half, index: Callable[[Any], tuple[Any, ...]], items=None
  ) -> None:
    """Starts copies.

    Args:
      half: of the buffers.
      index: from an item's number to its row in every source.
      items: how many to copy; None means as many as fit.
    """

    def one(i, carry):
      for n, at in enumerate(index(i)):
        self._copy(n, at, half, i).start()
      return carry

    self._each(one, items)

  def wait(self, half, items=None) -> None:
    """Waits for the copies into a half."""

    def one(i, carry):
      for n in range(len(self.sources)):
        self._copy(n, self.some, half, i).wait()
      return carry

    self._each(one, items)

  def _copy(self, n, at, half, i):
    return pltpu.make_async_copy(
      self.sources[n].at[at], self.buffers[n].at[half, i], self.sems.at[half]
    )

  def _each(self, one, items):
    most = self.buffers[0].shape[1]
    if items is None:
      lax.fori_loop(0, most, one, 0, unroll=most <= 8)
    else:
      lax.fori_loop(0, items, one, 0)


def pipeline(parity, first, trips, start, start_next, wait, body) -> None:
  """Calls `body(c, half)` for every chunk, the next one being fetched.

  The first chunk of a grid step is fetched by the step before it, so that no
  step waits for its own; steps must run in order. A step with no chunks hands
  the half on to the next one.

  Args:
    parity: SMEM scratch [1], kept between steps.
    first: whether no step came before this one.
    trips: chunks of this step.
    start: starts the copies of chunk c into a half.
    start_next: the same for the next step's chunk 0, if it has one.
    wait: waits for chunk c in a half.
    body: reads a half.
  """

  @pl.when(first)
  def _():
    parity[0] = 0

  @pl.when(first & (trips > 0))
  def _():
    start(0, 0)

  half0 = parity[0]

  @pl.when(trips == 0)
  def _():
    start_next(half0)

  def step(c, carry):
    half = (half0 + c) % 2

    @pl.when(c + 1 < trips)
    def _():
      start(c + 1, 1 - half)

    @pl.when(c + 1 == trips)
    def _():
      start_next(1 - half)

    wait(c, half)
    body(c, half)
    return carry

  lax.fori_loop(0, trips, step, 0)
  parity[0] = (half0 + trips) % 2


def side_by_side(pieces, width: int) -> jax.Array:
  """Rows of `width` numbers, each padded with zeros to 128 lanes, in one.

  Args:
    pieces: [n, 1 or 8, lanes_of(width)] int32.
    width: a power of two below 128, or a multiple of it.

  Returns:
    [1 or 8, n * width].
  """
  n = pieces.shape[0]
  if width >= LANES:
    return jnp.concatenate([pieces[i] for i in range(n)], 1)
  share = LANES // width
  whole = []
  for at in range(0, n, share):
    row = pieces[at]
    for i in range(1, share):
      row = row + pltpu.roll(pieces[at + i], i * width, 1)
    whole.append(row)
  return jnp.concatenate(whole, 1)


class Listed(NamedTuple):
  """A tile's list of key blocks in SMEM: [1, room], the count at the end."""

  ref: Any

  @classmethod
  def pack(cls, ids, counts, blocks: int, *more) -> jax.Array:
    """[*, M], [*], what else -> [lists, 1, M + more + 1], within bounds."""
    counts = jnp.clip(counts, 0, ids.shape[-1])[..., None]
    ids = jnp.clip(ids, 0, blocks - 1)
    row = jnp.concatenate([ids, *more, counts], -1)
    return row.reshape(-1, 1, row.shape[-1])

  @property
  def count(self):
    """Blocks to read."""
    return self.ref[0, self.ref.shape[-1] - 1]

  def trips(self, chunk: int):
    """Chunks to read."""
    return lax.div(self.count + (chunk - 1), chunk)

  def blocks_in(self, c, chunk: int):
    """Blocks of chunk c."""
    return jnp.minimum(self.count - c * chunk, chunk)

  def block(self, i):
    """The i-th block; past the end the last one, which does no harm."""
    return self.ref[0, jnp.minimum(i, self.count - 1)]

  def positions(
    self, c, chunk: int, shape: Shape, *, clamped: bool = False
  ) -> jax.Array:
    """[1, chunk * keys] positions of a chunk's keys; FAR where not to read.

    If `clamped`, a partial last block was read from where it still fits.
    """
    block_k, S = shape.tiles.block_k, shape.tiles.S
    clamped = clamped and S % block_k > 0
    lane = lax.broadcasted_iota(jnp.int32, (1, chunk * shape.keys), 1)
    item, key = lax.div(lane, shape.keys), lax.rem(lane, shape.keys)
    first = jnp.full(lane.shape, FAR, jnp.int32)
    for i in range(chunk):
      at = c * chunk + i
      begin = self.block(at) * block_k
      begin = jnp.minimum(begin, S - block_k) if clamped else begin
      here = jnp.where(at < self.count, begin, FAR)
      first = jnp.where(item == i, here, first)
    position = first + key
    there = (key < block_k) & (position < S)
    if clamped:
      there &= (first < S - block_k) | (position >= S - S % block_k)
    return jnp.where(there, position, FAR)


def column(row, rows: int) -> jax.Array:
  """[1, lanes] -> [rows, 1]."""
  full = jnp.broadcast_to(row, (8, row.shape[1]))
  return jnp.transpose(full)[:rows, :1]


def row(x) -> jax.Array:
  """[rows, 128] with equal lanes -> [1, lanes_of(rows)]."""
  rows = x.shape[0]
  if rows < LANES:
    x = jnp.concatenate([x, jnp.zeros((LANES - rows, LANES), x.dtype)], 0)
  return jnp.transpose(x)[:1]


def spread(x, width: int) -> jax.Array:
  """[rows, 128] with equal lanes -> [rows, width]."""
  return jnp.concatenate([x] * -(-width // LANES), 1)[:, :width]


LOG2_E = math.log2(math.e)
