"""What the Hopper (sm_90a) attention kernels share that needs no kernel code.

The kernels compute with warpgroup products (wgmma): 64 rows at a time, bf16
or f16 operands, sums in f32. Here are the reasons to refuse a call, and the
arrays that the kernels read besides q, k and v. The kernel language itself
takes a second to import, so only a call that reaches a kernel imports it
(`warpgroups.py`).

Blackwell (sm_100a) has no wgmma: its products are asynchronous, accumulate in
tensor memory and are started by one thread, which is another kernel. It is
refused, like everything before Hopper.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from psa_jax.kernels.platform import Target

ROWS = 64  # rows of a warpgroup's product
WIDEST = 128  # head width: what f32 sums in registers leave room for
STEP = 16  # head widths and key blocks are multiples of this
VECTOR = 32  # int32 that are copied at once, or a multiple: 128 bytes


def refusal(where: Target, q, k, v, block_k: int) -> str | None:
  """Why attention of these arrays cannot run on `where`, or None."""
  if where.platform not in ('gpu', 'cuda'):
    return f'it is written for NVIDIA GPUs and this is {where.platform}'
  if where.capability != 90:
    return (
      f'{where.kind or "this GPU"} has compute capability '
      f'{where.capability / 10} and the kernel is written for 9.0 (Hopper: '
      'its warpgroup products exist nowhere else)'
    )
  if q.dtype not in (jnp.bfloat16, jnp.float16) or not (
    q.dtype == k.dtype == v.dtype
  ):
    return (
      f'q, k and v are {q.dtype}, {k.dtype} and {v.dtype} and its products '
      'take one of bfloat16 and float16 (float32 would be rounded to tf32): '
      'cast them'
    )
  if block_k % STEP or block_k > WIDEST:
    return (
      f'block_k={block_k} is not a multiple of {STEP} up to {WIDEST}: choose '
      'one, 64 is best'
    )
  if max(q.shape[-1], v.shape[-1]) > WIDEST:
    return (
      f'heads of width {q.shape[-1]} (values {v.shape[-1]}) do not fit its '
      f'registers: use up to {WIDEST}'
    )
  return None


def up(n: int, step: int) -> int:
  """The next multiple of `step`."""
  return -(-n // step) * step


def tile_elements(*sizes: int) -> int:
  """Widest swizzle, in 16-bit elements, that divides every size."""
  return next(n for n in (64, 32, 16) if all(size % n == 0 for size in sizes))


def warpgroups(rows: int) -> int:
  """Warpgroups that compute in a block of threads, for so many rows."""
  return 1 if rows <= ROWS else 2


def pad_axis(x: jax.Array, axis: int, size: int, value=0) -> jax.Array:
  """`x` with `axis` padded at its end up to `size`."""
  if x.shape[axis] == size:
    return x
  pad = [(0, 0)] * x.ndim
  pad[axis % x.ndim] = (0, size - x.shape[axis])
  return jnp.pad(x, pad, constant_values=value)


def pad_width(x: jax.Array) -> jax.Array:
  """The last axis padded to a width that products and copies take."""
  return pad_axis(x, -1, up(x.shape[-1], STEP))


class Rows(NamedTuple):
  """What the rows of the query tiles may read; all int32 [tiles, rows].

  A row reads keys at positions `low` to `high`, both included. A row of
  padding has `high` = -1.

  Attributes:
    high: last key.
    low: first key; None where it is 0 for all.
    segment: segment id; None where there are none.
  """

  high: jax.Array
  low: jax.Array | None
  segment: jax.Array | None
