"""LayerNorm, BatchNorm, RepBN and PRepBN on pictures, and what folding saves.

  python -m experiments.slab                       train, then time
  python -m experiments.slab --set what=runs       the grid alone
  python -m experiments.slab --set what=latency    times, a quiet machine

The same command goes on where it stopped: a run whose settings have not changed
is not made again. Every run is a process on one core, `workers` at a time.
"""

import dataclasses
import sys

from experiments.bench import cli, rows
from experiments.bench.experiment import Experiment
from experiments.bench.settings import GridSettings, option
from experiments.slab import tables
from experiments.slab.grid import GRID

WHAT = ('runs', 'latency')
KEY = ('what', 'size', 'batch')


@dataclasses.dataclass(frozen=True)
class SlabSettings(GridSettings):
  """What `--set` changes."""

  what: tuple[str, ...] = option(WHAT, 'What to find out.', choices=WHAT)
  seeds: int = option(5, 'Runs of each arm.', least=1)


def run(settings, book):
  """Makes the runs that are missing, and times the models."""
  if 'runs' in settings.what:
    GRID.fill(settings, book)
  if 'latency' in settings.what:
    from experiments.slab import latency

    for row in latency.measure():
      book.add(row)


def newest(found):
  """Runs of unchanged settings, and the last time of each size."""
  times = [row for row in found if row['what'] == 'latency']
  return GRID.newest(found) + rows.newest(times, KEY)


EXPERIMENT = Experiment(
  name='slab',
  about='is PRepBN as good as LayerNorm on pictures, and faster once folded',
  settings=SlabSettings(),
  quick=SlabSettings(
    what=('runs',),
    arms=('layernorm', 'prepbn_80'),
    seeds=1,
    changes=(('data.source', 'digits'), ('data.shift', '0'))
    + (('model.image.size', '8'), ('model.image.patch', '4'))
    + (('model.num_layers', '1'), ('train.seq_len', '4'))
    + (('train.steps', '5'), ('optim.warmup_steps', '1')),
  ),
  run=run,
  sections=tables.sections,
  key=KEY,
  newest=newest,
  child=GRID.child,
)

if __name__ == '__main__':
  sys.exit(cli.main(EXPERIMENT))
