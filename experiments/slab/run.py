"""LayerNorm, BatchNorm, RepBN and PRepBN on pictures, and what folding saves.

  python experiments/slab/run.py                  train, then time
  python experiments/slab/run.py --what=runs      the grid alone
  python experiments/slab/run.py --what=latency   times, a quiet machine
  python experiments/slab/run.py --what=          the page again

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
from experiments.slab import grid  # noqa: E402

WHAT = ('runs', 'latency')
SOURCES = [
  'psa_jax',
  'configs',
  'experiments/grids.py',
  ':(glob)experiments/slab/*.py',
]

_WHAT = flags.DEFINE_list('what', list(WHAT), 'What to find out.')
_SEEDS = flags.DEFINE_integer('seeds', len(grid.SEEDS), 'Runs of each arm.')
_WORKERS = flags.DEFINE_integer('workers', 2, 'Runs at a time.', lower_bound=1)
_RESULTS = flags.DEFINE_string(
  'results', str(HERE / 'results.jsonl'), 'File that rows are added to.'
)
_CELL = flags.DEFINE_string('cell', '', 'Internal: arm,seed of one run.')
_SET = flags.DEFINE_multi_string('set', [], 'KEY=VALUE laid on the recipe.')


def main(argv):
  """Does what was asked for, and renews the page."""
  if len(argv) > 1:
    raise app.UsageError(f'unknown argument {argv[1]!r}')
  changes = [(x.partition('=')[0], x.partition('=')[2]) for x in _SET.value]
  if _CELL.value:
    arm, seed = _CELL.value.split(',')
    print(json.dumps(grid.train(grid.Cell(arm, int(seed)), changes)))
    return
  for name in _WHAT.value:
    if name not in WHAT:
      raise app.UsageError(f'--what={name} is none of {[*WHAT]}')
  results = pathlib.Path(_RESULTS.value)
  from psa_jax import report

  stamp = report.provenance(ROOT, SOURCES)
  if 'runs' in _WHAT.value:
    run_grid(results, stamp, changes)
  if 'latency' in _WHAT.value:
    from experiments.slab import latency

    for row in latency.measure():
      grids.append(results, row | stamp)
      print(row, flush=True)
  write_page(results)


def run_grid(results, stamp, changes):
  """Makes the runs that are missing."""
  found = {
    cell: grids.settings(cell.config(changes))
    for cell in grid.cells(seeds=range(_SEEDS.value))
  }
  have = {
    (grid.Cell(row['arm'], row['seed']), row['settings'])
    for row in grids.read(results)
    if row['what'] == 'run' and 'error' not in row
  }

  grids.fill(
    results,
    found,
    grids.starter(__file__, _SET.value),
    have=have,
    workers=_WORKERS.value,
    stamp=stamp,
    what='run',
    say=lambda row: str(row.get('diverged', row.get('test'))),
  )


def write_page(results):
  """Tables from the rows."""
  from experiments.slab import tables
  from psa_jax import report

  for name, text in tables.sections(grids.read(results)).items():
    print(f'{text}\n')
    if results.parent == HERE:
      report.replace_section(HERE / 'README.md', name, text)


if __name__ == '__main__':
  app.run(main)
