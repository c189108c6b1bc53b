"""Hashes of settings, missing runs, and runs in processes of their own."""

import os
import time
from typing import NamedTuple

import pytest

from experiments import grids
from psa_jax.config import from_config_dict


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


class Cell(NamedTuple):
  """A run, for `fill`."""

  arm: str
  seed: int


def test_missing_runs_are_made_and_others_are_not(tmp_path, capsys):
  path, made = tmp_path / 'results.jsonl', []
  wanted = {Cell('a', 0): 'x', Cell('b', 0): 'x', Cell('a', 1): 'y'}

  def start(cell, core):
    made.append(cell)
    return {'error': 'it broke'} if cell.arm == 'b' else {'quality': 0.5}

  def fill(have):
    grids.fill(
      path,
      wanted,
      start,
      have=have,
      workers=1,
      stamp={'commit': 'abc'},
      what='run',
      say=lambda row: f'quality {row["quality"]}',
    )

  fill({(Cell('a', 0), 'x'), (Cell('a', 1), 'of other settings')})
  assert made == [Cell('b', 0), Cell('a', 1)]
  rows = grids.read(path)
  assert [row.pop('seconds') >= 0 for row in rows] == [True, True]
  same = {'what': 'run', 'commit': 'abc'}
  assert rows == [
    {**same, 'arm': 'b', 'seed': 0, 'settings': 'x', 'error': 'it broke'},
    {**same, 'arm': 'a', 'seed': 1, 'settings': 'y', 'quality': 0.5},
  ]
  said = capsys.readouterr().out
  assert '1 runs of 3 are there' in said
  assert '1/2 b 0: it broke' in said and '2/2 a 1: quality 0.5' in said
  fill({(cell, hashed) for cell, hashed in wanted.items()})
  assert len(made) == 2


def test_an_interrupted_grid_starts_no_more_runs():
  made = []

  def start(item, core):
    made.append(item)
    if item == 1:
      raise KeyboardInterrupt
    time.sleep(0.02)  # a run takes longer than it takes to hear of the last
    return {}

  with pytest.raises(KeyboardInterrupt):
    list(grids.each(range(50), start, workers=1))
  assert len(made) < 50


def test_a_program_is_told_its_run_and_what_to_change(monkeypatch):
  told = []
  monkeypatch.setattr(grids, 'process', lambda *words: told.append(words))
  grids.starter('run.py', ['a.b=1', 'c=2,3'])(Cell('', 4), 1)
  assert told == [('run.py', ['--cell=,4', '--set=a.b=1', '--set=c=2,3'], 1)]
