"""Classification, tagging and translation, dense and sparse, several seeds.

  python experiments/text_tasks/run.py                    the whole grid
  python experiments/text_tasks/run.py --tasks=classify   a part of it
  python experiments/text_tasks/run.py --tasks=           the page again

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
from experiments.text_tasks import grid  # noqa: E402

SOURCES = [
  'psa_jax',
  'configs',
  'experiments/grids.py',
  ':(glob)experiments/text_tasks/*.py',
]

_TASKS = flags.DEFINE_list('tasks', list(grid.ARMS), 'Tasks of the grid.')
_ARMS = flags.DEFINE_list('arms', [], 'Arms; all where none is named.')
_SEEDS = flags.DEFINE_integer('seeds', len(grid.SEEDS), 'Runs of each arm.')
_WORKERS = flags.DEFINE_integer('workers', 2, 'Runs at a time.', lower_bound=1)
_RESULTS = flags.DEFINE_string(
  'results', str(HERE / 'results.jsonl'), 'File that rows are added to.'
)
_CELL = flags.DEFINE_string('cell', '', 'Internal: task,arm,seed of one run.')


def main(argv):
  """Makes the runs that are missing, and renews the page."""
  if len(argv) > 1:
    raise app.UsageError(f'unknown argument {argv[1]!r}')
  if _CELL.value:
    task, arm, seed = _CELL.value.split(',')
    print(json.dumps(grid.train(grid.Cell(task, arm, int(seed)))))
    return
  known = {arm or 'default' for arms in grid.ARMS.values() for arm in arms}
  for flag, names in ((_TASKS, grid.ARMS), (_ARMS, known)):
    for name in flag.value:
      if name not in names:
        raise app.UsageError(f'--{flag.name}={name} is none of {[*names]}')
  results = pathlib.Path(_RESULTS.value)
  if _TASKS.value:
    run_grid(results)
  write_page(results)


def run_grid(results):
  """Makes the runs that are missing."""
  from psa_jax import report

  wanted = {
    cell: grids.settings(cell.config())
    for cell in grid.cells(_TASKS.value, range(_SEEDS.value))
    if not _ARMS.value or (cell.arm or 'default') in _ARMS.value
  }
  have = {
    (grid.Cell(row['task'], row['arm'], row['seed']), row['settings'])
    for row in grids.read(results)
    if 'error' not in row
  }

  grids.fill(
    results,
    wanted,
    grids.starter(__file__),
    have=have,
    workers=_WORKERS.value,
    stamp=report.provenance(ROOT, SOURCES),
    what='run',
    say=lambda row: f'{row["metric"]} {row["validation"]:.4g}',
  )


def write_page(results):
  """Tables from the rows."""
  from experiments.text_tasks import tables
  from psa_jax import report

  for name, text in tables.sections(grids.read(results)).items():
    print(f'{text}\n')
    if results.parent == HERE:
      report.replace_section(HERE / 'README.md', name, text)


if __name__ == '__main__':
  app.run(main)
