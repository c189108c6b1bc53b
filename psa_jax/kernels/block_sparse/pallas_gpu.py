"""Block-list attention on Hopper and Blackwell, by Pallas Mosaic GPU kernels.

Three kernels: forward, the gradient of the queries (a query tile against its
list) and the gradients of keys and values (a key block against the tiles that
read it, from the transposed lists). Each writes its own results once: no
atomic additions, so results repeat bit by bit.

Here the arrays are brought into the kernels' shapes. The G query heads of a kv
head are rows of one tile. Where whole tiles can be copied from [B, T, N, H]
(`gpu_rows.py`) nothing is moved; else rows are packed, and padded to a multiple
of what a block of threads takes. Head widths are padded to a multiple of 16 (of
32 for the gradients on Blackwell). Keys and values are read where they are,
unless S or a width has to be padded.

What was and was not executed: `tests/kernels/test_on_gpu.py` passed on an H100,
and `experiments/speed_gpu` has its times. On Blackwell no run has been made:
the kernels compile for sm_100a without spilled registers and run in the
simulator of Mosaic GPU kernels, which checks copies, barriers and shared memory
for races; products and tensor memory are simulated by the tests.

Inside `shard_map` they need `check_vma=False`, as `attention/attend.py` sets
it.

Not done: float32, heads wider than 128, leaving the mask out where a block lies
wholly in the past (with heads of 64 such work bounds the forward kernel). On
Blackwell, gradients of keys and values multiply 64 rows at a time, which takes
as long as 128; what else `tcgen05.py` names.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from psa_jax.kernels import nvidia, softmax, unread
from psa_jax.kernels.block_sparse.gpu_rows import QueryRows
from psa_jax.kernels.block_sparse.lists import transpose
from psa_jax.kernels.nvidia import ROWS, Cores, Rows
from psa_jax.kernels.tiles import Tiles


def refusal(where, q, k, v, ids, counts, segments, *, spec) -> str | None:
  """Why the call cannot run on `where`, or None."""
  del ids, counts, segments
  return nvidia.refusal(where, q, k, v, spec.block_k)


def block_sparse_attention(q, k, v, ids, counts, segments, *, spec):
  """See `api.block_sparse_attention`."""
  return _attention(spec, q, k, v, ids, counts, segments)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(spec, q, k, v, ids, counts, segments):
  return _forward(spec, q, k, v, ids, counts, segments)


def _forward(spec, q, k, v, ids, counts, segments):
  # Loads Mosaic GPU, which other machines never need.
  from psa_jax.kernels.block_sparse import pallas_gpu_forward as kernel

  tiles = Tiles.of(q, k, spec.block_q, spec.block_k)
  cores = Cores.for_queries(tiles.rows, spec.block_k, q, v)
  queries = QueryRows.of(tiles, cores.padded(tiles.rows), cores.rows)
  ids, counts = clip_lists(tiles, ids, counts)
  out, lse = kernel.forward(
    queries.pack(nvidia.pad_width(q)),
    pack_keys(tiles, nvidia.pad_width(k)),
    pack_keys(tiles, nvidia.pad_width(v)),
    kernel.Lists(ids.reshape(-1, ids.shape[-1]), counts.reshape(-1)),
    row_limits(tiles, cores, spec, segments),
    key_segments(tiles, segments, nvidia.VECTOR),
    queries=queries,
    scale=spec.scale,
    dtype=v.dtype,
    cores=cores,
  )
  return queries.unpack(out)[..., : v.shape[-1]], queries.unpack_always(lse)


def clip_lists(tiles: Tiles, ids, counts):
  """Lists in which every entry names a block, and counts are possible."""
  return jnp.clip(ids, 0, tiles.nk - 1), jnp.clip(counts, 0, ids.shape[-1])


def pack_keys(tiles: Tiles, x, behind: int = 0):
  """[B, S, K, H] with S up to the end of the last block, or `behind` it."""
  size = tiles.nk * tiles.block_k + behind
  return nvidia.pad_axis(x, 1, size)


def row_limits(tiles: Tiles, cores: Cores, spec, segments) -> Rows:
  """`Rows` of [B * nq, padded rows]."""
  t = jnp.arange(tiles.nq * tiles.block_q) + spec.q_offset
  high = jnp.minimum(t, tiles.S - 1) if spec.causal else tiles.S - 1
  real = jnp.arange(tiles.nq * tiles.block_q) < tiles.T
  low = None if spec.window is None else t - spec.window + 1

  def pack(x, value):
    x = jnp.broadcast_to(x.astype(jnp.int32), (tiles.B, real.shape[0]))
    x = x.reshape(-1, 1, tiles.block_q)
    x = jnp.tile(x, (1, tiles.G, 1)).reshape(-1, tiles.rows)
    return nvidia.pad_axis(x, 1, cores.padded(tiles.rows), value)

  high = pack(jnp.where(real, high, -1)[None], -1)
  low = None if low is None else pack(low[None], 0)
  segment = None
  if segments is not None:
    segment = pack(nvidia.pad_axis(segments[0], 1, real.shape[0]), 0)
  return Rows(high, low, segment)


def key_segments(tiles: Tiles, segments, multiple: int):
  """[B, S] with S up to a `multiple` behind the last block's first, or None."""
  if segments is None:
    return None
  size = (tiles.nk - 1) * tiles.block_k + nvidia.up(tiles.block_k, multiple)
  return nvidia.pad_axis(segments[1].astype(jnp.int32), 1, size)


