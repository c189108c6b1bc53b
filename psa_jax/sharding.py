"""The device mesh, and which axis of which array lives on which part of it.

Three mesh axes, outermost first:

  data    copies of the model, each with its own rows of the batch
  fsdp    rows of the batch too, but parameters and optimiser state are split
          here (ZeRO-3: XLA gathers a layer's weights where it needs them)
  tensor  heads, MLP channels and vocabulary are split here

`PARAMETERS` names the axes of every array that a model may hold; `RULES` says
which mesh axis such a name takes. A mesh axis that does not divide a dimension
leaves that dimension whole. Arrays are global and every axis is `Auto`, so a
poor rule can only cost time, never change a result.

Not done: context parallelism (the sequence is never split) and pipelines.
"""

import math
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from psa_jax.config import ConfigError, MeshConfig, RunError
from psa_jax.config.errors import cut

# Of a run of several processes; JAX names them.
_ADDRESS = 'JAX_COORDINATOR_ADDRESS'
_COUNT = 'JAX_NUM_PROCESSES'
_INDEX = 'JAX_PROCESS_ID'

AXES = ('data', 'fsdp', 'tensor')
BATCH_AXES = ('data', 'fsdp')

# Logical axis -> mesh axis. What is not named here is never split.
RULES: Mapping[str, str] = {
  'embed': 'fsdp',
  'heads': 'tensor',
  'kv': 'tensor',
  'mlp': 'tensor',
  'vocab': 'tensor',
}

# Last name of an array's path -> names of its axes. A stack of layers has one
# axis more, in front. Two names or more make a matrix, which the optimiser
# decays; a stacked vector has two axes but one name. `VECTORS` are exceptions.
# Mechanisms add those of their own parameters (`name_axes`).
PARAMETERS: dict[str, tuple[str, ...]] = {
  'embedding': ('vocab', 'embed'),
  'wq': ('embed', 'heads', 'head_dim'),
  'wk': ('embed', 'kv', 'head_dim'),
  'wv': ('embed', 'kv', 'head_dim'),
  'wo': ('heads', 'head_dim', 'embed'),
  'bq': ('heads', 'head_dim'),
  'bk': ('kv', 'head_dim'),
  'bv': ('kv', 'head_dim'),
  'bo': ('embed',),
  'w_gate': ('embed', 'mlp'),
  'w_up': ('embed', 'mlp'),
  'w_down': ('mlp', 'embed'),
  'b_gate': ('mlp',),
  'b_up': ('mlp',),
  'b_down': ('embed',),
  'unembedding': ('vocab', 'embed'),
  'unembedding_bias': ('vocab',),
  'patches': ('pixels', 'embed'),
  'patches_bias': ('embed',),
  'places': ('positions', 'embed'),
  'head': ('embed', 'vocab'),
  'head_bias': ('vocab',),
  'scale': ('norm',),
  'bias': ('norm',),
  'bn_scale': ('norm',),
  'bn_bias': ('norm',),
  'mean': ('norm',),
  'var': ('norm',),
  'eta': (),
}
# Not decayed although they have two axes.
VECTORS = frozenset({'bq', 'bk', 'bv', 'places'})


def name_axes(axes: Mapping[str, tuple[str, ...]]) -> None:
  """Adds to `PARAMETERS`; `MechanismSpec.axes` come here.

  Args:
    axes: last name of an array's path -> names of its axes.

  Raises:
    ConfigError: a name that stands for other axes already.
  """
  for name, names in axes.items():
    if PARAMETERS.get(name, names) != names:
      raise ConfigError(
        f'a parameter {name!r} has the axes {PARAMETERS[name]} already, not '
        f'{names}; give it another name'
      )
  PARAMETERS.update(axes)


def initialize_distributed() -> None:
  """Joins the processes of a multi-host run, before JAX is first used.

  Does nothing unless `JAX_COORDINATOR_ADDRESS` is set. `JAX_NUM_PROCESSES` and
  `JAX_PROCESS_ID` say which process this is; without them JAX asks the
  cluster (Slurm, Cloud TPU, Open MPI).

  Raises:
    ConfigError: some of the variables are set and others are not, or they name
      no process; each would otherwise train a run of its own.
    RunError: the coordinator does not answer.
  """
  number = _process_number(os.environ)
  if number is None or jax.distributed.is_initialized():
    return
  try:
    jax.distributed.initialize(
      num_processes=number[1] if number else None,
      process_id=number[0] if number else None,
    )
  except (ValueError, RuntimeError) as e:
    raise RunError(
      f'cannot join the run of {_ADDRESS}={cut(os.environ[_ADDRESS])}: '
      f'{cut(str(e))}; outside a cluster that JAX knows set {_COUNT} and '
      f'{_INDEX} too'
    ) from e


