"""Gradients of block-list attention on TPU, without atomic additions.

Two kernels recompute the probabilities from the log-sum-exp. That of dq walks
the list of every query tile, as the forward pass does. That of dk and dv takes
a key block a grid step and walks the tiles that read it (`lists.transpose`):
each sum has one owner and one order, so the result is deterministic. Its
scores are transposed, keys down and queries across, so that what is known of a
query is a row and no product needs a transposed left side.

The transposed lists have no fixed width. They are one stream a head, read
from front to back over the grid steps through a small ring in scalar memory.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from psa_jax.kernels import mosaic, softmax, unread
from psa_jax.kernels.block_sparse import lists
from psa_jax.kernels.block_sparse.pallas_tpu_walk import (
  DELTA,
  LSE,
  POSITION,
  SEGMENT,
  TOP,
  Call,
  Walk,
  coefficients,
  stats,
)
from psa_jax.kernels.mosaic import FAR, LOG2_E, Gather
from psa_jax.kernels.mosaic_softmax import Scores

CHUNK_ROWS = 1024  # query rows fetched and multiplied at a time
RING = 4  # rows of 128 entries of the stream that are kept


def backward(spec, interpret, saved, grads):
  """Gradients of the arguments of `pallas_tpu._attention`."""
  q, k, v, ids, counts, segments, cubic, out, lse, top = saved
  d_out, d_lse = grads
  q, k = unread.clean(q), unread.clean(k)
  call = Call.of(spec, q, k, v, ids, segments, interpret)
  shape = call.shape
  rows = softmax.Backward.of(out, lse, d_out, d_lse, top)
  known = stats(call, segments, rows.lse * LOG2_E, rows.delta, rows.top)
  qd = mosaic.in_planes(shape.pack_q(q), shape.pack_out(d_out))
  kv = shape.pack_kv(k, v)
  kv_seg = None
  if segments is not None:
    kv_seg = shape.pack_segments(*segments)[1]
  inputs = ids, counts, known, qd, kv, kv_seg, cubic
  dq, d_cubic = _queries(call, *inputs)
  d_kv = _keys(call, *inputs)
  if cubic is not None:
    d_cubic = d_cubic.sum((0, 2))[: len(cubic)].astype(cubic.dtype)
  return shape.unpack_q(dq), *shape.unpack_kv(d_kv), None, None, None, d_cubic


def vmem(call, dtype) -> int:
  """About how many bytes the kernel of dk and dv needs."""
  shape, item = call.shape, jnp.dtype(dtype).itemsize
  total = _chunk(call) * shape.rows
  width = shape.q_width + shape.v_width
  block = shape.keys * 4 * (shape.kv_width * item + width)
  scores = 24 * shape.keys * _piece(total)
  return block + 2 * total * (width * item + 32) + scores


def _piece(total):
  return total if total % CHUNK_ROWS else CHUNK_ROWS


def _float(x):
  return lax.bitcast_convert_type(x, jnp.float32)


def _used(call):
  """Statistics of a row that the probabilities are made of."""
  return (LSE, DELTA, TOP) if call.spec.softmax.needs_top else (LSE, DELTA)


def _queries(call, ids, counts, known, qd, kv, kv_seg, cubic):
  """[B * K * nq, rows, q_width] gradient of the queries.

  And that of a polynomial's coefficients from every tile, [B * K * nq, 8,
  128]: in the first rows, by lane; None if there are none.
  """
  shape = call.shape
  walk, walk_specs = Walk.inputs(call, ids, counts, known, kv, kv_seg)
  result = jax.ShapeDtypeStruct(
    (call.tile_count, shape.rows, shape.q_width), qd.dtype
  )
  of_cubic = None
  if cubic is not None:
    of_cubic = jax.ShapeDtypeStruct(
      (call.tile_count, 8, mosaic.LANES), jnp.float32
    )

  def tile(x):
    return pl.BlockSpec(
      (None, *x.shape[1:]),
      lambda bh, i: (bh * shape.tiles.nq + i,) + (0,) * (x.ndim - 1),
    )

  acc = pltpu.VMEM(result.shape[1:], jnp.float32)
  return pl.pallas_call(
    functools.partial(_queries_kernel, call),
    grid=call.grid,
    in_specs=(*walk_specs, coefficients(cubic), tile(qd)),
    out_specs=(tile(result), None if of_cubic is None else tile(of_cubic)),
    out_shape=(result, of_cubic),
    scratch_shapes=(*Walk.scratch(call, kv.dtype, *_used(call)), acc),
    cost_estimate=call.cost(
      2 * shape.H + shape.Hv, call.gathered_keys(kv.dtype), (qd, known, result)
    ),
    compiler_params=mosaic.compiler_params(),
    interpret=call.interpret,
    name='block_sparse_dq',
  )(*walk, cubic, qd)


def _queries_kernel(
  call,
  listed,
  following,
  known,
  kv,
  kv_seg,
  cubic,
  qd,
  dq,
  d_cubic,
  *scratch,
):
  *scratch, acc = scratch
  walk = Walk(listed, following, known, kv, kv_seg, *scratch)
  form = Scores.of(call.spec, cubic)
  at = call.shape.q_width // mosaic.LANES
  acc[...] = jnp.zeros_like(acc)
  if d_cubic is not None:
    d_cubic[...] = jnp.zeros_like(d_cubic)

  def add(rows, k, v, mask):
    def plane(n):
      return qd[n, rows]

    known = [
      mosaic.spread(_float(walk.columns[n][rows]), len(k)) for n in _used(call)
    ]
    lse, delta, *top = known
    q, d_out = mosaic.wide(plane, 0, at), mosaic.wide(plane, at, len(qd))
    s = form.raw(mosaic.dot(q, k, (1, 1)))
    _, slope = form.probabilities(s, lse, top[0] if top else None, mask)
    dp = mosaic.dot(d_out, v, (1, 1))
    ds, of_cubic = form.through(slope * (dp - delta), s)
    acc[rows] += mosaic.dot(ds.astype(k.dtype), k, (1, 0))
    if d_cubic is not None:
      d_cubic[:4] += of_cubic

  walk.run(call, add)
  dq[...] = (acc[...] * call.spec.scale).astype(dq.dtype)


def _keys(call, ids, counts, known, qd, kv, kv_seg, cubic):
  """[B * K * nk, keys, kv_width] gradient of the keys and values."""
  shape, tiles = call.shape, call.shape.tiles
  spans, stream = _readers(call, ids, counts)
  chunk = _chunk(call)

  def this(bh, j):
    return bh * tiles.nk + j, 0, 0

  def after(bh, j):
    return bh * tiles.nk + jnp.minimum(j + 1, tiles.nk - 1), 0, 0

  def segments(bh, j):
    return lax.div(bh, tiles.K) * tiles.nk + j, 0, 0

  anywhere = pl.BlockSpec(memory_space=pl.ANY)
  block = pl.BlockSpec((None, *kv.shape[1:]), lambda bh, j: (*this(bh, j), 0))
  seg_spec = None
  if kv_seg is not None:
    seg_spec = pl.BlockSpec((None, *kv_seg.shape[1:]), segments)
  traffic = call.tile_count * call.M * (qd[0].nbytes + known[0].nbytes)
  return pl.pallas_call(
    functools.partial(_keys_kernel, call, chunk),
    grid=(tiles.B * tiles.K, tiles.nk),
    in_specs=(
      pl.BlockSpec((None, 1, 2), this, memory_space=pltpu.SMEM),
      pl.BlockSpec((None, 1, 2), after, memory_space=pltpu.SMEM),
      block,
      seg_spec,
      coefficients(cubic),
      anywhere,
      anywhere,
      anywhere,
    ),
    out_specs=block,
    out_shape=jax.ShapeDtypeStruct(kv.shape, kv.dtype),
    scratch_shapes=(
      pltpu.VMEM((2, chunk, *qd.shape[1:]), qd.dtype),
      pltpu.VMEM((2, chunk, *known.shape[1:]), jnp.int32),
      pltpu.SemaphoreType.DMA((2,)),
      pltpu.SMEM((1,), jnp.int32),
      pltpu.SMEM((RING, mosaic.LANES), jnp.int32),
      pltpu.SemaphoreType.DMA,
      pltpu.SMEM((1,), jnp.int32),
      pltpu.VMEM((shape.keys, shape.q_width), jnp.float32),
      pltpu.VMEM((shape.keys, shape.v_width), jnp.float32),
    ),
    cost_estimate=call.cost(2 * (shape.H + shape.Hv), traffic, (kv, kv)),
    compiler_params=mosaic.compiler_params(),
    interpret=call.interpret,
    name='block_sparse_dkv',
  )(spans, spans, kv, kv_seg, cubic, stream, qd, known)


def _chunk(call):
  return mosaic.chunk_of(call.shape.rows, CHUNK_ROWS, call.shape.tiles.nq)


def _readers(call, ids, counts):
  """The transposed lists: [B * K * nk, 1, 2], [B * K, rows, 128]."""
  tiles = call.shape.tiles
  counts = jnp.clip(counts, 0, call.M)
  readers = lists.transpose(jnp.clip(ids, 0, tiles.nk - 1), counts, tiles.nk)
  offsets = readers.offsets
  spans = jnp.stack([offsets[..., :-1], offsets[..., 1:]], -1)
  stream = readers.tiles.reshape(tiles.B * tiles.K, -1)
  # One row more than there are entries, as the ring runs ahead by one.
  room = mosaic.round_up(stream.shape[1], mosaic.LANES) + mosaic.LANES
  stream = jnp.pad(stream, [(0, 0), (0, room - stream.shape[1])])
  return (
    spans.reshape(-1, 1, 2),
    stream.reshape(len(stream), -1, mosaic.LANES),
  )


class _Stream(NamedTuple):
  """The entries of one head, read once from front to back.

  Attributes:
    source: [rows, 128] in HBM.
    ring: [RING, 128] in SMEM.
    sem: of the one copy that is always under way.
    have: [1] the last row that has arrived.
  """

  source: Any
  ring: Any
  sem: Any
  have: Any

  def open(self):
    """Before the first step of a head."""
    self.have[0] = -1
    self._copy(0).start()

  def close(self):
    """After the last one."""
    self._copy(self.have[0] + 1).wait()

  def _copy(self, row):
    return pltpu.make_async_copy(
      self.source.at[row], self.ring.at[lax.rem(row, RING)], self.sem
    )

  def fetch(self, entry):
    """Makes an entry readable that is at most 128 behind the last one."""
    row = lax.div(entry, mosaic.LANES)

    @pl.when(row > self.have[0])
    def _():
      self._copy(row).wait()
      self._copy(row + 1).start()
      self.have[0] = row

  def __getitem__(self, entry):
    row = lax.rem(lax.div(entry, mosaic.LANES), RING)
    return self.ring[row, lax.rem(entry, mosaic.LANES)]


def _keys_kernel(
  call,
  chunk,
  span,
  after,
  kv,
  kv_seg,
  cubic,
  source,
  qd_source,
  known_source,
  d_kv,
  qd_buffer,
  known_buffer,
  sems,
  parity,
  ring,
  ring_sem,
  have,
  dk,
  dv,
):
  tiles = call.shape.tiles
  bh, j = pl.program_id(0), pl.program_id(1)
  stream = _Stream(source.at[bh], ring, ring_sem, have)
  gather = Gather((qd_source, known_source), (qd_buffer, known_buffer), sems)
  form = Scores.of(call.spec, cubic)
  dk[...] = jnp.zeros_like(dk)
  dv[...] = jnp.zeros_like(dv)

  @pl.when(j == 0)
  def _():
    stream.open()

  def start(span, c, half):
    last = span[0, 1] - 1
    first = span[0, 0] + c * chunk
    stream.fetch(jnp.minimum(first + chunk - 1, last))

    def index(n):
      tile = stream[jnp.minimum(first + n, last)]
      return (bh * tiles.nq + tile,) * 2

    gather.start(half, index)

  def start_next(half):
    @pl.when((j + 1 < tiles.nk) & (after[0, 1] > after[0, 0]))
    def _():
      start(after, 0, half)

  def cut(c):
    """Whether chunk c needs a mask; its tiles are in ascending order."""
    last = span[0, 1] - 1
    first = span[0, 0] + c * chunk
    least = stream[jnp.minimum(first, last)]
    most = stream[jnp.minimum(first + chunk - 1, last)]
    return call.cut_keys(j, least, most) | (first + chunk - 1 > last)

  count = span[0, 1] - span[0, 0]
  mosaic.pipeline(
    parity,
    j == 0,
    lax.div(count + (chunk - 1), chunk),
    lambda c, half: start(span, c, half),
    start_next,
    lambda c, half: gather.wait(half),
    lambda c, half: _add_keys(
      call, form, j, cut(c), count - c * chunk, kv, kv_seg,
      qd_buffer.at[half], known_buffer.at[half], dk, dv,
    ),
  )  # fmt: skip

  @pl.when(j == tiles.nk - 1)
  def _():
    stream.close()

  _write_keys(call, dk, dv, d_kv)


def _add_keys(call, form, j, cut, count, kv, kv_seg, qd, known, dk, dv):
  """Adds what a chunk of query tiles, `count` of them real, gives."""
  shape = call.shape

  def masked():
    key = lax.broadcasted_iota(jnp.int32, (shape.keys, 1), 0)
    position = key + j * call.spec.block_k
    there = (key < call.spec.block_k) & (position < shape.tiles.S)
    position = jnp.where(there, position, FAR)

    def mask(row):
      same = None
      if kv_seg is not None:
        segment = mosaic.column(kv_seg[...], shape.keys)
        same = segment == row[SEGMENT : SEGMENT + 1]
      return call.mask(position, row[POSITION : POSITION + 1], same)

    _add_pieces(call, form, count, kv, qd, known, dk, dv, mask)

  if call.always_cut:
    masked()
    return
  pl.when(cut)(masked)

  @pl.when(~cut)
  def _():
    _add_pieces(call, form, count, kv, qd, known, dk, dv, None)


def _add_pieces(call, form, count, kv, qd, known, dk, dv, mask):
  """Adds a chunk; `mask` gives that of a piece, and is None for none."""
  shape = call.shape
  every = mosaic.side_by_side(known[...], shape.rows)
  total = every.shape[1]
  piece = _piece(total)
  k, v = shape.split(lambda n: kv[n])
  width = shape.q_width // mosaic.LANES
  for at in range(0, total, piece):

    def plane(n, at=at):
      return qd[:, n].reshape(total, -1)[at : at + piece]

    row = every[:, at : at + piece]
    q = mosaic.wide(plane, 0, width)
    d_out = mosaic.wide(plane, width, qd.shape[1])
    s = form.raw(mosaic.dot(k, q, (1, 1)))
    lse, delta, *top = (_float(row[n : n + 1]) for n in _used(call))
    if mask is not None:
      # Tiles that are not real have a probability of 0 whatever their scores.
      lane = lax.broadcasted_iota(jnp.int32, (1, piece), 1) + at
      lse = jnp.where(lane < count * shape.rows, lse, jnp.inf)
    p, slope = form.probabilities(
      s, lse, top[0] if top else None, None if mask is None else mask(row)
    )
    dv[...] += mosaic.dot(p.astype(v.dtype), d_out, (1, 0))
    dp = mosaic.dot(v, d_out, (1, 1))
    ds, _ = form.through(slope * (dp - delta), s)
    dk[...] += mosaic.dot(ds.astype(q.dtype), q, (1, 0))


def _write_keys(call, dk, dv, d_kv):
  scaled = dk[...] * call.spec.scale
  if call.shape.shared:
    d_kv[0] = (scaled + dv[...]).astype(d_kv.dtype)
    return
  both = jnp.concatenate([scaled, dv[...]], 1).astype(d_kv.dtype)
  for n in range(d_kv.shape[0]):
    at = n * mosaic.LANES
    d_kv[n] = both[:, at : at + mosaic.LANES]
