"""One run: its parts, its state, and what happens at every step.

The host keeps its own count of steps and reads a step's metrics after it has
dispatched the next one, so it waits for the devices only to save, to evaluate
and to compile.

A run is a function of its configuration and its data. Killed at any moment and
started again it goes on from the last checkpoint and ends with the same
parameters, the same statistics and the same metrics, bit for bit.

A checkpoint is good once the update that began from it had a finite loss not
far above the lowest one; until then the one before it stays. A state that no
update can begin from is set aside when a run ends for it.

Not done: early stopping, and choosing the best checkpoint.
"""

import contextlib
import math
import pathlib
import shutil
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from psa_jax import sharding
from psa_jax.config import Config, ConfigError, RunError, paths
from psa_jax.tasks import Data, make_task
from psa_jax.train import lock
from psa_jax.train import result as result_lib
from psa_jax.train import stages as stages_lib
from psa_jax.train import state as state_lib
from psa_jax.train import step as step_lib
from psa_jax.train import workdir as workdir_lib
from psa_jax.train.checkpoint import Checkpoints
from psa_jax.train.console import Console
from psa_jax.train.evaluator import Evaluator, NotFiniteError
from psa_jax.train.interrupt import Interrupt
from psa_jax.train.metrics import METRICS, Log

CHECKPOINTS = 'checkpoints'


