"""One run: its parts, its state, and what happens at every step.

The host keeps its own count of steps and reads a step's metrics after it has
dispatched the next one, so it waits for the devices only to save, to evaluate
and to compile.

A run is a function of its configuration and its data. Killed at any moment and
started again it goes on from the last checkpoint and ends with the same
parameters, the same statistics and the same metrics, bit for bit.

Not done: early stopping, and choosing the best checkpoint.
"""

import contextlib
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from psa_jax import sharding
from psa_jax.config import Config, ConfigError, RunError, paths
from psa_jax.tasks import Data, make_task
from psa_jax.train import result as result_lib
from psa_jax.train import stages as stages_lib
from psa_jax.train import state as state_lib
from psa_jax.train import step as step_lib
from psa_jax.train.checkpoint import Checkpoints
from psa_jax.train.console import Console
from psa_jax.train.evaluator import Evaluator
from psa_jax.train.interrupt import Interrupt
from psa_jax.train.metrics import Log

CHECKPOINTS = 'checkpoints'


class _Pending(NamedTuple):
  """A step that was dispatched and whose metrics were not read yet.

  Attributes:
    step: its number, from 1.
    stage: where it belongs.
    metrics: on the devices.
    data: the data state before its batch.
  """

  step: int
  stage: stages_lib.Stage
  metrics: dict[str, jax.Array]
  data: dict[str, Any]


