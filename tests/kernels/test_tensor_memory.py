"""The simulator of tensor memory: right sums, and every forgotten wait."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from psa_jax.kernels import platform
from psa_jax.kernels import warpgroups as wg
from tests.kernels import gpu_simulator

pytestmark = pytest.mark.tier('ci')

ROWS, N = 128, 16
STEPS = ('commit_smem', 'barrier_wait', 'wait_load', 'commit_tmem')


def product(a, b, leave_out=None):
  """2 * a.T + a.T @ b.T by way of tensor memory, with a step left out."""

  def step(name, function, *args):
    if name != leave_out:
      function(*args)

  def body(a_ref, b_ref, out_ref):
    def scoped(a, b, out, total, left, ready, done):
      plgpu.copy_gmem_to_smem(a_ref, a, ready)
      plgpu.copy_gmem_to_smem(b_ref, b, ready)
      plgpu.barrier_wait(ready)
      a[...] = a[...] * 2
      step('commit_smem', plgpu.commit_smem)
      half = total.at[:, pl.ds(N, N)]
      b = b.transpose((1, 0))
      plgpu.tcgen05_mma(half, a, b, done, accumulate=False)
      step('barrier_wait', plgpu.barrier_wait, done)
      sums = plgpu.async_load_tmem(half)
      step('wait_load', plgpu.wait_load_tmem)
      plgpu.async_store_tmem(half, sums * 0.5 + 1.0)
      plgpu.async_store_tmem(left, a[...] * 1.5)
      step('commit_tmem', plgpu.commit_tmem)
      plgpu.tcgen05_mma(half, left, b, done, accumulate=True)
      plgpu.barrier_wait(done)
      out[...] = plgpu.async_load_tmem(half)
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(out, out_ref)

    wg.scoped(
      scoped,
      plgpu.SMEM((ROWS, N), jnp.bfloat16),
      plgpu.SMEM((N, N), jnp.bfloat16),
      plgpu.SMEM((ROWS, N), jnp.float32),
      plgpu.TMEM((ROWS, 2 * N), jnp.float32),
      plgpu.TMEM((ROWS, N), jnp.bfloat16, packed=True),
      plgpu.Barrier(num_arrivals=2),
      plgpu.Barrier(orders_tensor_core=True),
    )

  return pl.kernel(
    body,
    out_type=jax.ShapeDtypeStruct((ROWS, N), jnp.float32),
    mesh=plgpu.Mesh(
      grid=(1,), grid_names=('block',), num_threads=1, thread_name=wg.AXIS
    ),
    interpret=platform.current().interpret,
  )(a, b)


def operands():
  rng = np.random.default_rng(0)
  return (
    jnp.asarray(rng.integers(-3, 4, size=shape), jnp.bfloat16)
    for shape in ((ROWS, N), (N, N))
  )


def test_sums_are_right():
  a, b = operands()
  with gpu_simulator.simulated(gpu_simulator.B200):
    out = product(a, b)
  a, b = (np.asarray(x, np.float64) for x in (a, b))
  np.testing.assert_array_equal(out, 1 + a @ b.T + 3 * a @ b.T)


@pytest.mark.parametrize('leave_out', STEPS)
def test_a_forgotten_wait_is_found(leave_out):
  a, b = operands()
  with pytest.raises(Exception, match='before|product|Barrier'):
    with gpu_simulator.simulated(gpu_simulator.B200):
      jax.block_until_ready(product(a, b, leave_out))
