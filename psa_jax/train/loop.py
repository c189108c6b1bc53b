"""The one training loop: from a configuration and a folder to a result.

`train_and_evaluate` is the table of contents: open, resume, train, finish;
`run.py` holds the chapters. `evaluate_checkpoint` and `export_checkpoint` are
the other ways to use what a run saved.
"""

import contextlib
import functools
import pathlib
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from psa_jax import command_line, sharding, tasks
from psa_jax.config import Config, ConfigError, RunError
from psa_jax.tasks import Data, load_data, make_task
from psa_jax.train import console as console_lib
from psa_jax.train import export, lock, recalibrate
from psa_jax.train import result as result_lib
from psa_jax.train import run as run_lib
from psa_jax.train import stages as stages_lib
from psa_jax.train import state as state_lib
from psa_jax.train import workdir as workdir_lib
from psa_jax.train.checkpoint import Checkpoints
from psa_jax.train.evaluator import Evaluator
from psa_jax.train.interrupt import Stopped


def train_and_evaluate(
  config: Config,
  workdir: str | pathlib.Path,
  *,
  corpus: Data | None = None,
  allow_config_change: bool = False,
  resume_from: int | None = None,
) -> dict[str, Any]:
  """Trains to the end of `config.train`, or goes on where a run stopped.

  Args:
    config: the run.
    workdir: its folder; made where it does not exist.
    corpus: from `tasks.load_data`, if it is at hand already.
    allow_config_change: go on with another configuration or other data.
    resume_from: go back to the checkpoint of this step, 0 to the beginning;
      what came after it is kept under other names. None: from the newest one.

  Returns:
    The content of `result.json`; after SIGTERM or Ctrl-C the `step` that was
    saved and `stopped`.

  Raises:
    ConfigError: the run is refused before it starts.
    RunError: it cannot go on; what was saved stays.
  """
  tasks.check(config)
  folder = pathlib.Path(workdir)
  sharding.initialize_distributed()
  workdir_lib.check(folder, config, allow_config_change=allow_config_change)
  done = result_lib.load_complete(folder, config)
  if done is not None and resume_from is None:
    return _show_complete(folder, done)
  with _hold(folder, 'train', alone=True):
    corpus = corpus or load_data(config)
    console = _open_console(sum(config.train.steps))
    record = functools.partial(
      _record, folder, config, corpus, allow_config_change
    )
    with contextlib.closing(
      run_lib.Run(config, folder, corpus, console, record)
    ) as run:
      if not jax.process_index():
        workdir_lib.remove_drafts(folder)
        workdir_lib.check_data(
          folder, corpus.manifest, allow_config_change=allow_config_change
        )
      with run.interrupt, jax.set_mesh(run.mesh):
        try:
          run.resume(resume_from)
          run.train()
          return run.finish()
        except Stopped:
          return run.stop()
        except BrokenPipeError:  # nobody reads the lines any more: `| head`
          command_line.drop_output()
          if run.step:
            run.stop()
          raise


def evaluate_checkpoint(
  config: Config,
  workdir: str | pathlib.Path,
  *,
  corpus: Data | None = None,
) -> dict[str, Any]:
  """Evaluates the newest checkpoint of a run, or a model that was exported.

  Changes nothing in the folder.

  Args:
    config: the run's, perhaps with other `eval` keys.
    workdir: its folder, or that of the exported model.
    corpus: from `tasks.load_data`, if it is at hand already.

  Returns:
    Step, quality by attention mechanism, seconds, density and peak memory.

  Raises:
    RunError: there is no checkpoint, or none that can be read.
  """
  tasks.check(config)
  sharding.initialize_distributed()
  folder = pathlib.Path(workdir)
  exported = (folder / workdir_lib.EXPORTED).exists()
  if exported and (folder / run_lib.CHECKPOINTS).exists():
    raise ConfigError(
      f'{folder} holds an exported model and the checkpoints of a run; move '
      f'{workdir_lib.EXPORTED} or {run_lib.CHECKPOINTS} away'
    )
  if not exported:
    _check_there_is_a_checkpoint(folder)
  with _hold(folder, 'eval', alone=False):
    return _evaluate(config, folder, corpus, exported=exported)


