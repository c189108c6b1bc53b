"""A run that dies five times ends as one that nobody disturbed, bit for bit."""

import pytest

from tests.fuzz import kills


# tests/train/test_loop.py kills five times in the suite; this is the harness of
# `make soak` itself, with moments of its own.
@pytest.mark.tier('ci')
def test_five_kills_lose_nothing(tmp_path):
  right = kills.whole(tmp_path / 'whole')
  assert right.touches > 20
  # The first start is the longest one; later ones go on from a checkpoint.
  moments = [0.02, 0.3, 0.4, 0.5, 0.6]
  found = kills.killed(
    tmp_path / 'run',
    [kills.Kill(touch=int(right.touches * share)) for share in moments],
    right,
  )
  assert found == kills.Outcome(len(moments), [])


def test_a_fault_is_seen(tmp_path):
  """Of the comparison itself: no run is needed."""
  assert kills.faults_of(None, '', 0) == ['hang: nothing for 300 s']
  assert kills.faults_of(1, 'Traceback (most', 0)[0].startswith('traceback')
  for text in ('compiling', 'going on from step 2'):
    assert kills.faults_of(0, text, 4)[0].startswith('lost: step 4')
  assert kills.faults_of(0, 'going on from step 4, compiling', 4) == []
