"""Compiles the table for one machine, as `python -m experiments.aot.child`.

A process of its own, because the compilers read their settings once, when they
are loaded: `environment` has to be in force before.
"""

import contextlib
import json
import os
import pathlib
import shutil
import sys
import time

from experiments.aot import cases, measure


def environment(machine: cases.Machine, folder: pathlib.Path):
  """What the process needs in its environment from the start."""
  common = {
    'JAX_PLATFORMS': 'cpu',
    # Absent flags of the caller must not reach what is compared exactly.
    'XLA_FLAGS': '',
    'LIBTPU_INIT_ARGS': '',
    # Entries cannot be read back for a machine that is absent.
    'JAX_ENABLE_COMPILATION_CACHE': 'false',
  }
  if machine.platform == 'tpu':
    return common | {
      'TPU_SKIP_MDS_QUERY': '1',
      'TPU_ACCELERATOR_TYPE': 'v5litepod-4',
      'TPU_WORKER_HOSTNAMES': 'localhost',
      'TPU_WORKER_ID': '0',
      # Two processes may compile at once.
      'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
      'LIBTPU_INIT_ARGS': (
        f'--xla_jf_dump_to={folder / "xla"} --xla_jf_dump_llo_text=true'
      ),
    }
  tools = cuda_tools()
  return common | {
    'MOSAIC_GPU_DUMP_TO': str(folder / 'mosaic'),
    'XLA_FLAGS': (
      f'--xla_dump_to={folder / "xla"} --xla_gpu_cuda_data_dir={tools}'
    ),
    'PATH': f'{tools / "bin"}{os.pathsep}{os.environ["PATH"]}',
  }


def cuda_tools() -> pathlib.Path:
  """The CUDA folder of the nvidia wheels of this environment."""
  found = sorted(
    pathlib.Path(sys.prefix).glob('lib/*/site-packages/nvidia/cu*')
  )
  if not found:
    raise SystemExit('the nvidia wheels are missing; run `make aot`')
  return found[0]


def mesh_of(machine):
  """A mesh of one chip that is not there."""
  import jax
  import numpy as np
  from jax.experimental import topologies

  if machine.platform == 'tpu':
    topology = topologies.get_topology_desc(
      machine.topology, 'tpu', chips_per_host_bounds=(1, 1, 1)
    )
  else:
    topology = topologies.get_topology_desc(
      platform='cuda',
      target_config=machine.gpu_config,
      topology=machine.topology,
    )
  return jax.sharding.Mesh(np.array(topology.devices[:1]), ('chip',))


def compile_case(case, implementation, machine, mesh):
  """The compiled program.

  Raises:
    Exception: the implementation's refusal, or what the compiler says.
  """
  import jax
  import jax.numpy as jnp

  from psa_jax.kernels import platform

  function, args = case.build(implementation)
  where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  args = [
    jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=where)
    for shape, dtype in args
  ]
  with contextlib.ExitStack() as stack:
    stack.enter_context(
      platform.target(
        machine.platform, kind=machine.kind, capability=machine.capability
      )
    )
    stack.enter_context(jax.sharding.use_abstract_mesh(mesh.abstract_mesh))
    return jax.jit(function).trace(*args).lower().compile()


def record(compiled, machine, folder):
  """The numbers of one compiled program."""
  memory = compiled.memory_analysis()
  row = {
    'compiled': True,
    'temp_bytes': memory.temp_size_in_bytes,
    'peak_bytes': memory.peak_memory_in_bytes,
  }
  if machine.platform == 'tpu':
    hlo = compiled.as_text()
    kernels = measure.pallas_kernels(hlo)
    costs = compiled.cost_analysis() or {}
    return row | {
      'flops': int(costs.get('flops', 0)),
      'cycles': measure.cycles(hlo),
      'kernels': len(kernels),
      **measure.read_llo(folder / 'xla', kernels),
    }
  dumps = {'ours': folder / 'mosaic', 'xla': folder / 'xla'}
  tools = cuda_tools()
  return row | {
    'flops': gpu_flops(compiled),
    **measure.read_ptx(dumps, tools / 'bin' / 'ptxas', machine.arch),
  }


def gpu_flops(compiled):
  """XLA's count, which `cost_analysis` does not give for GPUs."""
  import jax
  from jax._src.lib import xla_client

  module = compiled.runtime_executable().hlo_modules()[0]
  client = jax.devices('cpu')[0].client
  costs = xla_client._xla.hlo_module_cost_analysis(client, module)
  return int(costs.get('flops', 0))


def main(name: str, folder: pathlib.Path, only: str) -> None:
  """Compiles all cases with `only` in their names for the machine `name`.

  What is in `rows.json` already is left out: a case on which the compiler ended
  the process stays there as failed, and the next process does the rest.
  """
  import jax

  # A sixth of the default's time, and estimates for every operation.
  jax.config.update('jax_optimization_level', 'O1')
  machine = cases.MACHINES[name]
  mesh = mesh_of(machine)
  path = folder / 'rows.json'
  rows = json.loads(path.read_text()) if path.exists() else {}
  for case in cases.CASES:
    for implementation in cases.tried(case, machine.platform):
      key = f'{case.name}, {implementation}'
      if only not in key or key in rows:
        continue
      rows[key] = {'compiled': False, 'reason': 'the compiler crashed'}
      path.write_text(json.dumps(rows))
      began = time.perf_counter()
      rows[key] = attempt(case, implementation, machine, mesh, folder)
      path.write_text(json.dumps(rows))
      said = rows[key].get('reason', 'compiled')
      seconds = time.perf_counter() - began
      print(f'{name}: {key}: {said} ({seconds:.0f} s)', flush=True)


def attempt(case, implementation, machine, mesh, folder):
  """The row of one case: its numbers, or why there are none."""
  for dump in ('xla', 'mosaic'):
    shutil.rmtree(folder / dump, ignore_errors=True)
    (folder / dump).mkdir()
  try:
    compiled = compile_case(case, implementation, machine, mesh)
  except Exception as error:
    return {'compiled': False, 'reason': measure.reason(error)}
  return record(compiled, machine, folder)


if __name__ == '__main__':
  main(sys.argv[1], pathlib.Path(sys.argv[2]), sys.argv[3])
