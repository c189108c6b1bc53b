"""Dense attention on TPU: the splash attention kernel that JAX ships.

`jax.experimental.pallas.ops.tpu.splash_attention` does the work: flash
attention whose grid leaves out the tiles above the diagonal, with kv heads
shared by groups and segment ids. Added here are what its public call lacks:
the log-sum-exp and a gradient arriving at it, a scale, lengths that are no
multiple of a tile, and zeros for a query that sees nothing.

The gradient of the log-sum-exp enters where FlashAttention's backward pass
subtracts `sum(out * d_out)` from every score's gradient. The public function
computes that sum itself, so the two backward kernels behind it are called
directly; their signatures are the same in JAX 0.10 and 0.12.

Not done: f16, which Mosaic does not multiply; TPU v2 and v3.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from psa_jax.kernels import platform, unread

LANES = 128
# Largest side of a score tile, and where that overflows VMEM: f32, wide heads.
# Compiled for v5e, 1024 needs a quarter fewer instructions a score than 512.
BLOCK, BLOCK_WIDE = 1024, 512
# No segment of the caller may have this number: it marks added keys.
ADDED = jnp.iinfo(jnp.int32).min


class Static(NamedTuple):
  """What is fixed when the kernels are built.

  Attributes:
    spec: of `api.dense_attention`.
    T: queries, without padding.
    S: keys, without padding.
    block_q: rows of a score tile.
    block_k: keys of a score tile.
    interpret: see `platform.Target`.
  """

  spec: Any
  T: int
  S: int
  block_q: int
  block_k: int
  interpret: Any


def refusal(where, q, k, v, segments, *, spec) -> str | None:
  """Why splash attention cannot run these arguments on `where`, or None."""
  del segments, spec
  if where.platform != 'tpu':
    return f'splash attention needs a TPU, not {where.platform}'
  if any(old in where.kind for old in ('v2', 'v3')):
    return f'splash attention needs TPU v4 or newer, not {where.kind}'
  dtypes = {x.dtype.name for x in (q, k, v)}
  if len(dtypes) > 1 or not dtypes <= {'float32', 'bfloat16'}:
    return f'splash attention takes float32 or bfloat16, not {sorted(dtypes)}'
  if 0 in (q.shape[1], k.shape[1]):
    return 'splash attention needs at least one query and one key'
  return None


def dense_attention(q, k, v, segments, *, spec):
  """See `api.dense_attention`."""
  T, S = q.shape[1], k.shape[1]
  narrow = q.dtype == jnp.bfloat16 and max(q.shape[-1], v.shape[-1]) <= LANES
  most = BLOCK if narrow else BLOCK_WIDE
  block_q, block_k = (min(most, -(-x // LANES) * LANES) for x in (T, S))
  interpret = platform.current().interpret
  static = Static(spec, T, S, block_q, block_k, interpret)
  # One rounding: the product is f32 and the kernel takes the scaled query.
  scaled = (q.astype(jnp.float32) * spec.scale).astype(q.dtype)
  scaled = _padded(scaled, block_q)
  k, v = _padded(k, block_k), _padded(v, block_k)
  ids = _segment_ids(static, q.shape[0], scaled.shape[2], k.shape[2], segments)
  out, lse = _attention(static, scaled, k, v, ids)
  return jnp.moveaxis(out, 2, 1)[:, :T], jnp.moveaxis(lse, 2, 1)[:, :T]


def _padded(x, block):
  """[B, T, N, H] -> [B, N, T', H] with T' a multiple of `block`."""
  pad = -x.shape[1] % block
  return jnp.moveaxis(jnp.pad(x, [(0, 0), (0, pad), (0, 0), (0, 0)]), 2, 1)


def _segment_ids(static, B, T, S, segments):
  """Segments of the padded queries [B, T] and keys [B, S]; None for none.

  Added keys that a mask by position lets through get a segment of their own.
  """
  last = static.spec.q_offset + static.T - 1
  hidden = static.spec.causal and last < static.S
  if segments is None:
    if S == static.S or hidden:
      return None
    segments = jnp.zeros((B, static.T), int), jnp.zeros((B, static.S), int)
  q_seg, kv_seg = (x.astype(jnp.int32) for x in segments)
  q_pad, kv_pad = T - static.T, S - static.S
  q_seg = jnp.pad(q_seg, ((0, 0), (0, q_pad)))
  return q_seg, jnp.pad(kv_seg, ((0, 0), (0, kv_pad)), constant_values=ADDED)


def _kernel(static, q, k):
  """The splash kernel of these shapes: its masks by tile, and its tiles.

  JAX finds out which tiles are visible by looking at each pair of positions,
  20 seconds at 64k. Here it looks at the same tiles of a small mask, see
  `_shrink`; what the kernel reads of positions is put in afterwards.
  """
  from jax.experimental.pallas.ops.tpu import splash_attention as splash

  (_, N, T, _), S = q.shape, k.shape[2]
  block_q, block_k = static.block_q, static.block_k
  offset = static.spec.q_offset
  small = _shrink(block_q, block_k, offset if static.spec.causal else 0)

  def mask(by):
    if static.spec.causal:
      return splash.CausalMask((T // by, S // by), offset=offset // by)
    return splash.FullMask((T // by, S // by))

  tiles = splash.make_splash_mha(
    splash.MultiHeadMask([mask(small)] * N),
    block_sizes=_sizes(block_q // small, block_k // small),
    head_shards=1,
    q_seq_shards=1,
  )
  infos = [
    info._replace(q_sequence=None if info.q_sequence is None else jnp.arange(T))
    for info in (tiles.fwd_mask_info, tiles.dq_mask_info, tiles.dkv_mask_info)
  ]
  by_position = tiles.kwargs['mask_function'] is not None
  settings = tiles.kwargs | dict(
    block_sizes=_sizes(block_q, block_k),
    mask_function=mask(1).mask_function if by_position else None,
    save_residuals=True,
    interpret=static.interpret,
  )
  return type(tiles)(*infos, **settings)


def _shrink(block_q, block_k, offset):
  """A factor by which positions shrink and tiles keep what they see.

  A tile of a causal mask is full, partial or empty according to where its
  corners lie. All of them stay on the same side of the diagonal if they lie
  at even positions of the small mask.
  """
  common = math.gcd(block_q, block_k, offset)
  return common // 2 if common % 2 == 0 else 1


def _sizes(block_q, block_k):
  """The same tile in the forward and in both backward kernels."""
  from jax.experimental.pallas.ops.tpu import splash_attention as splash

  return splash.BlockSizes(
    block_q=block_q,
    block_kv=block_k,
    block_q_dkv=block_q,
    block_kv_dkv=block_k,
    block_q_dq=block_q,
    block_kv_dq=block_k,
  )


def _precision(q):
  """f32 inputs are multiplied as f32, not rounded to bf16 first."""
  exact = q.dtype == jnp.float32
  return jax.default_matmul_precision('highest' if exact else 'default')


def _by_row(run, ids, *arrays):
  """`run(ids of the row, *row)` over the batch."""
  from jax.experimental.pallas.ops.tpu import splash_attention as splash

  if ids is None:
    return jax.vmap(functools.partial(run, None))(*arrays)
  return jax.vmap(run)(splash.SegmentIds(*ids), *arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static, q, k, v, ids):
  """Padded [B, N, T, H] with the scale in q -> out, lse [B, N, T]."""
  kernel = _kernel(static, q, k)

  def run(row_ids, q, k, v):
    out, (lse,) = kernel(q, k, v, row_ids)
    return out, lse

  with _precision(q):
    out, lse = _by_row(run, ids, q, k, v)
  # Where all is masked the kernel averages the values of the tiles it read.
  empty = lse < kernel.kwargs['mask_value'] / 2
  return jnp.where(empty[..., None], 0, out), jnp.where(empty, -jnp.inf, lse)


def _forward_rule(static, q, k, v, ids):
  out, lse = _attention(static, q, k, v, ids)
  out = checkpoint_name(out, 'attn_out')
  lse = checkpoint_name(lse, 'attn_lse')
  return (out, lse), (q, k, v, ids, out, lse)


def _backward_rule(static, saved, grads):
  q, k, v, ids, out, lse = saved
  d_out, d_lse = grads
  q, k = unread.clean(q), unread.clean(k)
  kernel = _kernel(static, q, k)
  idle = unread.quiet(d_out, d_lse)
  empty = (lse == -jnp.inf) | idle
  d_out = jnp.where(empty[..., None], 0, d_out)
  acc = jnp.float32
  delta = (out.astype(acc) * d_out.astype(acc)).sum(-1) - d_lse
  delta = jnp.where(empty, 0, delta)
  # A row on which nothing depends, whatever its scores: exp gives 0.
  lse = jnp.where(idle, -kernel.kwargs['mask_value'], jnp.where(empty, 0, lse))
  run = functools.partial(_gradients, static, kernel)
  with _precision(q):
    grads = _by_row(run, ids, q, k, v, lse, d_out, delta)
  # `q` is the scaled query here: the scale's own gradient rule is outside.
  return *grads, None


def _gradients(static, kernel, ids, q, k, v, lse, d_out, delta):
  """One batch row through both backward kernels."""
  from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as parts,
  )

  sizes = kernel.kwargs['block_sizes']
  args = q, k, v, ids, None, lse, d_out, delta
  common: dict[str, Any] = dict(
    is_mqa=False,
    mask_value=kernel.kwargs['mask_value'],
    attn_logits_soft_cap=None,
    q_layout=sizes.q_layout,
    k_layout=sizes.k_layout,
    v_layout=sizes.v_layout,
    mask_function=kernel.kwargs['mask_function'],
    interpret=static.interpret,
  )
  dq = parts._splash_attention_bwd_dq(
    *args,
    bq=sizes.block_q_dq,
    bkv=sizes.block_kv_dq,
    mask_info=_collapsed(kernel.dq_mask_info),
    **common,
  )
  _, dk, dv = parts._splash_attention_bwd_dkv(
    *args,
    bq=sizes.block_q_dkv,
    bkv=sizes.block_kv_dkv,
    bkv_compute=sizes.block_kv_dkv_compute,
    mask_info=_collapsed(kernel.dkv_mask_info),
    use_fused_bwd_kernel=False,
    **common,
  )
  return dq, dk, dv


def _collapsed(info):
  """Tiles of the mask in one axis, as the kernels read them."""
  tiles = info.partial_mask_blocks
  if tiles is None:
    return info
  return info._replace(partial_mask_blocks=tiles.reshape(-1, *tiles.shape[-2:]))


_attention.defvjp(_forward_rule, _backward_rule)
