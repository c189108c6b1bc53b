"""The top-k experiment runs on few rows."""

import pytest

from experiments.bench import cli
from experiments.topk.__main__ import EXPERIMENT


@pytest.mark.tier('default')
def test_every_case_runs(capsys):
  assert cli.main(EXPERIMENT, ['--quick']) == 0
  shown = capsys.readouterr().out
  assert shown.count('psa_jax top_k') == 9
  assert '| short rows | 64 x 1,024 | 32 |' in shown
