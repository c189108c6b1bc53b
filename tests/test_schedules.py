"""Schedules at their ends, one step to each side, and inside jit."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psa_jax import schedules
from psa_jax.config import ConfigError, ScheduleConfig

SHAPES = {
  'linear': lambda a, b, u: a + (b - a) * u,
  'cosine': lambda a, b, u: b + (a - b) * (1 + math.cos(math.pi * u)) / 2,
  'exponential': lambda a, b, u: a * (b / a) ** u,
  'cubic': lambda a, b, u: b + (a - b) * (1 - u) ** 3,
}
ENDS = [(1.0, 0.05), (0.05, 1.0), (0.3, 0.1), (0.7, 0.7)]


def config(kind, init=1.0, final=0.05, begin=7, length=40, **kwargs):
  return ScheduleConfig(
    kind=kind, init=init, final=final, begin=begin, length=length, **kwargs
  )


def values(schedule, steps):
  return np.asarray([jax.jit(schedule)(jnp.int32(s)) for s in steps])


@pytest.mark.parametrize('ends', ENDS)
@pytest.mark.parametrize('begin', [0, 7])
@pytest.mark.parametrize('kind', SHAPES)
def test_curve(kind, begin, ends):
  init, final = ends
  schedule = schedules.make(config(kind, init, final, begin, length=40))
  steps = [0, begin, begin + 1, begin + 20, begin + 39, begin + 40, 10**6]
  want = [
    SHAPES[kind](init, final, min(max((s - begin) / 40, 0), 1)) for s in steps
  ]
  np.testing.assert_allclose(values(schedule, steps), want, rtol=2e-6)


@pytest.mark.parametrize('ends', ENDS)
@pytest.mark.parametrize('kind', SHAPES)
def test_both_ends_are_exact_and_the_step_inside_is_not(kind, ends):
  schedule = schedules.make(config(kind, *ends))
  init, final = np.float32(ends[0]), np.float32(ends[1])
  got = values(schedule, [0, 6, 7, 8, 46, 47, 48, 2**31 - 1])
  assert list(got[:3]) == [init] * 3
  assert list(got[5:]) == [final] * 3
  if init != final:
    assert got[3] != init and got[4] != final


@pytest.mark.parametrize('kind', SHAPES)
def test_length_zero_is_a_jump_at_begin(kind):
  schedule = schedules.make(config(kind, length=0))
  assert list(values(schedule, [0, 6, 7, 8])) == list(
    np.float32([1, 1, 0.05, 0.05])
  )
  schedule = schedules.make(config(kind, begin=0, length=0))
  assert list(values(schedule, [0, 1])) == list(np.float32([0.05, 0.05]))


def test_length_one_keeps_init_at_begin():
  schedule = schedules.make(config('linear', length=1))
  assert list(values(schedule, [7, 8])) == list(np.float32([1, 0.05]))


def test_constant_ignores_the_step():
  schedule = schedules.make(ScheduleConfig(init=0.3))
  assert list(values(schedule, [0, 5, 10**6])) == [np.float32(0.3)] * 3


def test_piecewise_boundaries_are_inclusive_on_the_left():
  schedule = schedules.make(
    ScheduleConfig(kind='piecewise', boundaries=(3, 5), values=(1.0, 0.5, 0.25))
  )
  got = values(schedule, [0, 2, 3, 4, 5, 6, 10**6])
  assert list(got) == [1, 1, 0.5, 0.5, 0.25, 0.25, 0.25]
  alone = schedules.make(ScheduleConfig(kind='piecewise', values=(0.4,)))
  assert list(values(alone, [0, 9])) == [np.float32(0.4)] * 2


@pytest.mark.parametrize(
  'cfg',
  [config(kind, *ends, begin=2, length=9) for kind in SHAPES for ends in ENDS]
  + [config('linear', begin=0, length=0), config('cosine', begin=1, length=0)]
  + [
    ScheduleConfig(init=0.1),
    ScheduleConfig(kind='piecewise', boundaries=(2, 4), values=(0.1, 0.9, 0.3)),
  ],
)
def test_upper_bound_is_the_largest_value(cfg):
  got = values(schedules.make(cfg), range(15))
  assert schedules.upper_bound(cfg) == got.max()
  assert np.float32(schedules.last_value(cfg)) == got[-1]


@pytest.mark.parametrize('kind', SHAPES)
def test_rounding_does_not_leave_the_interval(kind):
  # Unclipped, the cosine from 0.7 to 0.3 begins one unit above 0.7.
  cfg = config(kind, 0.7, 0.3, begin=0, length=10**7)
  got = values(schedules.make(cfg), [1, 2, 3, 10**7 - 3, 10**7 - 1])
  assert got.max() <= schedules.upper_bound(cfg)
  assert got.min() >= np.float32(0.3)


def test_result_is_an_f32_scalar_for_any_step():
  for kind in ('constant', *SHAPES):
    schedule = schedules.make(config(kind))
    for step in (9, np.int32(9), jnp.int32(9)):
      value = schedule(step)
      assert value.shape == () and value.dtype == jnp.float32
    np.testing.assert_allclose(schedule(9), jax.jit(schedule)(9), rtol=1e-6)


@pytest.mark.parametrize('kind', SHAPES)
def test_a_traced_step_compiles_once(kind):
  traces = []

  @jax.jit
  def step_fn(step):
    traces.append(None)
    gamma = schedules.prepbn_gamma(step, warmup_steps=2, decay_steps=5)
    return schedules.make(config(kind))(step) * gamma

  for step in range(60):
    step_fn(jnp.int32(step))
  assert len(traces) == 1


def test_single_steps_count_beyond_two_to_the_24():
  begin = 2**24
  schedule = schedules.make(config('linear', 1.0, 0.0, begin=begin, length=4))
  got = values(schedule, [begin + i for i in range(5)])
  np.testing.assert_array_equal(got, [1, 0.75, 0.5, 0.25, 0])


def test_join_restarts_the_count_at_each_boundary():
  rise = schedules.make(config('linear', 0.0, 1.0, begin=0, length=4))
  fall = schedules.make(config('linear', 1.0, 0.0, begin=0, length=2))
  joined = schedules.join([rise, fall], [6])
  got = values(joined, [0, 2, 5, 6, 7, 8, 9])
  np.testing.assert_array_equal(got, [0, 0.5, 1, 1, 0.5, 0, 0])
  assert joined(3).dtype == jnp.float32


@pytest.mark.parametrize(
  'change, words',
  [
    (dict(kind='liner'), "unknown 'liner'; did you mean 'linear'"),
    (dict(length=-1), 'length is -1, but it must be at least 0'),
    (dict(begin=-1), 'begin is -1, but it must be at least 0'),
    (dict(final=math.nan), 'finite'),
    (dict(init=math.inf), 'finite'),
    (dict(kind='exponential', final=0.0), 'cannot begin or end at 0'),
    (dict(values=(1.0,)), 'read by kind=piecewise only'),
    (dict(boundaries=(4,)), 'read by kind=piecewise only'),
    (dict(kind='piecewise'), 'needs one more'),
    (dict(kind='piecewise', boundaries=(3,), values=(1.0,)), 'needs one more'),
    (
      dict(kind='piecewise', boundaries=(3, 3), values=(1.0, 2.0, 3.0)),
      'must rise strictly',
    ),
    (dict(kind='piecewise', boundaries=(0,), values=(1.0, 2.0)), 'at least 1'),
  ],
)
def test_an_impossible_schedule_is_refused(change, words):
  with pytest.raises(ConfigError, match=words):
    dataclasses.replace(config('linear'), **change)


def test_join_refuses_boundaries_that_do_not_fit():
  one = schedules.make(ScheduleConfig())
  with pytest.raises(ConfigError, match='takes 1 boundaries, got 2'):
    schedules.join([one, one], [1, 2])
  with pytest.raises(ConfigError, match='increase'):
    schedules.join([one, one, one], [5, 4])


@pytest.mark.parametrize('warmup', [0, 3])
@pytest.mark.parametrize('decay', [1, 7, 1000])
def test_gamma_trace(warmup, decay):
  gamma = jax.jit(
    lambda step: schedules.prepbn_gamma(
      step, warmup_steps=warmup, decay_steps=decay
    )
  )
  steps = sorted(
    {0, warmup, warmup + 1, warmup + decay // 2, warmup + decay - 1}
    | {max(warmup - 1, 0), warmup + decay, warmup + decay + 1, 10**7}
  )
  for step in steps:
    left = min(max(decay - max(step - warmup, 0), 0), decay)
    want = np.float32(left) / np.float32(decay)
    got = gamma(jnp.int32(step))
    assert got.dtype == jnp.float32
    # XLA multiplies by the reciprocal of a constant: one unit in the last
    # place inside, nothing at the ends.
    np.testing.assert_allclose(got, want, rtol=1.2e-7, err_msg=f'{step}')
    eager = schedules.prepbn_gamma(step, warmup_steps=warmup, decay_steps=decay)
    assert eager == want
    if left in (0, decay):
      assert got == want


def test_gamma_without_decay_jumps_after_the_warmup():
  got = [
    float(schedules.prepbn_gamma(s, warmup_steps=2, decay_steps=0))
    for s in range(4)
  ]
  assert got == [1, 1, 0, 0]


def test_gamma_refuses_negative_steps():
  for steps in ((-1, 5), (5, -1)):
    with pytest.raises(ConfigError, match='0 or more'):
      schedules.prepbn_gamma(0, warmup_steps=steps[0], decay_steps=steps[1])
