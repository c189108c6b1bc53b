"""Seconds of interleaved contenders: A B C A B C, medians after a warm-up.

A contender is a function that takes a number of calls and returns the seconds
of one of them. What takes long is timed for fewer rounds, so that a whole
table has a bounded cost: see `rounds_for`.
"""

import functools
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

BUDGET_SECONDS = 20  # of one contender's rounds
FEWEST, MOST = 3, 9
TOO_LONG = 30  # seconds of one call that is timed once
SAMPLE_SECONDS = 0.02  # calls shorter than this are timed several at once
COMPILED = 2.5  # a first call within these seconds is repeated: compilation
CHAIN = 16  # decoding steps that one program of `chained` makes

Call = Callable[[int], float]
Subject = tuple[str, str]  # contender, pass


class Unavailable(Exception):
  """A contender that cannot run, with the reason in one line."""


class Timing(NamedTuple):
  """What was measured of one contender, or the error that it ended with.

  Attributes:
    seconds: of one call, a number for every round.
    cpu: likewise, of the processors' time that this process had.
    error: why there are none.
  """

  seconds: list[float]
  cpu: list[float]
  error: str | None = None

  def row(self) -> dict[str, Any]:
    """The fields of a result."""
    if self.error is not None:
      return {'error': self.error}
    return {
      'seconds': self.seconds,
      'median': statistics.median(self.seconds),
    }


def lazily(build: Callable[[], Call]) -> Call:
  """The contender that `build` makes at its first call."""
  call = functools.cache(build)
  return lambda calls: call()(calls)


def timed(function, *args) -> Call:
  """A contender that calls a JAX function and waits for each result."""

  def call(calls):
    began = time.perf_counter()
    for _ in range(calls):
      jax.block_until_ready(function(*args))
    return (time.perf_counter() - began) / calls

  return call


def queued(function, *args) -> Call:
  """A contender whose calls are all started before the last is waited for.

  For GPUs: what the host does between two calls does not count.
  """

  def call(calls):
    began = time.perf_counter()
    for _ in range(calls):
      out = function(*args)
    jax.block_until_ready(out)
    return (time.perf_counter() - began) / calls

  return call


def chained(step, q, *rest) -> Call:
  """A contender that decodes several tokens in one program.

  A step on a GPU takes some ten microseconds, less than its start from Python.
  So a program makes `CHAIN` of them, each with a query that depends on the
  output before it.

  Args:
    step: takes the query and `rest`; gives an output like the query.
    q: what the first step takes.
    *rest: further arguments.
  """

  @jax.jit
  def steps(q, *rest):
    for _ in range(CHAIN):
      q = q + 0.001 * step(q, *rest)
    return q

  run = queued(steps, q, *rest)
  return lambda calls: run(calls) / CHAIN


def rounds_for(took: float, most: int) -> int:
  """Rounds of a contender whose call took so many seconds."""
  if took > TOO_LONG:
    return 1
  return min(most, max(FEWEST, int(BUDGET_SECONDS / max(took, 1e-9))))


def interleave(
  contenders: Mapping[Subject, Call], most: int = MOST, repeats: int = 0
) -> dict[Subject, Timing]:
  """Times all contenders in turn.

  Args:
    contenders: by name and pass.
    most: most rounds of a contender; long calls get fewer.
    repeats: rounds of every contender, whatever it costs; 0 for the above.

  Returns:
    Timings in the same order. A contender that fails has an error and takes
    no further part.
  """
  timings = {subject: Timing([], []) for subject in contenders}
  plan = {}
  for subject, call in contenders.items():
    took = _attempt(timings, subject, call, 1)
    if took is not None and took[0] < COMPILED:
      took = _attempt(timings, subject, call, 1)
    if took is not None:
      calls = max(1, math.ceil(SAMPLE_SECONDS / max(took[0], 1e-6)))
      plan[subject] = repeats or rounds_for(took[0], most), calls
      _log('warm-up', subject, took[0])
  for number in range(max((rounds for rounds, _ in plan.values()), default=0)):
    for subject, (rounds, calls) in plan.items():
      if number >= rounds or timings[subject].error is not None:
        continue
      took = _attempt(timings, subject, contenders[subject], calls)
      if took is not None:
        timings[subject].seconds.append(took[0])
        timings[subject].cpu.append(took[1])
        _log(f'round {number + 1} of {rounds}', subject, took[0])
  return timings


def _attempt(timings, subject, call, calls):
  """(seconds, CPU seconds) of one call, or None with its error noted."""
  used = time.process_time()
  try:
    seconds = call(calls)
  except (Unavailable, jax.errors.JaxRuntimeError) as error:
    reason = str(error).split('\n')[0]
    timings[subject] = Timing([], [], reason)
    print(f'{" ".join(subject)}: {reason}', file=sys.stderr, flush=True)
    return None
  return seconds, (time.process_time() - used) / calls


def _log(label, subject, took):
  print(
    f'{label}: {" ".join(subject)} {took:.4g} s', file=sys.stderr, flush=True
  )
