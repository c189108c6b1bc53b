"""Every attention mechanism on text and recall, at what it costs.

  python -m experiments.mechanisms                       train, then measure
  python -m experiments.mechanisms --set what=quality    the grid alone
  python -m experiments.mechanisms --set what=cost       times, a quiet machine

The same command goes on where it stopped: a run whose settings have not changed
is not made again. Every run is a process on one core, `workers` at a time.
"""

import dataclasses
import sys

from experiments.bench import cli, rows
from experiments.bench.experiment import Experiment
from experiments.bench.settings import GridSettings, option
from experiments.mechanisms import plot, tables
from experiments.mechanisms.grid import ARMS, GRID

WHAT = ('quality', 'cost')
KEY = ('what', 'task', 'arm', 'seed')


@dataclasses.dataclass(frozen=True)
class MechanismSettings(GridSettings):
  """What `--set` changes."""

  what: tuple[str, ...] = option(WHAT, 'What to find out.', choices=WHAT)


def run(settings, book):
  """Makes the runs that are missing, and times the arms."""
  if 'quality' in settings.what:
    GRID.fill(settings, book)
  if 'cost' in settings.what:
    from experiments.mechanisms import cost

    for row in cost.measure(settings.arms or ARMS, settings.changes):
      book.add(row)


def newest(found):
  """Runs of unchanged settings, and the last cost of each arm."""
  costs = [row for row in found if row['what'] == 'cost']
  return GRID.newest(found) + rows.newest(costs, KEY)


EXPERIMENT = Experiment(
  name='mechanisms',
  about='what every mechanism loses on text and recall, and what it costs',
  settings=MechanismSettings(),
  quick=MechanismSettings(
    what=('quality',),
    tasks=('mqar',),
    arms=('psa', 'psa_bounds'),
    seeds=1,
    changes=(('train.steps', '4,4'), ('train.batch_size', '8,8'))
    + (('optim.warmup_steps', '1'), ('eval.windows', '8'))
    + tuple(
      (f'model.attention.psa.keep.{name}', value)
      for name, value in (('begin', '1'), ('length', '2'))
    ),
  ),
  run=run,
  sections=tables.sections,
  key=KEY,
  newest=newest,
  pictures={'mechanisms.png': plot.draw},
  child=GRID.child,
)

if __name__ == '__main__':
  sys.exit(cli.main(EXPERIMENT))
