"""A Hopper GPU for tests: as a target to lower for, and simulated on the CPU.

The simulator is the one of Pallas Mosaic GPU. It runs a block of threads after
another, compiles anew for each, and checks every access to shared memory for
races.
"""

import contextlib

import jax
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

from psa_jax.kernels import platform

H100 = dict(kind='NVIDIA H100 80GB HBM3', capability=90)


def lower(function, *args):
  """Lowers for an H100; the kernels' code is generated, not compiled."""
  with platform.target('gpu', **H100):
    traced = jax.jit(function).trace(*args)
  return traced.lower(lowering_platforms=('cuda',))


@contextlib.contextmanager
def simulated():
  """Kernels traced inside run in the simulator; fails if they race."""
  # Most of the time is spent in compiling.
  jax.config.update('jax_disable_most_optimizations', True)
  params = InterpretGPUParams(detect_races=True)
  try:
    with platform.target('gpu', **H100, interpret=params):
      yield
      jax.effects_barrier()
    assert not interpret_pallas_call.get_races().races_found
  finally:
    jax.config.update('jax_disable_most_optimizations', False)
    interpret_pallas_call.reset_gpu_interpret_mode_state()
