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

from psa_jax import command_line, sharding, tasks
from psa_jax.config import Config, RunError
from psa_jax.tasks import Data, load_data, make_task
from psa_jax.train import console as console_lib
from psa_jax.train import export, recalibrate
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
) -> dict[str, Any]:
  """Trains to the end of `config.train`, or goes on where a run stopped.

  Args:
    config: the run.
    workdir: its folder; made where it does not exist.
    corpus: from `tasks.load_data`, if it is at hand already.
    allow_config_change: go on with another configuration or other data.

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
  if done is not None:
    return _show_complete(folder, done)
  corpus = corpus or load_data(config)
  console = _open_console(sum(config.train.steps))
  record = functools.partial(
    _record, folder, config, corpus, allow_config_change
  )
  with contextlib.closing(
    run_lib.Run(config, folder, corpus, console, record)
  ) as run:
    if not jax.process_index():
      workdir_lib.check_data(
        folder, corpus.manifest, allow_config_change=allow_config_change
      )
    with run.interrupt, jax.set_mesh(run.mesh):
      try:
        run.resume()
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
  console, folder = _open_console(0), pathlib.Path(workdir)
  mesh = sharding.make_mesh(config.mesh)
  judged = recalibrate.still(config) if config.eval.recalibrate_bn else config
  task = make_task(judged, corpus or load_data(config), mesh)
  program = state_lib.make_program(
    judged, task.vocab_size, mesh, classes=task.classes
  )
  with jax.set_mesh(mesh):
    if (folder / export.WEIGHTS).exists():
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
  console, folder = _open_console(0), pathlib.Path(workdir)
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
