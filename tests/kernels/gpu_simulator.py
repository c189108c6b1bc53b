"""GPUs for tests: as targets to lower for, and simulated on the CPU.

The simulator is the one of Pallas Mosaic GPU, with tensor memory added
(`tensor_memory.py`). It runs a block of threads after another, compiles anew
for each, and checks every access to shared memory for races.
"""

import contextlib

import jax
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

from psa_jax.kernels import platform
from tests.kernels import tensor_memory

H100 = dict(kind='NVIDIA H100 80GB HBM3', capability=90)
B200 = dict(kind='NVIDIA B200', capability=100)


def lower(machine, function, *args):
  """Lowers for a machine; the kernels' code is generated, not compiled."""
  with platform.target('gpu', **machine):
    traced = jax.jit(function).trace(*args)
  return traced.lower(lowering_platforms=('cuda',))


@contextlib.contextmanager
def simulated(machine):
  """Kernels traced inside run in the simulator; fails if they race."""
  # Most of the time is spent in compiling.
  jax.config.update('jax_disable_most_optimizations', True)
  params = InterpretGPUParams(detect_races=True)
  try:
    with tensor_memory.simulated():
      with platform.target('gpu', **machine, interpret=params):
        yield
        jax.effects_barrier()
    assert not interpret_pallas_call.get_races().races_found
  finally:
    jax.config.update('jax_disable_most_optimizations', False)
    interpret_pallas_call.reset_gpu_interpret_mode_state()
