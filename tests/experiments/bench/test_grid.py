"""Hashes of settings, missing runs, and runs in processes of their own."""

import dataclasses
import os
import time

import pytest

from experiments.bench import grid as lib
from experiments.bench import rows
from experiments.bench.grid import Grid, Run
from experiments.bench.rows import Book
from experiments.bench.settings import GridSettings
from psa_jax.config import ConfigError, from_config_dict

pytestmark = pytest.mark.tier('default')


def test_a_hash_is_of_what_is_not_default():
  plain = from_config_dict({})
  want = lib.digest(plain)
  same = from_config_dict({'train': {'steps': plain.train.steps}, 'seed': 3})
  assert lib.digest(same) == want
  found = {
    lib.digest(from_config_dict({}, [change]))
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

  found = dict(lib.each(range(6), start, workers=2))
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
    ('raise SystemExit(3)', {'error': 'exit 3'}),
  ],
)
def test_a_process_answers_with_its_last_line(program, want, tmp_path):
  path = tmp_path / 'program.py'
  alone = 'import os\nassert len(os.sched_getaffinity(0)) == 1\n'
  path.write_text(alone + program)
  core = min(os.sched_getaffinity(0))
  assert lib.process([str(path), '--more'], core) == want


def made(train=None):
  """A grid of two arms, of the arm `b` of which no run ends."""
  return Grid(
    experiment='made',
    what='run',
    arms={'': ('a', 'b')},
    configure=lambda run, changes: from_config_dict(
      {'name': run.arm, 'seed': run.seed}, changes
    ),
    train=train or (lambda run, config: {'quality': 0.5}),
    quality=lambda row: f'quality {row["quality"]}',
  )


def test_missing_runs_are_made_and_others_are_not(
  tmp_path, capsys, monkeypatch
):
  path, started = tmp_path / 'results.jsonl', []

  def process(command, core):
    started.append(command)
    return {'error': 'it broke'} if ',b,' in command[2] else {'quality': 0.5}

  monkeypatch.setattr(lib, 'process', process)
  grid, settings = made(), GridSettings(seeds=2, workers=1)

  def fill(**changes):
    book = Book(path, (), {'commit': 'abc'})
    grid.fill(dataclasses.replace(settings, **changes), book)
    return [command[2] for command in started]

  fill(seeds=1, arms=('a',))
  assert started.pop() == [
    '-m', 'experiments.made', '--child=,a,0',
    '--set=arms=a', '--set=seeds=1', '--set=workers=1',
  ]  # fmt: skip
  wanted = ['--child=,b,0', '--child=,a,1', '--child=,b,1']
  assert fill() == wanted
  first, row, *_ = rows.read(path)
  assert row.pop('seconds') >= 0
  hashed = lib.digest(grid.configure(Run('', 'b', 0), ()))
  about = {'what': 'run', 'arm': 'b', 'seed': 0, 'settings': hashed}
  for key, value in {**about, 'error': 'it broke', 'commit': 'abc'}.items():
    assert row[key] == value
  assert 'task' not in row and first['settings'] != hashed
  said = capsys.readouterr().out
  assert '1 runs of 4 are there' in said
  assert '1/3 b 0: it broke' in said and '2/3 a 1: quality 0.5' in said
  started.clear()
  assert fill() == ['--child=,b,0', '--child=,b,1']
  started.clear()
  assert fill(arms=('a',), changes=(('train.steps', '99'),)) == [
    '--child=,a,0',
    '--child=,a,1',
  ]


def test_a_child_makes_one_run():
  def train(run, config):
    return {'steps': list(config.train.steps), 'run': list(run)}

  settings = GridSettings(changes=(('train.steps', '77'),))
  found = made(train).child(settings, ',a,4')
  assert found == {'steps': [77], 'run': ['', 'a', 4]}


def test_seeds_come_last_and_parts_are_chosen():
  grid = dataclasses.replace(made(), arms={'x': ('', 'a'), 'y': ('b',)})
  runs = list(grid.runs(GridSettings(seeds=2)))
  assert runs[:3] == [Run('x', '', 0), Run('x', 'a', 0), Run('y', 'b', 0)]
  assert {run.seed for run in runs[3:]} == {1} and len(runs) == 6
  part = grid.runs(GridSettings(seeds=1, arms=('default', 'b')))
  assert list(part) == [Run('x', '', 0), Run('y', 'b', 0)]
  (only,) = grid.runs(GridSettings(seeds=1, tasks=('y',)))
  assert only == Run('y', 'b', 0)
  for wrong in ({'tasks': ('z',)}, {'arms': ('c',)}):
    with pytest.raises(ConfigError, match='choose of'):
      list(grid.runs(GridSettings(**wrong)))


def test_only_seeds_of_the_same_settings_are_shown():
  def row(arm, seed, settings, quality):
    about = {'what': 'run', 'arm': arm, 'seed': seed, 'settings': settings}
    return {**about, 'quality': quality}

  found = [
    row('a', 0, 'old', 1),
    row('a', 1, 'old', 2),
    row('b', 0, 'x', 3),
    row('a', 0, 'new', 4),
    row('b', 0, 'x', 5),
    {'what': 'cost', 'arm': 'a'},
  ]
  assert [x['quality'] for x in made().newest(found)] == [5, 4]
  without = [{k: v for k, v in x.items() if k != 'settings'} for x in found]
  assert [x['quality'] for x in made().newest(without)] == [4, 2, 5]


def test_an_interrupted_grid_starts_no_more_runs():
  made = []

  def start(item, core):
    made.append(item)
    if item == 1:
      raise KeyboardInterrupt
    time.sleep(0.02)  # a run takes longer than it takes to hear of the last
    return {}

  with pytest.raises(KeyboardInterrupt):
    list(lib.each(range(50), start, workers=1))
  assert len(made) < 50
