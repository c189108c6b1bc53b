"""Rounds: contenders take turns, long ones get fewer, one may fail."""

import statistics

import pytest

from experiments.bench import timing

pytestmark = pytest.mark.tier('default')


def test_contenders_take_turns():
  order = []

  def contender(name, seconds):
    def call(calls):
      order.append((name, calls))
      return seconds

    return call

  timings = timing.interleave(
    {('a', 'x'): contender('a', 5.0), ('b', 'x'): contender('b', 10.0)}
  )
  # A warm-up round, then four rounds of 5 s and three of 10 s.
  assert order == [(name, 1) for name in 'ababababa']
  assert timings['a', 'x'].row() == {'seconds': [5.0] * 4, 'median': 5.0}
  assert len(timings['a', 'x'].cpu) == 4


def test_long_calls_get_fewer_rounds_and_short_ones_several_calls():
  assert timing.rounds_for(0.1, 9) == 9
  assert timing.rounds_for(5.0, 9) == 4
  assert timing.rounds_for(15.0, 9) == 3
  assert timing.rounds_for(88.0, 9) == 1
  asked = []

  def short(calls):
    asked.append(calls)
    return 0.002

  timing.interleave({('a', 'x'): short}, repeats=2)
  assert asked == [1, 1, 10, 10]


def test_cpu_seconds_are_those_of_one_call(monkeypatch):
  clock = iter([0.0, 3.0, 3.0, 6.0, 6.0, 36.0])
  monkeypatch.setattr(timing.time, 'process_time', lambda: next(clock))
  timings = timing.interleave({('a', 'x'): lambda calls: 0.002}, repeats=1)
  # Two calls before the round, which makes ten.
  assert timings['a', 'x'].cpu == [3.0]


def test_one_that_fails_is_a_row_and_the_rest_goes_on():
  def fails(calls):
    raise timing.Unavailable('out of memory: more than 8 GiB')

  timings = timing.interleave(
    {('a', 'x'): fails, ('b', 'x'): lambda calls: 3.0}, repeats=2
  )
  assert timings['a', 'x'].row() == {'error': 'out of memory: more than 8 GiB'}
  assert timings['b', 'x'].row() == {'seconds': [3.0, 3.0], 'median': 3.0}


def test_a_chain_decodes_steps_that_depend_on_each_other():
  import jax.numpy as jnp

  seen = []
  call = timing.chained(lambda q, at: seen.append(q) or q, jnp.ones(1), 0)
  assert call(2) > 0
  assert len(seen) == timing.CHAIN


@pytest.mark.parametrize('time', [timing.timed, timing.queued])
def test_seconds_are_of_one_call(time, monkeypatch):
  clock = iter([1.0, 9.0])
  monkeypatch.setattr(timing.time, 'perf_counter', lambda: next(clock))
  calls = []
  assert time(lambda x: calls.append(x) or x, 5)(4) == 2.0
  assert calls == [5] * 4


def test_a_lazy_contender_is_built_once():
  built = []

  def build():
    built.append(1)
    return lambda calls: float(calls)

  call = timing.lazily(build)
  assert not built
  assert statistics.median([call(2), call(2)]) == 2.0
  assert built == [1]
