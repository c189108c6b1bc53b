"""Evaluation of a state, with the configured attention or another one."""

import math
import time
from collections.abc import Callable
from typing import Any

import jax

from psa_jax.config import Config, RunError
from psa_jax.eval import flops
from psa_jax.tasks import Generator, Loss, Task
from psa_jax.train import step as step_lib
from psa_jax.train.state import Program, TrainState


class NotFiniteError(RunError):
  """The loss of an evaluation is not finite."""


class Evaluator:
  """Evaluates states of one program; each mechanism is compiled once."""

  def __init__(self, config: Config, task: Task, program: Program):
    """Compiles nothing yet.

    Args:
      config: names the mechanisms.
      task: what is evaluated, and on what.
      program: model structure and mesh.
    """
    self._task, self._program = task, program
    self._model = config.model
    self._steps: dict[str, tuple[Program, _TimedStep]] = {}
    self.seq_len = config.eval.seq_len or config.train.seq_len[-1]
    name = config.model.attention.name
    dense = config.eval.dense and name != 'dense'
    self.mechanisms = (name, 'dense') if dense else (name,)

  def __call__(
    self,
    state: TrainState,
    mechanism: str,
    *,
    before_batch: Callable[[], None] = lambda: None,
  ) -> dict[str, Any]:
    """The task's metrics, `seconds_per_window` and what they belong to.

    Args:
      state: the state to evaluate; its step drives every schedule.
      mechanism: which attention reads the keys.
      before_batch: may raise, to stop.

    Raises:
      NotFiniteError: the loss is not finite.
    """
    if mechanism not in self._steps:
      program = self._program.read_by(mechanism)
      step = _TimedStep(step_lib.make_eval_step(self._task, program))
      self._steps[mechanism] = program, step
    program, step = self._steps[mechanism]
    step.seconds = 0.0
    result = self._task.evaluate(step, state, before_batch=before_batch)
    if isinstance(self._task, Generator):
      result |= self._task.generate(program, state, before_batch=before_batch)
    if not math.isfinite(result['loss']):
      raise NotFiniteError(
        f'step {int(state.step)}: the validation loss with {mechanism} '
        f'attention is {result["loss"]}'
      )
    return {
      'mechanism': mechanism,
      'seq_len': self.seq_len,
      **result,
      'seconds_per_window': step.seconds / result['windows'],
      'flops_per_window': flops.forward(
        self._model, program.abstract.params, self.seq_len, result
      ),
    }


class _TimedStep:
  """An evaluation step that counts its seconds without its compilation."""

  def __init__(self, jitted: Any):
    self._jitted, self._compiled = jitted, None
    self.seconds = 0.0

  def __call__(self, state: TrainState, batch: Any) -> Loss:
    if self._compiled is None:
      self._compiled = self._jitted.lower(state, batch).compile()
    began = time.perf_counter()
    loss = jax.block_until_ready(self._compiled(state, batch))
    self.seconds += time.perf_counter() - began
    return loss
