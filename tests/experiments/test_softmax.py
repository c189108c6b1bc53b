"""The errors of SAS: none where nothing is cut, the cut-off where it is."""

import pytest

from experiments.bench import cli
from experiments.softmax import __main__ as lib

pytestmark = pytest.mark.tier('default')


def test_the_cut_off_is_what_costs():
  short, long = (lib.measure(length, 3, 8) for length in (64, 4096))
  for found in (short, long):
    assert found['output_without_cut'] < 1e-2
    # What is dropped is missing once, and the rest is that much too large.
    assert abs(found['probabilities'] - 2 * found['dropped']) < 1e-3
  assert long['dropped'] > short['dropped'] > 0


def test_it_runs(capsys):
  assert cli.main(lib.EXPERIMENT, ['--quick']) == 0
  assert '| 4 | 1,024 |' in capsys.readouterr().out