_JUMP = 1.5  # a good loss is no higher than this times the lowest, plus 1 nat


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
    self._unjudged: int | None = None  # a checkpoint no update began from yet
    self._lowest = math.inf  # loss of an update
    self._stage: stages_lib.Stage | None = None
    self._pending: _Pending | None = None
    self._compile_seconds: float | None = None
    self._timer = _Timer()
    self._again = ''

  def resume(self, step: int | None = None) -> None:
    """Restores the last good checkpoint, or makes the first state.

    Args:
      step: go back to this checkpoint, 0 to the beginning. Later checkpoints,
        the metrics as they are and the result are kept under other names.
    """
    if step is None:
      checkpoint = self.checkpoints.restore_latest(self.program.abstract)
    elif step == 0 and 0 not in self.checkpoints.steps():
      checkpoint = None
    else:
      checkpoint = self.checkpoints.restore(step, self.program.abstract)
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
    if step is not None:
      self._again = ' without --resume_from'
      self._set_aside_after(step)
    self._unjudged = self._saved
    self.log = Log(
      self.config,
      self.folder,
      step=self.step,
      quality=self.task.quality,
      mechanisms=self.evaluate.mechanisms,
      say=self.console.say,
    )
    self._open.callback(self.log.close)
    losses = [row.get('loss') for row in self.log.rows if 'stage' in row]
    self._lowest = min((x for x in losses if x is not None), default=math.inf)

  def _first_state(self) -> state_lib.TrainState:
    """Initial values, or the parameters that another run ended with."""
    state = state_lib.init_state(
      self.config, self.task.vocab_size, self.program
    )
    source = self.config.train.init_from
    if not source:
      return state
    folder = pathlib.Path(paths.expanded(source, 'train.init_from'))
    saved = None
    if (folder / CHECKPOINTS).is_dir():
      with self._reading(folder):
        checkpoints = Checkpoints(
          folder / CHECKPOINTS, read_only=True, say=self.console.say
        )
        saved = checkpoints.read_arrays()
        checkpoints.close()
    if saved is None:
      raise ConfigError(f'train.init_from: there is no checkpoint in {source}')
    state, new = state_lib.adopt(state, saved)
    beside = f'; initial values for {", ".join(new)}' if new else ''
    self.console.say(f'beginning with the parameters of {source}{beside}')
    return state

  def _reading(self, folder: pathlib.Path):
    """Keeps a run from going on in `folder` while it is read."""
    if jax.process_index():
      return contextlib.nullcontext()
    return lock.hold(folder, 'train', alone=False, say=self.console.say)

  def _set_aside_after(self, step: int) -> None:
    """Keeps what a run that goes back to `step` will write again."""
    later = [s for s in self.checkpoints.steps() if s > step]
    self.checkpoints.set_aside(later, 'aside')
    for name in (METRICS, result_lib.RESULT) if not jax.process_index() else ():
      if (self.folder / name).exists():
        kept = workdir_lib.set_aside(self.folder / name, 'aside')
        self.console.say(f'{name} is kept as {kept.name}')
        if name == METRICS:
          shutil.copyfile(kept, self.folder / name)

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
    own = validation[self.config.model.attention.name]
    self.checkpoints.judge(self.step, good=self._usual(own['loss']))
    self.checkpoints.wait()
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
      f'same command{self._again} goes on from here'
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
    if self._unjudged == step - 1:
      self.checkpoints.judge(step - 1, good=self._usual(metrics['loss']))
      self._unjudged = None
    self._lowest = min(self._lowest, metrics['loss'])
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

  def _usual(self, loss: float) -> bool:
    """Whether a loss is one that a sound run comes by; NaN is none."""
    return loss <= _JUMP * self._lowest + 1

  def _fail(self, pending: _Pending, what: str, metrics: dict) -> None:
    """Gives up, with the last good state saved and what is ruined set aside.

    The state before the update that was refused is saved if an update can
    begin from it, whatever this one's batch holds.
    """
    self._pending, self.step = None, pending.step - 1
    # The fault kept every later step from changing the state; saved, it would
    # stop the next run at once.
    self.state = self.state._replace(
      fault=jax.device_put(jnp.int32(0), self.program.shardings.fault)
    )
    if self.step:
      self._save(data_state=pending.data)
      self.checkpoints.wait()
    of_update = what in step_lib.OF_UPDATE
    loss = metrics['loss'] if of_update else self._loss_of_another_batch()
    value = f' ({metrics[what]})' if what in metrics else ''
    raise self._failure(
      f'step {pending.step}: {what} is not finite{value}; the update was not '
      'made',
      loss,
    )

  def _failure(self, what: str, loss: float) -> RunError:
    """The error of a run that diverged: what stays, and how to go on.

    Args:
      what: went wrong.
      loss: at the present state, where it is saved; not finite: it is ruined.
    """
    ruined = not math.isfinite(loss)
    if ruined:
      self.checkpoints.set_aside([self.step], 'ruined')
    if self._usual(loss) and self.step in self.checkpoints.steps():
      good = self.step
    else:
      good = self.checkpoints.last_good()
    if ruined:
      what += f'; the state of step {self.step} is ruined already'
    place = (
      f'the last good checkpoint is step {good} in {self.checkpoints.path}'
      if good
      else 'there is no good checkpoint before it'
    )
    return RunError(
      f'{what}; {place}. Lower optim.learning_rate and go on with '
      f'--resume_from={good or 0} --allow_config_change'
    )

  def _loss_of_another_batch(self) -> float:
    """Loss of the state on the next batch; NaN where no update can begin.

    It uses the state up.
    """
    stage = stages_lib.stage_at(self.stages, self.step)
    batch = sharding.put_batch(self.data.next(self.step), self.mesh)
    if stage != self._stage:
      self._enter(stage, batch)
    _, metrics = self._compiled(self.state, batch)
    metrics = {k: v.item() for k, v in jax.device_get(metrics).items()}
    fault = metrics['fault']
    if fault and step_lib.FAULTS[fault - 1] not in step_lib.OF_UPDATE:
      return math.nan
    return metrics['loss']

  def _save(self, data_state: dict[str, Any] | None = None) -> None:
    """Saves the state and the place in the data, once a step."""
    self._settle()
    if self._saved == self.step:
      return
    meta = {'name': self.config.name, 'seconds': self._timer.total()}
    place = self.data.state() if data_state is None else data_state
    self.checkpoints.save(self.step, self.state, place, meta)
    self._saved = self._unjudged = self.step

  def _evaluate_if_due(self) -> None:
    if self.step and _due(self.step, self.config.eval.every):
      self._settle()
      self._evaluate('eval', self.config.model.attention.name)

  def _evaluate(self, kind: str, mechanism: str) -> dict[str, Any]:
    try:
      result = self.evaluate(
        self.state, mechanism, before_batch=self.interrupt.check
      )
    except NotFiniteError as e:
      loss = self._loss_of_another_batch()
      if math.isfinite(loss):
        raise  # the state is sound: the data or the other attention is not
      raise self._failure(str(e), loss) from e
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