def _forward_rule(spec, q, k, v, ids, counts, segments):
  out, lse = _forward(spec, q, k, v, ids, counts, segments)
  # Named as in `xla.py`, for the same rematerialisation policies.
  out = checkpoint_name(out, 'attn_out')
  lse = checkpoint_name(lse, 'attn_lse')
  return (out, lse), (q, k, v, ids, counts, segments, out, lse)


def _backward_rule(spec, saved, grads):
  from psa_jax.kernels.block_sparse import pallas_gpu_backward as kernel

  q, k, v, ids, counts, segments, out, lse = saved
  q, k = unread.clean(q), unread.clean(k)
  tiles = Tiles.of(q, k, spec.block_q, spec.block_k)
  ids, counts = clip_lists(tiles, ids, counts)
  step = Cores.for_keys().gradient_step
  pad = functools.partial(nvidia.pad_width, step=step)
  cores = Cores.for_queries(tiles.rows, spec.block_k, pad(q), pad(v))
  cores = cores.for_gradient(spec.block_k)
  rows = cores.padded(tiles.rows)
  queries = QueryRows.of(tiles, rows, cores.rows, ROWS)
  known = softmax.Backward.of(out, lse, *grads)
  behind = nvidia.up(spec.block_k, ROWS) - spec.block_k
  inputs = kernel.Inputs(
    queries=queries,
    q=queries.pack(pad(q)),
    d_out=queries.pack(pad(grads[0])),
    k=pack_keys(tiles, pad(k), behind),
    v=pack_keys(tiles, pad(v), behind),
    lse=queries.pack_always(known.lse),
    delta=queries.pack_always(known.delta),
    rows=row_limits(tiles, cores, spec, segments),
    kv_segment=key_segments(tiles, segments, ROWS),
  )
  dq = kernel.query_gradient(inputs, ids, counts, scale=spec.scale, cores=cores)
  readers = transpose(ids, counts, tiles.nk)
  dk, dv = kernel.key_gradients(inputs, readers, scale=spec.scale)
  dq = queries.unpack(dq)[..., : q.shape[-1]]
  dk, dv = (
    x[:, : tiles.S, :, : like.shape[-1]] for x, like in ((dk, k), (dv, v))
  )
  return dq, dk, dv, None, None, None


_attention.defvjp(_forward_rule, _backward_rule)
