"""A finished model as two files that any run of this code can load.

`model.safetensors` holds the arrays, named by their paths (`params/layers/mlp/
w_up`), with the step and a CRC-32 of it all in its metadata; `config.json`
beside it is an ordinary configuration whose model has no norms left
(`models/folding.py`). So

  python launch.py --config=RECIPE --mode=export
  python launch.py --config=runs/NAME/export/config.json --mode=eval

judges the folded model, with any key of `eval` or `data` overridden.
"""

import dataclasses
import json
import os
import pathlib
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.flax import save_file

from psa_jax import config as config_lib
from psa_jax.config import Config, ConfigError, RunError, json_text
from psa_jax.models.folding import fold
from psa_jax.train import lock, workdir
from psa_jax.train.state import Program, TrainState

FOLDER = 'export'  # in the work directory of the run
WEIGHTS = workdir.EXPORTED
_PARTS = ('params', 'model_state')


def save(
  folder: pathlib.Path, config: Config, state: TrainState
) -> tuple[Config, pathlib.Path]:
  """Folds a model and writes it.

  Args:
    folder: the run's; the files go to `export` in it.
    config: the run.
    state: its last state.

  Returns:
    The folded model's configuration, and where it lies.

  Raises:
    ConfigError: the model does not fold (see `models.folding.fold`), its
      budget is a controller's, or the folder is in use.
    RunError: a file cannot be written.
  """
  if config.train.controller.kind != 'none':
    raise ConfigError(
      'train.controller sets the budget, and its state is not exported; train '
      'with a schedule'
    )
  step = int(state.step)
  arrays = jax.device_get((state.params, state.model_state))
  folded = fold(config.model, *arrays, step=step)
  # Recalibrated statistics are folded in by now.
  evaluation = dataclasses.replace(config.eval, recalibrate_bn=0)
  config = dataclasses.replace(config, model=folded.config, eval=evaluation)
  flat = {
    f'{part}/{name}': jnp.asarray(value)
    for part, tree in zip(_PARTS, folded[1:], strict=True)
    for name, value in _flat(tree)
  }
  target = folder / FOLDER
  try:
    target.mkdir(exist_ok=True)
  except OSError as e:
    raise RunError(f'cannot make {target}: {e.strerror}') from e
  with lock.hold(target, 'export', alone=True):
    _write(target, config, flat, step)
  return config, target


def _write(
  target: pathlib.Path, config: Config, flat: dict[str, Any], step: int
) -> None:
  """Both files whole, or the old ones as they were."""
  values = json_text.sealed(config_lib.to_dict(config))
  text = json.dumps(values, indent=2) + '\n'
  try:
    weights = workdir.draft(target / WEIGHTS)
    beside = workdir.draft(target / workdir.CONFIG)
    mode = weights.stat().st_mode  # which save_file does not keep
    save_file(flat, weights, metadata=_metadata(step, flat))
    weights.chmod(mode)
    beside.write_text(text, encoding='utf-8')
    for draft in (weights, beside):
      with draft.open('rb') as f:
        os.fsync(f.fileno())
    os.replace(weights, target / WEIGHTS)
    os.replace(beside, target / workdir.CONFIG)
  except (OSError, SafetensorError) as e:
    workdir.remove_drafts(target)
    raise RunError(f'cannot write {target / WEIGHTS}: {e}') from e


def load(folder: pathlib.Path, program: Program) -> TrainState:
  """The state of an exported model, without an optimiser's part.

  Raises:
    RunError: the file cannot be read.
    ConfigError: it is of another model.
  """
  try:
    with safe_open(folder / WEIGHTS, framework='np') as f:
      metadata = f.metadata() or {}
      tensors = {name: f.get_tensor(name) for name in f.keys()}
    step = int(metadata['step'])
    if metadata != _metadata(step, tensors):
      raise ValueError('it was altered')
  except (OSError, SafetensorError, KeyError, ValueError) as e:
    raise RunError(
      f'cannot read {folder / WEIGHTS}: {e}; export the model again'
    ) from e

  def take(part):
    def one(path, like):
      name = '/'.join([part, *(entry.key for entry in path)])
      value = tensors.pop(name, None)
      want = f'{like.dtype}{list(like.shape)}'
      had = 'none' if value is None else f'{value.dtype}{list(value.shape)}'
      if want != had:
        raise ConfigError(
          f'{folder / WEIGHTS} is of another model: {name} is {want}, the '
          f'file has {had}'
        )
      return jax.device_put(value, like.sharding)

    return jax.tree.map_with_path(one, getattr(program.abstract, part))

  params, model_state = (take(part) for part in _PARTS)
  if tensors:
    raise ConfigError(
      f'{folder / WEIGHTS} is of another model: it also holds {min(tensors)}'
    )
  where = program.shardings.step
  step, fault = (jax.device_put(np.int32(x), where) for x in (step, 0))
  return TrainState(step, params, model_state, (), fault)


def _metadata(step: int, arrays: Mapping[str, Any]) -> dict[str, str]:
  """The step, and a checksum of it and of every array's name and content.

  Raises:
    ValueError: no run has that step.
  """
  if not 0 <= step < 2**31:
    raise ValueError(f'its step is {step}')
  check = zlib.crc32(str(step).encode())
  for name, value in sorted(arrays.items()):
    array = np.asarray(value)
    head = f'{name} {array.dtype} {array.shape}'
    check = zlib.crc32(head.encode(), check)
    check = zlib.crc32(array.tobytes(), check)
  return {'step': str(step), 'crc32': f'{check:08x}'}


def _flat(tree: dict[str, Any], before: str = ''):
  """(path, array) of nested dicts."""
  for key, value in tree.items():
    if isinstance(value, dict):
      yield from _flat(value, f'{before}{key}/')
    else:
      yield before + key, value
