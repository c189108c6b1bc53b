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

Call = Callable[[int], float]


class Unavailable(Exception):
  """A contender that cannot run, with the reason in one line."""


class Timing(NamedTuple):
  """What was found for one contender: seconds of every round, or an error."""

  seconds: list[float]
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
  made = functools.cache(build)
  return lambda calls: made()(calls)


def timed(function, *args) -> Call:
  """A contender that calls a JAX function and waits for the result."""

  def call(calls):
    began = time.perf_counter()
    for _ in range(calls):
      jax.block_until_ready(function(*args))
    return (time.perf_counter() - began) / calls

  return call


def rounds_for(took: float, most: int) -> int:
  """Rounds of a contender whose call took so many seconds."""
  if took > TOO_LONG:
    return 1
  return min(most, max(FEWEST, int(BUDGET_SECONDS / max(took, 1e-9))))


def interleave(
  contenders: Mapping[tuple[str, str], Call],
  most: int = MOST,
  repeats: int = 0,
) -> dict[tuple[str, str], Timing]:
  """Times all contenders in turn.

  Args:
    contenders: by name.
    most: most rounds of a contender; long calls get fewer.
    repeats: rounds of every contender, whatever it costs; 0 for the above.

  Returns:
    What was found, in the same order. One that fails has an error and takes
    no further part.
  """
  found = {key: Timing([]) for key in contenders}
  plan = {}
  for key, call in contenders.items():
    took = _attempt(found, key, call, 1)
    if took is not None and took < COMPILED:
      took = _attempt(found, key, call, 1)
    if took is not None:
      calls = max(1, math.ceil(SAMPLE_SECONDS / max(took, 1e-6)))
      plan[key] = repeats or rounds_for(took, most), calls
      _say('warm-up', key, took)
  for number in range(max((rounds for rounds, _ in plan.values()), default=0)):
    for key, (rounds, calls) in plan.items():
      if number >= rounds or found[key].error is not None:
        continue
      took = _attempt(found, key, contenders[key], calls)
      if took is not None:
        found[key].seconds.append(took)
        _say(f'round {number + 1} of {rounds}', key, took)
  return found


def _attempt(found, key, call, calls):
  """Seconds of a call, or None with its error noted."""
  try:
    return call(calls)
  except (Unavailable, jax.errors.JaxRuntimeError) as error:
    reason = str(error).splitlines()[0]
    found[key] = Timing([], reason)
    print(f'{" ".join(key)}: {reason}', file=sys.stderr, flush=True)
    return None


def _say(label, key, took):
  print(f'{label}: {" ".join(key)} {took:.4g} s', file=sys.stderr, flush=True)
