"""Calls that keep a GPU busy: what its host does meanwhile does not count."""

import time

import jax

from experiments.speed_64k.timing import Call

STEPS = 16  # decoding steps that one program makes


def queued(function, *args) -> Call:
  """A contender whose calls are all started before the last is waited for."""

  def call(calls):
    began = time.perf_counter()
    for _ in range(calls):
      out = function(*args)
    jax.block_until_ready(out)
    return (time.perf_counter() - began) / calls

  return call


def chained(step, at, *rest) -> Call:
  """A contender that decodes several tokens in one program.

  A step takes some ten microseconds, less than its start from Python. So a
  program makes `STEPS` of them, each with a query that depends on the output
  before it.

  Args:
    step: takes the query, `at` and `rest`; gives an output like the query.
    at: whose `q` the first step takes.
    *rest: further arguments.
  """

  @jax.jit
  def steps(q, at, *rest):
    for _ in range(STEPS):
      q = q + 0.001 * step(q, at, *rest)
    return q

  run = queued(steps, at.q, at, *rest)
  return lambda calls: run(calls) / STEPS
