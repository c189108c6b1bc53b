"""What the NVIDIA attention kernels share that needs no kernel code.

Two generations have tensor cores that the kernels can use. Hopper (sm_90a)
multiplies 64 rows at a time with sums in registers (`wgmma.py`). Blackwell
(sm_100a) multiplies 128 or 64 rows at a time with sums in tensor memory
(`tcgen05.py`). On both, operands are bf16 or f16 and sums f32. Here are the
reasons to refuse a call, the sizes, and the arrays that the kernels read
besides q, k and v. The kernel language itself takes a second to import, so
only a call that reaches a kernel imports it.

Refused, like everything before Hopper: Blackwell for workstations (sm_120),
which has neither kind of product, and variants that were never compiled for.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from psa_jax.kernels import platform
from psa_jax.kernels.platform import Target

HOPPER, BLACKWELL = 90, 100
ROWS = 64  # rows of a product of keys; on Hopper of every product
WIDEST = 128  # head width: what memories have room for
STEP = 16  # head widths and key blocks are multiples of this
SHARED = 227 * 1024  # bytes of shared memory
# Blocks of threads to aim at: two for each multiprocessor of an H100, of which
# a B200 has a few more.
BLOCKS = 264
VECTOR = 32  # int32 that are copied at once, or a multiple: 128 bytes


def refusal(where: Target, q, k, v, block_k: int) -> str | None:
  """Why attention of these arrays cannot run on `where`, or None."""
  if where.platform not in ('gpu', 'cuda'):
    return f'it is written for NVIDIA GPUs and this is {where.platform}'
  if where.capability not in (HOPPER, BLACKWELL):
    return (
      f'{where.kind or "this GPU"} has compute capability '
      f'{where.capability / 10} and the kernel is written for the tensor cores '
      'of 9.0 (Hopper) and 10.0 (Blackwell)'
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
      f'memory of sums: use up to {WIDEST}'
    )
  return None


class Cores(NamedTuple):
  """The tensor cores as one kernel uses them.

  Attributes:
    rows: of a product, 64 or 128.
    blackwell: whether sums are in tensor memory.
    hardware: False in the simulator, which knows no layouts of registers.
    computing: warpgroups that compute in a block of threads, 1 or 2.
  """

  rows: int
  blackwell: bool
  hardware: bool
  computing: int

  @classmethod
  def for_keys(cls) -> 'Cores':
    """For a kernel in which two warpgroups share a block of keys."""
    where = platform.current()
    blackwell = where.capability == BLACKWELL
    return cls(ROWS, blackwell, not where.interpret, 2)

  @classmethod
  def for_queries(cls, rows: int, block_k: int, q, v, most=2) -> 'Cores':
    """For a kernel in which a warpgroup owns rows of a query tile.

    Args:
      rows: of the tile.
      block_k: keys a block.
      q: queries, of which the head's width is looked at.
      v: values, likewise.
      most: warpgroups.
    """
    made = cls.for_keys()
    if made.blackwell:
      # 64 rows take as long as 128, and not all widths.
      widths = (block_k, *(up(x.shape[-1], STEP) for x in (q, v)))
      few = rows <= ROWS and all(n % (2 * STEP) == 0 for n in widths)
      made = made._replace(rows=ROWS if few else 2 * ROWS)
      # Neither kind of memory has room for two with large blocks.
      most = most if block_k <= 64 else 1
    return made._replace(computing=min(most, -(-rows // made.rows)))

  def for_gradient(self, block_k: int) -> 'Cores':
    """For twice as many scores in registers."""
    if self.blackwell and block_k > 64 and block_k % (2 * STEP) == 0:
      return self._replace(rows=ROWS)
    return self

  @property
  def gradient_step(self) -> int:
    """Head widths of gradients are a multiple of it."""
    return 2 * STEP if self.blackwell else STEP

  @property
  def folded(self) -> bool:
    """Whether 64 rows are folded into 128 lanes of tensor memory."""
    return self.blackwell and self.rows == ROWS

  def elements(self, *widths: int) -> int:
    """Widest swizzle, in 16-bit elements, that suits all of these columns."""
    # Blackwell makes a product of 64 rows of two halves of the columns.
    halves = 1 + self.folded
    suits = (64, 32, 16)
    return next(n for n in suits if all(w % (n * halves) == 0 for w in widths))

  def padded(self, rows: int) -> int:
    """Rows of a query tile as the kernel takes it."""
    return up(rows, self.rows * self.computing)


def up(n: int, step: int) -> int:
  """The next multiple of `step`."""
  return -(-n // step) * step


def pad_axis(x: jax.Array, axis: int, size: int, value=0) -> jax.Array:
  """`x` with `axis` padded at its end up to `size`."""
  if x.shape[axis] == size:
    return x
  pad = [(0, 0)] * x.ndim
  pad[axis % x.ndim] = (0, size - x.shape[axis])
  return jnp.pad(x, pad, constant_values=value)


def pad_width(x: jax.Array, step: int = STEP) -> jax.Array:
  """The last axis padded to a width that products and copies take."""
  return pad_axis(x, -1, up(x.shape[-1], step))


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
