"""The plan of stages, and a place in the data that survives a restart."""

import dataclasses
import types
from typing import ClassVar

import numpy as np
import pytest

from psa_jax.attention.psa import PsaConfig
from psa_jax.config import (
  AttentionConfig,
  Config,
  ConfigError,
  ModelConfig,
  OptimConfig,
  RunError,
  ScheduleConfig,
  TrainConfig,
)
from psa_jax.train import stages as lib
from psa_jax.train.run import Run

OPTIM = OptimConfig(warmup_steps=1)
TRAIN = TrainConfig(steps=(3, 2), seq_len=(8, 32), batch_size=(4, 1))


def plan(**changes):
  return lib.plan(
    Config(optim=OPTIM, train=dataclasses.replace(TRAIN, **changes))
  )


def test_stages_lie_end_to_end():
  first, last = plan()
  assert (first.begin, first.end, last.begin, last.end) == (0, 3, 3, 5)
  assert (first.tokens, last.tokens) == (32, 32)
  assert first.seed != last.seed
  assert plan() == plan()


def test_the_seed_of_the_run_reaches_every_stage():
  other = lib.plan(Config(seed=1, optim=OPTIM, train=TRAIN))
  assert not {s.seed for s in plan()} & {s.seed for s in other}
  for stage in (*plan(), *other):
    assert 0 <= stage.seed < 2**32


@pytest.mark.parametrize(
  ('step', 'index'), [(0, 0), (2, 0), (3, 1), (4, 1), (5, 1), (9, 1)]
)
def test_stage_at_the_boundaries(step, index):
  assert lib.stage_at(plan(), step).index == index


@pytest.mark.parametrize(
  ('step', 'tokens'), [(0, 0), (1, 32), (3, 96), (4, 128), (5, 160), (9, 160)]
)
def test_tokens_seen(step, tokens):
  assert lib.tokens_seen(plan(), step) == tokens


def test_batches_that_devices_cannot_share_are_refused():
  lib.check_rows(TRAIN, 1, 1)
  with pytest.raises(ConfigError, match='entry 1, .* 2 devices'):
    lib.check_rows(TRAIN, 1, 2)
  with pytest.raises(ConfigError, match='entry 4, .* 4 micro-batches'):
    lib.check_rows(dataclasses.replace(TRAIN, batch_size=(8, 4)), 4, 2)


class Counter:
  """Batches that say which stage they are of, and which batch it is."""

  opened: ClassVar[list['Counter']] = []

  def __init__(self, stage):
    self.stage, self.taken, self.closed = stage, 0, False
    self.opened.append(self)

  def __next__(self):
    self.taken += 1
    return {'batch': np.array([self.stage.index, self.taken])}

  def get_state(self):
    return {'taken': self.taken}

  def set_state(self, state):
    self.taken = state['taken']

  def close(self):
    self.closed = True


class Task:
  train_iterator = staticmethod(Counter)


def batches(data, begin, end):
  return [
    tuple(data.next(step)['batch'].tolist()) for step in range(begin, end)
  ]


ALL = [(0, 1), (0, 2), (0, 3), (1, 1), (1, 2)]


def test_a_stage_is_let_go_when_the_next_begins_and_at_the_end():
  Counter.opened.clear()
  data = lib.StageData(Task, plan())
  batches(data, 0, 4)
  assert [x.closed for x in Counter.opened] == [True, False]
  data.close()
  data.close()
  assert [x.closed for x in Counter.opened] == [True, True]


def test_every_stage_begins_its_own_data():
  assert batches(lib.StageData(Task, plan()), 0, 5) == ALL


@pytest.mark.parametrize('step', range(6))
def test_a_restored_place_goes_on_where_it_was(step):
  """In the first stage, at the boundary, in the last one, at the end."""
  data = lib.StageData(Task, plan())
  batches(data, 0, step)
  again = lib.StageData(Task, plan())
  again.restore(data.state(), step)
  assert batches(again, step, 5) == ALL[step:]


def test_a_run_can_be_lengthened():
  data = lib.StageData(Task, plan())
  batches(data, 0, 5)
  longer = lib.StageData(Task, plan(steps=(3, 4)))
  longer.restore(data.state(), 5)
  assert batches(longer, 5, 7) == [(1, 3), (1, 4)]


def test_a_stage_can_be_lengthened_while_it_runs():
  data = lib.StageData(Task, plan())
  batches(data, 0, 3)
  longer = lib.StageData(Task, plan(steps=(5, 2)))
  longer.restore(data.state(), 3)
  assert batches(longer, 3, 6) == [(0, 4), (0, 5), (1, 1)]


@pytest.mark.parametrize(('step', 'steps'), [(4, (6, 2)), (2, (1, 5))])
def test_a_stage_that_has_ended_cannot_change(step, steps):
  data = lib.StageData(Task, plan())
  batches(data, 0, step)
  changed = lib.StageData(Task, plan(steps=steps))
  with pytest.raises(RunError, match='only stages that have not ended'):
    changed.restore(data.state(), step)


def idle(**changes):
  """What a run with a ramp from 1 to 0.03 over 9 steps is told at start."""
  ramp = ScheduleConfig('linear', 1.0, 0.03, length=9)
  attention = AttentionConfig('psa', psa=PsaConfig(keep=ramp))
  train = TrainConfig(
    steps=(1, 5, 10), seq_len=(1024, 1024, 32_768), batch_size=(4, 4, 4)
  )
  config = Config(
    model=ModelConfig(attention=attention),
    optim=OPTIM,
    train=dataclasses.replace(train, **changes),
  )
  said = []
  run = types.SimpleNamespace(
    config=config, console=types.SimpleNamespace(say=said.append), step=0
  )
  run.total = run.step  # nothing is left to do
  Run.train(run)
  assert said == list(lib.idle_schedules(config))
  return said


def test_a_schedule_without_a_say_is_named_at_start():
  """At the end of each stage: still 1 in the first, in the third it acts."""
  (line,) = idle()
  assert line.startswith('stage 2 of 3: model.attention.psa.keep asks for a ')
  assert 'density of 0.461, but at 1,024 tokens' in line
  assert 'alone take 0.875' in line