class Run:
  """One run in progress: its parts, its state and its place."""

  def __init__(
    self,
    config: Config,
    folder: pathlib.Path,
    corpus: Data,
    console: Console,
    record: Callable[[], None],
  ):
    """Puts the parts together; nothing is restored or compiled yet.

    Args:
      config: the run.
      folder: its work directory.
      corpus: from `tasks.load_data`.
      console: where it speaks.
      record: writes this start down. Called once, when nothing can refuse the
        run any more: it is restored and its first program is compiled.
    """
    self._record: Callable[[], None] | None = record
    self.config, self.folder, self.console = config, folder, console
    self._open = contextlib.ExitStack()
    self._open.callback(console.close)
    self.stages = stages_lib.plan(config)
    self.total = self.stages[-1].end
    self.mesh = sharding.make_mesh(config.mesh)
    stages_lib.check_rows(
      config.train, config.optim.accumulate, sharding.batch_shards(self.mesh)
    )
    self.task = make_task(config, corpus, self.mesh)
    self.program = state_lib.make_program(
      config, self.task.vocab_size, self.mesh, classes=self.task.classes
    )
    self.train_step = step_lib.make_train_step(config, self.task, self.program)
    self.evaluate = Evaluator(config, self.task, self.program)
    self.data = stages_lib.StageData(self.task, self.stages)
    self._open.callback(self.data.close)
    self.interrupt = Interrupt(console.say, before_abort=console.close)
    self.checkpoints = Checkpoints(
      folder / CHECKPOINTS, keep=config.checkpoint.keep, say=self.console.say
    )
    self._open.callback(self.checkpoints.close)
    self.step = 0
    self._saved: int | None = None
    self._stage: stages_lib.Stage | None = None
    self._pending: _Pending | None = None
    self._compile_seconds: float | None = None
    self._timer = _Timer()

  def resume(self) -> None:
    """Restores the last good checkpoint, or makes the first state."""
    checkpoint = self.checkpoints.restore_latest(self.program.abstract)
    if checkpoint is None:
      self.state = self._first_state()
    elif checkpoint.step > self.total:
      raise RunError(
        f'the checkpoint of step {checkpoint.step} is beyond the end of the '
        f'run; train.steps adds up to {self.total}'
      )
    else:
      self.state, self.step, self._saved = (
        checkpoint.state,
        checkpoint.step,
        checkpoint.step,
      )
      self.data.restore(checkpoint.data, checkpoint.step)
      self._timer = _Timer(checkpoint.meta['seconds'])
      self.console.say(f'going on from step {self.step} of {self.total}')
    self.log = Log(
      self.config,
      self.folder,
      step=self.step,
      quality=self.task.quality,
      mechanisms=self.evaluate.mechanisms,
    )
    self._open.callback(self.log.close)

  def _first_state(self) -> state_lib.TrainState:
    """Initial values, or the parameters that another run ended with."""
    state = state_lib.init_state(
      self.config, self.task.vocab_size, self.program
    )
    source = self.config.train.init_from
    if not source:
      return state
    checkpoints = Checkpoints(
      pathlib.Path(paths.expanded(source, 'train.init_from')) / CHECKPOINTS,
      read_only=True,
      say=self.console.say,
    )
    saved = checkpoints.read_arrays()
    checkpoints.close()
    if saved is None:
      raise ConfigError(f'train.init_from: there is no checkpoint in {source}')
    state, new = state_lib.adopt(state, saved)
    beside = f'; initial values for {", ".join(new)}' if new else ''
    self.console.say(f'beginning with the parameters of {source}{beside}')
    return state

  def train(self) -> None:
    """Makes the steps that are left, with evaluations and checkpoints."""
    for line in stages_lib.idle_schedules(self.config):
      self.console.say(line)
    while self.step < self.total:
      self.interrupt.check_step(self.step)
      self.checkpoints.poll()
      self._evaluate_if_due()
      self._advance()
      if _due(self.step, self.config.checkpoint.every):
        self._save()

  def finish(self) -> dict[str, Any]:
    """Saves, evaluates at the last step and reports."""
    self._started()
    self._save()
    self.checkpoints.wait()
    validation = {
      name: self._evaluate('final', name) for name in self.evaluate.mechanisms
    }
    result = result_lib.build(
      self.config,
      rows=self.log.rows,
      validation=validation,
      baselines=self.task.baselines(),
      quality=self.task.quality,
      seconds=self._timer.total(),
    )
    if jax.process_index() == 0:
      result_lib.save(self.folder, result)
    self.console.close()
    result_lib.show(self.console, self.config.name, result)
    return result

  def stop(self) -> dict[str, Any]:
    """Saves where a signal stopped the run."""
    self._started()
    self._save()
    self.checkpoints.wait()
    self.console.say(
      f'stopped at step {self.step} of {self.total}; everything is saved, the '
      'same command goes on from here'
    )
    return {'step': self.step, 'stopped': True}

  def close(self) -> None:
    """Ends every writer; a save under way is finished."""
    self._open.close()

  def _advance(self) -> None:
    """Dispatches one step, then reads the metrics of the one before."""
    data_before = self.data.state()
    stage = stages_lib.stage_at(self.stages, self.step)
    batch = sharding.put_batch(self.data.next(self.step), self.mesh)
    if stage != self._stage:
      self._settle()
      self._enter(stage, batch)
    self._started()
    if self._pending is None:
      self._timer.start()
    self.state, metrics = self._compiled(self.state, batch)
    self.step += 1
    before = self._pending
    self._pending = _Pending(self.step, stage, metrics, data_before)
    if before is not None:
      self._read(before)

  def _started(self) -> None:
    """Records the start, the first time."""
    record, self._record = self._record, None
    if record is not None:
      record()

  def _enter(self, stage: stages_lib.Stage, batch: Any) -> None:
    """Compiles the step for a stage's shape."""
    self._stage = stage
    label = f'stage {stage.index + 1} of {len(self.stages)}'
    shape = f'{stage.batch_size} x {stage.seq_len:,} tokens'
    self.console.say(f'{label}: {shape} a step, compiling')
    began = time.perf_counter()
    # Apart from the first step, whose seconds it would otherwise be part of.
    self._compiled = self.train_step.lower(self.state, batch).compile()
    self._compile_seconds = time.perf_counter() - began

  def _settle(self) -> None:
    """Waits for the last step, so that nothing is left unread."""
    pending, self._pending = self._pending, None
    if pending is not None:
      self._read(pending)

  def _read(self, pending: _Pending) -> None:
    """Takes in the metrics of a step: stops on a fault, logs if due."""
    metrics = {k: v.item() for k, v in jax.device_get(pending.metrics).items()}
    fault = metrics.pop('fault')
    if fault:
      self._fail(pending, step_lib.FAULTS[fault - 1], metrics)
    self._timer.step_done()
    step, stage = pending.step, pending.stage
    # What the final table calls the start and the end of a stage.
    edge = step in (stage.begin + 1, stage.end)
    if not edge and not _due(step, self.config.log.every):
      return
    seconds = self._timer.seconds_per_step()
    row = {
      'kind': 'train',
      'step': step,
      'stage': stage.index,
      'seq_len': stage.seq_len,
      **metrics,
      'seconds_per_step': seconds,
      'tokens_per_second': stage.tokens / seconds,
    }
    if self._compile_seconds is not None:
      row['compile_seconds'] = self._compile_seconds
      self._compile_seconds = None
    remaining = stages_lib.tokens_seen(self.stages, self.total)
    remaining -= stages_lib.tokens_seen(self.stages, step)
    self.log.write(row)
    self.console.show(row, eta=remaining / row['tokens_per_second'])

  def _fail(self, pending: _Pending, what: str, metrics: dict) -> None:
    """Saves the state before a step that was refused, then gives up."""
    self._pending, self.step = None, pending.step - 1
    # The fault kept every later step from changing the state; saved, it would
    # stop the next run at once.
    self.state = self.state._replace(
      fault=jax.device_put(jnp.int32(0), self.program.shardings.fault)
    )
    self._save(data_state=pending.data)
    self.checkpoints.wait()
    value = f' ({metrics[what]})' if what in metrics else ''
    raise RunError(
      f'step {pending.step}: {what} is not finite{value}; the update was not '
      f'made. The last good checkpoint is step {self.step} in '
      f'{self.checkpoints.path}; lower optim.learning_rate and go on with '
      '--allow_config_change'
    )

  def _save(self, data_state: dict[str, Any] | None = None) -> None:
    """Saves the state and the place in the data, once a step."""
    self._settle()
    if self._saved == self.step:
      return
    meta = {'name': self.config.name, 'seconds': self._timer.total()}
    place = self.data.state() if data_state is None else data_state
    self.checkpoints.save(self.step, self.state, place, meta)
    self._saved = self.step

  def _evaluate_if_due(self) -> None:
    if self.step and _due(self.step, self.config.eval.every):
      self._settle()
      self._evaluate('eval', self.config.model.attention.name)

  def _evaluate(self, kind: str, mechanism: str) -> dict[str, Any]:
    result = self.evaluate(
      self.state, mechanism, before_batch=self.interrupt.check
    )
    row = {'kind': kind, 'step': self.step, **result}
    self.log.write(row)
    self.console.show(row)
    return result


class _Timer:
  """Seconds of the whole run, and of a step between two log rows."""

  def __init__(self, before: float = 0.0):
    self._mark = time.perf_counter()
    self._began = self._mark - before
    self._steps: list[float] = []

  def total(self) -> float:
    return time.perf_counter() - self._began

  def start(self) -> None:
    """The devices are idle; the next step begins now."""
    self._mark = time.perf_counter()

  def step_done(self) -> None:
    now = time.perf_counter()
    self._steps.append(now - self._mark)
    self._mark = now

  def seconds_per_step(self) -> float:
    """The mean since it was asked last."""
    mean = sum(self._steps) / len(self._steps)
    self._steps.clear()
    return mean


def _due(step: int, every: int) -> bool:
  return every > 0 and step % every == 0
