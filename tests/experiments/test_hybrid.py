"""The hybrid experiment counts what it says, and trains what it compares."""

import numpy as np
import pytest

from experiments.bench.grid import Run
from experiments.hybrid import __main__ as run
from experiments.hybrid import counts

pytestmark = pytest.mark.tier('default')


def test_the_flattest_attention_reads_window_and_cap():
  """Zero queries ask for every block: forced + floor(visible / 4), by tile."""
  found = counts.cost(0.0, 4096)
  pairs = dense = 0
  for tile in range(32):
    first = tile * 128
    visible = (first + 127) // 64 + 1
    window = visible - max(first - 511, 0) // 64
    pairs += min(window + int(visible * 0.25), visible)
    dense += visible
  size = 128 * 64
  assert (found['pairs'], found['dense_pairs']) == (pairs * size, dense * size)
  selection = 32 * 64 * 64 + 4096 * 64
  assert found['multiply_adds'] == pairs * size * 128 + selection


def test_peaked_attention_reads_less():
  assert counts.cost(30.0, 4096)['pairs'] < counts.cost(0.0, 4096)['pairs']


def test_the_recorded_rows_support_the_claim():
  costs = [row for row in run.EXPERIMENT.recorded() if row['what'] == 'cost']
  assert {row['scale'] for row in costs} == set(run.SCALES)
  for row in costs:
    assert row['length'] == 65_536 and np.isfinite(row['entropy'])
    assert row['multiply_adds'] <= 0.5 * row['dense_multiply_adds'], 'the claim'


def test_the_cap_falls_over_half_of_the_steps():
  dense, hybrid = (
    run.configure(Run('', arm, 1), (('train.steps', '30'),)) for arm in run.ARMS
  )
  assert hybrid.model.attention.hybrid.keep.length == 15
  assert dense.seed == hybrid.seed == 1
  assert dense.train == hybrid.train and dense.data == hybrid.data
