"""Block-list attention on TPU: only the listed blocks leave HBM.

One grid step is one tile of queries, the G heads of a kv head stacked as rows.
Its list comes through a small block of scalar memory (a whole array of lists
does not fit there at 64k tokens), and drives copies of several key blocks at a
time into one of two buffers, while the other one is multiplied: wide products
for the matrix unit, and traffic proportional to the counts. The softmax is the
online one of FlashAttention (Dao et al. 2022, Alg. 1); one that depends on the
row maximum takes two passes over the list. The backward pass is in
`pallas_tpu_backward.py`.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl

from psa_jax.kernels import mosaic, platform, softmax
from psa_jax.kernels.block_sparse import pallas_tpu_backward
from psa_jax.kernels.block_sparse.pallas_tpu_walk import (
  Call,
  Walk,
  coefficients,
  stats,
)
from psa_jax.kernels.mosaic_softmax import Running, Scores


def block_sparse_attention(q, k, v, ids, counts, segments, cubic, *, spec):
  """See `api.block_sparse_attention`."""
  interpret = platform.current().interpret
  return _attention(spec, interpret, q, k, v, ids, counts, segments, cubic)


def refusal(where, q, k, v, ids, counts, segments, cubic, *, spec):
  """Why these arguments cannot run on the target; None if they can."""
  del counts, cubic
  reason = mosaic.refusal(where, q, k, v)
  if reason:
    return reason
  call = Call.of(spec, q, k, v, ids, segments, where.interpret)
  need = max(call.vmem(q.dtype), pallas_tpu_backward.vmem(call, q.dtype))
  return mosaic.too_large(need)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(spec, interpret, q, k, v, ids, counts, segments, cubic):
  return _forward(spec, interpret, q, k, v, ids, counts, segments, cubic)[:2]


def _forward(spec, interpret, q, k, v, ids, counts, segments, cubic):
  """Output, log-sum-exp, and the row maximum where the softmax needs it."""
  call = Call.of(spec, q, k, v, ids, segments, interpret)
  shape = call.shape
  kv_seg = None
  if segments is not None:
    kv_seg = shape.pack_segments(*segments)[1]
  walk, walk_specs = Walk.inputs(
    call,
    ids,
    counts,
    stats(call, segments) if call.segmented else None,
    shape.pack_kv(k, v),
    kv_seg,
  )
  qt = shape.pack_q(q)
  lanes = mosaic.lanes_of(shape.rows)
  stat = jax.ShapeDtypeStruct((call.tile_count, 1, lanes), jnp.float32)
  results = (
    jax.ShapeDtypeStruct((call.tile_count, shape.rows, shape.v_width), v.dtype),
    *(stat,) * (2 if spec.softmax.needs_top else 1),
  )

  def tile(x):
    return pl.BlockSpec(
      (None, *x.shape[1:]), lambda bh, i: (bh * shape.tiles.nq + i, 0, 0)
    )

  passes = 2 if spec.softmax.needs_top else 1
  out, *known = pl.pallas_call(
    functools.partial(_kernel, call),
    grid=call.grid,
    in_specs=(*walk_specs, coefficients(cubic), tile(qt)),
    out_specs=tuple(map(tile, results)),
    out_shape=results,
    scratch_shapes=(
      *Walk.scratch(call, k.dtype),
      *Running.scratch(shape.rows, shape.v_width),
    ),
    cost_estimate=call.cost(
      passes * shape.H + shape.Hv,
      passes * call.gathered_keys(k.dtype),
      (qt, *results),
    ),
    compiler_params=mosaic.compiler_params(),
    interpret=interpret,
    name='block_sparse_forward',
  )(*walk, cubic, qt)
  known = [shape.unpack_stat(x) for x in known]
  return shape.unpack_out(out), known[0], known[1] if passes == 2 else None


def _kernel(call, listed, following, known, kv, kv_seg, cubic, q, out, *rest):
  kind = call.spec.softmax
  stats_out = 2 if kind.needs_top else 1
  results, (*scratch, acc, top, total) = rest[:stats_out], rest[stats_out:]
  walk = Walk(listed, following, known, kv, kv_seg, *scratch)
  run = Running(acc, top, total)
  form = Scores.of(call.spec, cubic)
  run.start()

  def scores(rows, k, mask):
    s = form.taken(form.raw(mosaic.dot(q[rows], k, (1, 1))))
    return s if mask is None else jnp.where(mask, s, softmax.MASKED)

  def highest(rows, k, v, mask):
    del v
    run.raise_top(rows, scores(rows, k, mask))

  def add(rows, k, v, mask):
    s = scores(rows, k, mask)
    if kind.needs_top:
      run.add_below(rows, s, v, kind)
    else:
      run.add(rows, s, v)

  walk.run(call, *(highest, add) if kind.needs_top else (add,))
  run.finish(out, *results, unit=form.unit)


def _forward_rule(spec, interpret, q, k, v, ids, counts, segments, cubic):
  out, lse, top = _forward(
    spec, interpret, q, k, v, ids, counts, segments, cubic
  )
  # Named so that a rematerialisation policy can keep them.
  out = checkpoint_name(out, 'attn_out')
  lse = checkpoint_name(lse, 'attn_lse')
  if top is not None:
    top = checkpoint_name(top, 'attn_lse')
  return (out, lse), (q, k, v, ids, counts, segments, cubic, out, lse, top)


_attention.defvjp(_forward_rule, pallas_tpu_backward.backward)
