"""The stages of a run, a curriculum of context lengths, and their data.

A stage is what the host knows about a stretch of steps: one batch shape, so
one compilation. Schedules and the optimiser do not see stages; they run on
the global step. Each stage has its own shuffled pass over the data, seeded by
the run's seed and the stage's index.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from psa_jax.config import Config, ConfigError, RunError, TrainConfig
from psa_jax.data.pipeline import DataIterator
from psa_jax.tasks import Stage


def plan(config: Config) -> tuple[Stage, ...]:
  """Lays the stages of `config.train` end to end."""
  train = config.train
  stages, begin = [], 0
  rows = zip(train.steps, train.seq_len, train.batch_size, strict=True)
  for index, (steps, seq_len, batch_size) in enumerate(rows):
    seed = np.random.SeedSequence((config.seed, index)).generate_state(1)[0]
    stages.append(
      Stage(
        index=index,
        begin=begin,
        end=begin + steps,
        seq_len=seq_len,
        batch_size=batch_size,
        seed=int(seed >> 1),
      )
    )
    begin += steps
  return tuple(stages)


def stage_at(stages: tuple[Stage, ...], step: int) -> Stage:
  """The stage of the update that follows `step` updates; else the last."""
  for stage in stages:
    if step < stage.end:
      return stage
  return stages[-1]


def tokens_seen(stages: tuple[Stage, ...], step: int) -> int:
  """Tokens read by the first `step` updates."""
  return sum(
    max(0, min(step, stage.end) - stage.begin) * stage.tokens
    for stage in stages
  )


def idle_schedules(config: Config) -> Iterator[str]:
  """A line for each stage at whose end attention's schedule has no say.

  Asked of the settings of the mechanism; a controller sets its own budget.
  """
  attention, stages = config.model.attention, plan(config)
  if config.train.controller.kind != 'none':
    return
  path = f'model.attention.{attention.mechanism.section}.'
  for stage in stages:
    line = attention.mechanism_config.idle_schedule(
      path, length=stage.seq_len, step=stage.end - 1
    )
    if line:
      yield f'stage {stage.index + 1} of {len(stages)}: {line}'


def check_rows(config: TrainConfig, accumulate: int, shards: int) -> None:
  """Refuses batches that the devices cannot share evenly.

  Args:
    config: the stages.
    accumulate: micro-batches in a step.
    shards: parts that the rows of a micro-batch are split into.

  Raises:
    ConfigError: a batch size that is not a multiple of both together.
  """
  for size in config.batch_size:
    if size % (accumulate * shards):
      raise ConfigError(
        f'train.batch_size has an entry {size}, which does not split into '
        f'{accumulate} micro-batches (optim.accumulate) over {shards} devices '
        '(mesh.data x mesh.fsdp); raise it, or use fewer devices with '
        '--config.mesh.data=1'
      )


class StageData:
  """The batches of a whole run, stage after stage, with a savable place."""

  def __init__(self, task: Any, stages: tuple[Stage, ...]):
    """Stands before the first batch.

    Args:
      task: gives `train_iterator(stage)`.
      stages: from `plan`.
    """
    self._task, self._stages = task, stages
    self._open: tuple[Stage, DataIterator] | None = None

  def next(self, step: int) -> dict[str, np.ndarray]:
    """This process's rows of the batch for the update after `step`."""
    stage = stage_at(self._stages, step)
    if self._open is None or self._open[0] != stage:
      self.close()
      self._open = stage, self._task.train_iterator(stage)
    return next(self._open[1])

  def state(self) -> dict[str, Any]:
    """JSON: the stage and its iterator's state; {} before the first batch."""
    if self._open is None:
      return {}
    stage, iterator = self._open
    return {'stage': stage.index, 'iterator': iterator.get_state()}

  def close(self) -> None:
    """Lets go of the stage that is open."""
    if self._open is not None:
      self._open[1].close()
    self._open = None

  def restore(self, state: dict[str, Any], step: int) -> None:
    """Goes to where `state` was taken, after `step` updates.

    Raises:
      RunError: the run's stages changed so that `state` is not in the stage
        that `step` belongs to, nor at the end of the one before it.
    """
    if not state:
      return
    stage = stage_at(self._stages, step)
    if state['stage'] == stage.index:
      self._open = stage, self._task.train_iterator(stage)
      self._open[1].set_state(state['iterator'])
    elif state['stage'] != stage.index - 1 or step != stage.begin:
      raise RunError(
        f'the checkpoint of step {step} was in stage {state["stage"] + 1}, '
        f'which is now stage {stage.index + 1}; only stages that have not '
        'ended may change their train.steps'
      )
