"""Hashes of settings and runs in processes of their own."""

import os

import pytest

from experiments import grids
from psa_jax.config_dict import from_config_dict


def test_a_hash_is_of_what_is_not_default():
  plain = from_config_dict({})
  want = grids.settings(plain)
  same = from_config_dict({'train': {'steps': plain.train.steps}, 'seed': 3})
  assert grids.settings(same) == want
  found = {
    grids.settings(from_config_dict({}, [change]))
    for change in (
      ('model.d_model', '32'),
      ('model.num_layers', '32'),
      ('eval.windows', '32'),
      ('train.steps', '32'),
    )
  }
  assert len(found | {want}) == 5


def test_runs_come_as_they_end_and_share_the_cores():
  cores = []

  def start(item, core):
    cores.append(core)
    return {'double': 2 * item}

  found = dict(grids.each(range(6), start, workers=2))
  assert {k: row['double'] for k, row in found.items()} == {
    k: 2 * k for k in range(6)
  }
  assert all(row['seconds'] >= 0 for row in found.values())
  assert set(cores) <= os.sched_getaffinity(0)


@pytest.mark.parametrize(
  ('program', 'want'),
  [
    ('print("so far"); print("{\\"x\\": 1}")', {'x': 1}),
    ('raise SystemExit("it broke")', {'error': 'it broke'}),
    ('raise SystemExit(3)', {'error': 'exit code 3'}),
  ],
)
def test_a_process_answers_with_its_last_line(program, want, tmp_path):
  path = tmp_path / 'program.py'
  alone = 'import os\nassert len(os.sched_getaffinity(0)) == 1\n'
  path.write_text(alone + program)
  core = min(os.sched_getaffinity(0))
  assert grids.process(str(path), ['--more'], core) == want