def _evaluate(config, folder, corpus, *, exported: bool) -> dict[str, Any]:
  console = _open_console(0)
  mesh = sharding.make_mesh(config.mesh)
  judged = recalibrate.still(config) if config.eval.recalibrate_bn else config
  task = make_task(judged, corpus or load_data(config), mesh)
  program = state_lib.make_program(
    judged, task.vocab_size, mesh, classes=task.classes
  )
  with jax.set_mesh(mesh):
    if exported:
      state = export.load(folder, program)
    else:
      state = _restored(judged, folder, task, program, console)
    evaluate = Evaluator(config, task, program)
    validation = {name: evaluate(state, name) for name in evaluate.mechanisms}
  step = int(state.step)
  result = result_lib.evaluation(
    config, step, validation, task.baselines(), task.quality
  )
  result_lib.show(console, f'{config.name} at step {step}', result)
  return result


def export_checkpoint(
  config: Config,
  workdir: str | pathlib.Path,
  *,
  corpus: Data | None = None,
) -> pathlib.Path:
  """Writes the newest checkpoint without its norms; see `export`.

  Args:
    config: the run's.
    workdir: its folder.
    corpus: from `tasks.load_data`, if it is at hand already.

  Returns:
    The folder of the exported model.

  Raises:
    ConfigError: the model does not fold.
    RunError: there is no checkpoint, or a file cannot be read or written.
  """
  tasks.check(config)
  sharding.initialize_distributed()
  folder = pathlib.Path(workdir)
  _check_there_is_a_checkpoint(folder)
  with _hold(folder, 'export', alone=False):
    return _export(config, folder, corpus)


def _export(config, folder, corpus) -> pathlib.Path:
  console = _open_console(0)
  mesh = sharding.make_mesh(config.mesh)
  judged = recalibrate.still(config) if config.eval.recalibrate_bn else config
  task = make_task(judged, corpus or load_data(config), mesh)
  program = state_lib.make_program(
    judged, task.vocab_size, mesh, classes=task.classes
  )
  with jax.set_mesh(mesh):
    state = _restored(judged, folder, task, program, console)
    _, target = export.save(folder, config, state)
  console.say(
    f'the model of step {int(state.step)} is in {target}, its norms folded '
    'into its weights; judge it with --mode=eval '
    f'--config={target / workdir_lib.CONFIG}'
  )
  return target


def _hold(folder: pathlib.Path, mode: str, *, alone: bool):
  """The folder's lock, which the first process takes for all of them."""
  if jax.process_count() == 1:
    return lock.hold(folder, mode, alone=alone)
  return _hold_for_all(folder, mode, alone)


@contextlib.contextmanager
def _hold_for_all(folder, mode, alone):
  refusal = None
  with contextlib.ExitStack() as stack:
    if jax.process_index() == 0:
      try:
        stack.enter_context(lock.hold(folder, mode, alone=alone))
      except (ConfigError, RunError) as e:
        refusal = e
    refused = np.bool_(refusal is not None)
    if multihost_utils.broadcast_one_to_all(refused):
      raise refusal or ConfigError(f'process 0 may not use {folder}')
    yield


def _check_there_is_a_checkpoint(folder: pathlib.Path) -> None:
  """Before a lock's file is made in a folder that holds no run."""
  if not (folder / run_lib.CHECKPOINTS).exists():
    raise RunError(f'there is no checkpoint in {folder}; train first')


def _restored(config, folder, task, program, console) -> state_lib.TrainState:
  """The newest checkpoint, its batch norms recalibrated if asked for."""
  checkpoints = Checkpoints(
    folder / run_lib.CHECKPOINTS, read_only=True, say=console.say
  )
  checkpoint = checkpoints.restore_latest(program.abstract)
  if checkpoint is None:
    raise RunError(f'there is no checkpoint in {folder}; train first')
  count = config.eval.recalibrate_bn
  if not count:
    return checkpoint.state
  batches = task.train_iterator(stages_lib.plan(config)[-1])
  with contextlib.closing(batches):
    return recalibrate.recalibrate(
      config, task, program, checkpoint.state, batches, count=count
    )


def _open_console(total: int) -> console_lib.Console:
  if jax.process_index():
    return console_lib.Silence()
  return console_lib.open_console(total)


def _record(folder, config, corpus, allow_config_change) -> None:
  if jax.process_index():
    return
  workdir_lib.record(
    folder,
    config,
    manifest=corpus.manifest,
    devices=[str(device) for device in jax.devices()],
    allow_config_change=allow_config_change,
  )


def _show_complete(folder, result) -> dict[str, Any]:
  console = _open_console(result['step'])
  console.close()
  console.say(f'the run in {folder} is complete: {result["step"]} steps')
  result_lib.show(console, result['name'], result)
  return result
