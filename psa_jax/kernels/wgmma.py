"""Products on Hopper: operands in shared memory or registers, sums in those.

The interface is `tcgen05.py`'s, so that a kernel is written once for both. A
sum is carried through the kernel's loop as an array; it needs no memory and no
barrier. A product works by itself until its sum is loaded, which waits for it:
the forward kernel does the softmax of a block during the product with the next
one's keys, and the gradients' pairs of products are started together.

The simulator of JAX 0.10 knows no product whose operand is transposed or in
registers. So `_product` has a second form for it, which reads its operands like
any load, which the simulator checks for races; its own product is not checked.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from psa_jax.kernels import warpgroups as wg


class Products(NamedTuple):
  """The products of one warpgroup; see `tcgen05.Products`."""

  sizes: wg.Sizes

  @staticmethod
  def scratch(sizes: wg.Sizes):
    """What to allocate: nothing."""
    del sizes

  @classmethod
  def of(cls, sizes: wg.Sizes, scratch, me) -> 'Products':
    """Those of warpgroup `me`."""
    del scratch, me
    return cls(sizes)

  @property
  def ahead(self) -> bool:
    """Whether to begin scores before they are needed."""
    return self.sizes.ahead

  def begin(self, condition, a, b) -> jax.Array:
    """The f32 product a @ b.T of tiles in shared memory; anything if not."""
    if self.sizes.cores.hardware:
      return self.scores(a, b)
    return jax.lax.cond(
      condition,
      lambda: self.scores(a, b),
      lambda: jnp.zeros((a.shape[0], b.shape[0]), jnp.float32),
    )

  def take(self, begun) -> jax.Array:
    """What was begun."""
    return begun

  def meanwhile(self, condition, a, b, work):
    """What `work()` returns, and a product that is made in the meantime."""
    if not self.sizes.cores.hardware:
      return work(), self.begin(condition, a, b)

    def run(sums):
      plgpu.wgmma(sums, a, b.transpose((1, 0)))
      done = work()
      return done, sums[...]

    shape = (a.shape[0], b.shape[0])
    return pl.run_scoped(run, plgpu.ACC(shape, jnp.float32))

  def scores(self, a, b) -> jax.Array:
    """The f32 product a @ b.T of tiles in shared memory."""
    return _product(a, b, None, self.sizes.cores.hardware, True)

  def both_scores(self, first, second, then):
    """`then(a @ b.T)` and the second pair's product.

    Args:
      first: a and b, tiles in shared memory.
      second: likewise.
      then: takes scores; may run before the second product has ended.
    """
    if not self.sizes.cores.hardware:
      return then(self.scores(*first)), self.scores(*second)

    def run(*sums):
      for ref, (a, b) in zip(sums, (first, second), strict=True):
        plgpu.wgmma(ref, a, b.transpose((1, 0)))
      made = then(plgpu.wgmma_accumulator_load(sums[0], wait_n=1))
      return made, sums[1][...]

    shapes = [(a.shape[0], b.shape[0]) for a, b in (first, second)]
    return pl.run_scoped(run, *(plgpu.ACC(x, jnp.float32) for x in shapes))

  def zero(self, name: str) -> jax.Array:
    """A sum of nothing."""
    cores = self.sizes.cores
    shape = (cores.rows, self.sizes.sums[name])
    return wg.in_layout(jnp.zeros(shape, jnp.float32), cores)

  def scaled(self, name: str, total, factor) -> jax.Array:
    """The sum with its rows multiplied by `factor` [rows]."""
    del name
    return total * wg.spread(factor, total.shape, 0, self.sizes.cores)

  def plus(self, name: str, total, a, b) -> jax.Array:
    """The sum and a @ b, with `a` in registers and `b` in shared memory."""
    del name
    return _product(a, b, total, self.sizes.cores.hardware, False)

  def plus_both(self, names, totals, first, second):
    """Two of `plus`, begun together."""
    if not self.sizes.cores.hardware:
      pairs = zip(names, totals, (first, second), strict=True)
      return tuple(self.plus(name, x, *ab) for name, x, ab in pairs)

    def on_top(sums):
      for ref, (a, b) in zip(sums, (first, second), strict=True):
        plgpu.wgmma(ref, a, b)

    return pl.run_state(on_top)(tuple(plgpu.ACC.init(x) for x in totals))

  def read(self, name: str, total) -> jax.Array:
    """The sum as an array."""
    del name
    return total


def _product(a, b, total, hardware: bool, b_transposed: bool) -> jax.Array:
  """The f32 sum total + a @ b, or a @ b.T; waits for the result."""
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
