"""Small pieces of the GPU kernels, in the Pallas Mosaic GPU language.

A kernel here is one block of threads: a few warpgroups that compute and, as
the last one, a warpgroup that copies tiles from global into shared memory.
They meet at barriers, two for each of the `stages` buffers: `full` when a
tile has come, `free` when nobody reads it any more. Products are in `wgmma.py`
and `tcgen05.py`.

The simulator of JAX 0.10 that runs these kernels on a CPU knows the copies,
barriers, loops and the arithmetic of arrays, but no layouts of registers; they
are left out there.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from psa_jax.kernels import nvidia, platform

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


def in_layout(x: jax.Array, cores: nvidia.Cores, axis: int | None = None):
  """A constant as a tile of sums, or as a vector along `axis` of one."""
  if not cores.hardware:
    return x
  return plgpu.layout_cast(x, _layout(cores, axis))


def load_vector(ref, cores: nvidia.Cores, axis: int) -> jax.Array:
  """A vector along `axis` of a tile, from shared memory."""
  return in_layout(ref[...], cores, axis)


def spread(x, shape: tuple[int, int], axis: int, cores: nvidia.Cores):
  """Repeats a vector along the other axis of a tile."""
  # Vectors along columns look alike for both layouts, so it is named.
  return in_layout(lax.broadcast_in_dim(x, shape, [axis]), cores)


def _layout(cores: nvidia.Cores, axis: int | None):
  """How the registers of a warpgroup hold a product's sums."""
  narrow = cores.rows == nvidia.ROWS
  tile = plgpu.Layout.WGMMA if narrow else plgpu.Layout.TCGEN05
  # A vector's layout is named for the axis that it lacks.
  return tile if axis is None else tile.reduce(1 - axis)


def positions(shape: tuple[int, int], axis: int, cores: nvidia.Cores):
  """0, 1, 2 ... along `axis` of a tile."""
  return in_layout(lax.broadcasted_iota(jnp.int32, shape, axis), cores)


class Sizes(NamedTuple):
  """What a computing warpgroup multiplies.

  Attributes:
    cores: that multiply.
    columns: of the scores, and of the left operand made from them.
    sums: columns by name.
    dtype: of operands.
    elements: of a swizzled row; see `tile_memory`.
    ahead: whether scores may be begun while other products are made.
  """

  cores: nvidia.Cores
  columns: int
  sums: dict[str, int]
  dtype: jnp.dtype
  elements: int
  ahead: bool = False


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