def _process_number(
  environ: Mapping[str, str],
) -> tuple[int, int] | tuple[()] | None:
  """(index, count) of this process; () to ask the cluster, None for one."""
  words = {name: environ.get(name, '') for name in (_ADDRESS, _COUNT, _INDEX)}
  absent = [name for name, word in words.items() if not word]
  if len(absent) == 3:
    return None
  if absent == [_COUNT, _INDEX]:
    return ()
  if absent:
    there = next(name for name in words if name not in absent)
    raise ConfigError(
      f'{there} is set, but not {" and ".join(absent)}; set all of {_ADDRESS}, '
      f'{_COUNT} and {_INDEX}, or none'
    )
  try:
    index, count = int(words[_INDEX]), int(words[_COUNT])
  except ValueError:
    index, count = -1, 0
  if not 0 <= index < count:
    raise ConfigError(
      f'{_INDEX}={cut(words[_INDEX])} is not one of 0 to {_COUNT} - 1, and '
      f'{_COUNT} is {cut(words[_COUNT])}'
    )
  return index, count


def make_mesh(config: MeshConfig) -> Mesh:
  """Lays the devices out as `config` asks; -1 takes what is left.

  A mesh smaller than the machine takes the first devices, unless there are
  several processes, which all have to be in it.

  Raises:
    ConfigError: the sizes do not fit the devices there are.
  """
  devices = jax.devices()
  sizes = [config.data, config.fsdp, config.tensor]
  request = f'mesh data={sizes[0]} fsdp={sizes[1]} tensor={sizes[2]}'
  have = f'{len(devices)} device{"s" if len(devices) > 1 else ""}'
  if -1 in sizes:
    rest, over = divmod(len(devices), -math.prod(sizes))
    if over or not rest:
      raise ConfigError(f'{request}: the fixed sizes do not divide {have}')
    sizes[sizes.index(-1)] = rest
  count = math.prod(sizes)
  if count > len(devices):
    raise ConfigError(f'{request} needs {count} devices, this run has {have}')
  if count < len(devices) and jax.process_count() > 1:
    raise ConfigError(
      f'{request} uses {count} of {have}; with several processes use all '
      '(set one size to -1)'
    )
  if sizes[0] * sizes[1] % jax.process_count():
    raise ConfigError(
      f'{request}: data x fsdp must be a multiple of the {jax.process_count()} '
      'processes, which read the batch'
    )
  return jax.make_mesh(
    tuple(sizes),
    AXES,
    axis_types=(AxisType.Auto,) * len(AXES),
    devices=devices[:count],
  )


def batch_shards(mesh: Mesh) -> int:
  """Number of parts that the rows of a batch are split into."""
  return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def batch_sharding(mesh: Mesh, *, leading: int = 0) -> NamedSharding:
  """Splits axis `leading` over data and fsdp; the axes before it are whole."""
  return NamedSharding(mesh, P(*(None,) * leading, BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
  """The whole array on every device."""
  return NamedSharding(mesh, P())


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, Any]:
  """Makes global arrays of this process's rows of a batch."""
  sharding = batch_sharding(mesh)
  return {
    name: jax.make_array_from_process_local_data(sharding, rows)
    for name, rows in batch.items()
  }


def axis_names(path: Any, leaf: Any) -> tuple[str, ...]:
  """Names of the axes of one array, without the axis of a stack of layers.

  Args:
    path: key path of the array in the state of a model.
    leaf: anything with a shape.

  Raises:
    ValueError: the array is not in `PARAMETERS`, or has another rank.
  """
  names = PARAMETERS.get(_last_name(path))
  if names is None or len(leaf.shape) - len(names) not in (0, 1):
    raise ValueError(
      f'no axis names for {jax.tree_util.keystr(path)} of shape '
      f'{leaf.shape}; add it to psa_jax.sharding.PARAMETERS'
    )
  return names


def is_matrix(path: Any, leaf: Any) -> bool:
  """Whether an array is a matrix by its name; raises as `axis_names`."""
  return len(axis_names(path, leaf)) > 1 and _last_name(path) not in VECTORS


def tree_shardings(tree: Any, mesh: Mesh) -> Any:
  """A `NamedSharding` for every array of a model's state.

  Args:
    tree: arrays or `jax.ShapeDtypeStruct`s, by the names in `PARAMETERS`.
    mesh: from `make_mesh`.
  """

  def one(path, leaf):
    return NamedSharding(mesh, _spec(axis_names(path, leaf), leaf.shape, mesh))

  return jax.tree.map_with_path(one, tree)


def _spec(names, shape, mesh) -> P:
  """Mesh axes of one array; each mesh axis is used at most once."""
  spec = [None] * (len(shape) - len(names))
  for name, size in zip(names, shape[len(spec) :], strict=True):
    axis = RULES.get(name)
    if axis is None or axis in spec or size % mesh.shape[axis]:
      axis = None
    spec.append(axis)
  return P(*spec)


def _last_name(path: Any) -> Any:
  entry = path[-1] if path else None
  return getattr(entry, 'key', getattr(entry, 'name', None))
