"""Runs on disk: started, killed and compared by the tests of the loop."""

import json
import os
import subprocess
import sys

from psa_jax.train import metrics
from psa_jax.train import run as run_lib
from psa_jax.train.checkpoint import Checkpoints
from tests.conftest import ROOT
from tests.train import tiny

TIMES = {
  'seconds_per_step',
  'tokens_per_second',
  'compile_seconds',
  'seconds_per_window',
}


def rows(folder):
  """Metrics without the times, which no two runs share."""
  found = metrics.read_rows(folder / metrics.METRICS)
  return [{k: v for k, v in row.items() if k not in TIMES} for row in found]


def saved(config, folder):
  """The newest checkpoint of a run."""
  steps = tiny.Steps(config)
  checkpoints = Checkpoints(folder / run_lib.CHECKPOINTS, read_only=True)
  return checkpoints.restore_latest(steps.program.abstract)


def assert_same_run(config, left, right):
  a, b = saved(config, left), saved(config, right)
  tiny.assert_identical(a.state, b.state)
  assert (a.step, a.data) == (b.step, b.data)
  assert rows(left) == rows(right)
  results = [json.loads((f / 'result.json').read_text()) for f in (left, right)]
  for result in results:
    for found in result['validation'].values():
      found.pop('seconds_per_window')
  assert results[0]['validation'] == results[1]['validation']


def start(*args, **environment):
  """A run in a process of its own; see `driver`."""
  return subprocess.Popen(
    [sys.executable, '-m', 'tests.train.driver', *map(str, args)],
    cwd=ROOT,
    env={**os.environ, **environment},
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def interrupted(folder, text, number, when, *, config='config'):
  """Exit code and output of a run that sends itself a signal."""
  process = start(config, folder, text, int(number), when)
  output, _ = process.communicate(timeout=300)
  return process.returncode, output
