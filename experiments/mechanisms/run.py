"""Every attention mechanism on text and recall, at what it costs.

  python experiments/mechanisms/run.py                  train, then measure
  python experiments/mechanisms/run.py --what=quality   the grid alone
  python experiments/mechanisms/run.py --what=cost      times, a quiet machine
  python experiments/mechanisms/run.py --what=          tables and picture

The same command goes on where it stopped: a run whose settings have not changed
is not made again. Every run is a process on one core, `--workers` at a time.
"""

import json
import pathlib
import sys

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))

from absl import app, flags  # noqa: E402

from experiments import grids  # noqa: E402
from experiments.mechanisms import grid, rows  # noqa: E402

WHAT = ('quality', 'cost')
SOURCES = [
  'psa_jax',
  'configs',
  'experiments/grids.py',
  ':(glob)experiments/mechanisms/*.py',
]

_WHAT = flags.DEFINE_list('what', list(WHAT), 'What to find out.')
_TASKS = flags.DEFINE_list('tasks', list(grid.TASKS), 'Tasks of the grid.')
_ARMS = flags.DEFINE_list('arms', list(grid.ARMS), 'Mechanisms and controls.')
_SEEDS = flags.DEFINE_integer('seeds', len(grid.SEEDS), 'Runs of each cell.')
_WORKERS = flags.DEFINE_integer('workers', 2, 'Runs at a time.', lower_bound=1)
_RESULTS = flags.DEFINE_string(
  'results', str(HERE / 'results.jsonl'), 'File that rows are added to.'
)
_CELL = flags.DEFINE_string('cell', '', 'Internal: task,arm,seed of one run.')
_SET = flags.DEFINE_multi_string('set', [], 'KEY=VALUE laid on every recipe.')


def main(argv):
  """Does what was asked for, and renews the page."""
  if len(argv) > 1:
    raise app.UsageError(f'unknown argument {argv[1]!r}')
  if _CELL.value:
    task, arm, seed = _CELL.value.split(',')
    found = grid.train(grid.Cell(task, arm, int(seed)), changes())
    print(json.dumps(found))
    return
  for flag, known in ((_WHAT, WHAT), (_TASKS, grid.TASKS), (_ARMS, grid.ARMS)):
    for name in flag.value:
      if name not in known:
        raise app.UsageError(f'--{flag.name}={name} is none of {[*known]}')
  results = pathlib.Path(_RESULTS.value)
  from psa_jax import report

  stamp = report.provenance(ROOT, SOURCES)
  if 'quality' in _WHAT.value:
    run_grid(results, stamp)
  if 'cost' in _WHAT.value:
    from experiments.mechanisms import cost

    for row in cost.measure(_ARMS.value, changes()):
      grids.append(results, row | stamp)
  write_page(results)


def changes():
  """(key, value) pairs of `--set`."""
  return [tuple(x.split('=', 1)) for x in _SET.value]


def run_grid(results, stamp):
  """Makes the runs that are missing."""
  have = rows.done(grids.read(results))
  found = {
    cell: grids.settings(cell.config(changes()))
    for cell in grid.cells(_TASKS.value, _ARMS.value, range(_SEEDS.value))
  }

  grids.fill(
    results,
    found,
    grids.starter(__file__, _SET.value),
    have=have,
    workers=_WORKERS.value,
    stamp=stamp,
    what='quality',
    say=lambda row: str(row['quality']),
  )


def write_page(results):
  """Tables and picture from the rows."""
  from experiments.mechanisms import plot, tables
  from psa_jax import report

  found = rows.newest(grids.read(results))
  for name, text in tables.sections(found).items():
    print(f'{text}\n')
    if results.parent == HERE:
      report.replace_section(HERE / 'README.md', name, text)
  if results.parent == HERE and found:
    plot.draw(found, HERE / 'mechanisms.png')


if __name__ == '__main__':
  app.run(main)
