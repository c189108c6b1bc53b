"""Small pieces of Hopper kernels, in the Pallas Mosaic GPU language.

A kernel here is one block of threads: a few warpgroups that compute and, as
the last one, a warpgroup that copies tiles from global into shared memory.
They meet at barriers, two for each of the `stages` buffers: `full` when a
tile has come, `free` when nobody reads it any more.

The simulator of JAX 0.10 that runs these kernels on a CPU knows the copies,
barriers, loops and the arithmetic of arrays, but not a product whose operand
is transposed or in registers, nor layouts of registers. So `product`, `rows`
and `spread` have a second form for it; everything else in the kernels is
executed as it stands. The second form of `product` reads its operands like
any load, which the simulator checks for races; its own product is not
checked. `hardware` below means: not in the simulator.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from psa_jax.kernels import platform

AXIS, BLOCK = 'warpgroup', 'block'
# Registers a thread of a computing warpgroup may have, and of the copying one,
# when two compute: 128 * (2 * 232 + 40) of the 65536 of a multiprocessor.
COMPUTE_REGISTERS, COPY_REGISTERS = 232, 40


def launch(
  body: Callable[..., None],
  out_type: Sequence[jax.ShapeDtypeStruct],
  *,
  blocks: int,
  computing: int,
  name: str,
  cost: pl.CostEstimate,
) -> Callable[..., Sequence[jax.Array]]:
  """The kernel `body` on `blocks` blocks of `computing` + 1 warpgroups."""
  return pl.kernel(
    body,
    out_type=tuple(out_type),
    mesh=plgpu.Mesh(
      grid=(blocks,),
      grid_names=(BLOCK,),
      num_threads=computing + 1,
      thread_name=AXIS,
    ),
    compiler_params=plgpu.CompilerParams(
      approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
    ),
    interpret=platform.current().interpret,
    cost_estimate=cost,
    name=name,
  )


def scoped(body: Callable[..., None], *scratch: Any) -> None:
  """Runs `body` with shared memory and barriers of the whole block."""
  pl.run_scoped(body, *scratch, collective_axes=AXIS)


def tile_memory(shape: tuple[int, ...], dtype, elements: int):
  """Shared memory in the layout that products read.

  Args:
    shape: the last two axes are the tile.
    dtype: of the elements.
    elements: of 16 bits that a swizzled row has; an f32 tile has as many
      bytes, which is half the elements.
  """
  size = jnp.dtype(dtype).itemsize
  return plgpu.SMEM(
    shape,
    dtype,
    transforms=(
      plgpu.TilingTransform((8, 2 * elements // size)),
      plgpu.SwizzleTransform(2 * elements),
    ),
  )


def spread(x: jax.Array, shape: tuple[int, int], axis: int) -> jax.Array:
  """Repeats a vector along the other axis of a tile."""
  return lax.broadcast_in_dim(x, shape, [axis])


def in_layout(x: jax.Array, hardware: bool, axis: int | None = None):
  """A constant as a tile of sums, or as a vector along `axis` of one."""
  if not hardware:
    return x
  return plgpu.layout_cast(x, _layout(axis))


def load_vector(ref, hardware: bool, axis: int) -> jax.Array:
  """A vector along `axis` of a tile, from shared memory."""
  if not hardware:
    return ref[...]
  return plgpu.layout_cast(ref[...], _layout(axis))


def _layout(axis: int | None):
  """How the registers of a warpgroup hold a product's sums."""
  tile = plgpu.Layout.WGMMA
  # A vector's layout is named for the axis that it lacks.
  return tile if axis is None else tile.reduce(1 - axis)


def positions(shape: tuple[int, int], axis: int, hardware: bool) -> jax.Array:
  """0, 1, 2 ... along `axis` of a tile."""
  return in_layout(lax.broadcasted_iota(jnp.int32, shape, axis), hardware)


def product(
  a, b, total: jax.Array | None = None, *, hardware: bool, b_transposed=False
) -> jax.Array:
  """The f32 sum total + a @ b, or a @ b.T; waits for the result.

  Args:
    a: shared memory [rows, n], or an array in registers.
    b: shared memory [n, columns], or [columns, n] if `b_transposed`.
    total: [rows, columns]; None for 0.
    hardware: False in the simulator.
    b_transposed: see `b`.
  """
  if not hardware:
    read = a if isinstance(a, jax.Array) else a[...]
    other = b[...].T if b_transposed else b[...]
    made = jnp.dot(read, other, preferred_element_type=jnp.float32)
    return made if total is None else total + made
  if b_transposed:
    b = b.transpose((1, 0))
  shape = (a.shape[0], b.shape[1])

  def fresh(sums):
    plgpu.wgmma(sums, a, b)
    return sums[...]

  def on_top(sums):
    plgpu.wgmma(sums, a, b)

  if total is None:
    return pl.run_scoped(fresh, plgpu.ACC(shape, jnp.float32))
  return pl.run_state(on_top)(plgpu.ACC.init(total))


def release(free, *, loaded: bool) -> None:
  """Says that this warpgroup reads a buffer no more.

  Args:
    free: its barrier.
    loaded: whether it was read by loads, which copies do not wait for unless
      told to; products are waited for anyway.
  """
  if loaded:
    plgpu.commit_smem()
  plgpu.barrier_arrive(free)


def copy_loop(
  count: jax.Array,
  stages: int,
  copy: Callable[[jax.Array, jax.Array], None],
  free,
) -> None:
  """The copying warpgroup: fills the buffers in turn as they become free.

  Args:
    count: tiles to copy.
    stages: buffers.
    copy: starts the copies of a tile into a buffer, given both numbers.
    free: barriers, one a buffer.
  """

  def fill(i, _):
    slot = lax.rem(i, jnp.int32(stages))

    @pl.when(i >= stages)
    def _wait():
      plgpu.barrier_wait(free.at[slot])

    copy(i, slot)
    return ()

  def drain(i, _):
    plgpu.barrier_wait(free.at[lax.rem(i, jnp.int32(stages))])
    return ()

  lax.fori_loop(jnp.int32(0), count, fill, ())
  # Every arrival is seen once, which the simulator demands.
  lax.fori_loop(lax.max(count - stages, jnp.int32(0)), count, drain, ())
