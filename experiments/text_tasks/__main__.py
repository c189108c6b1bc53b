"""Classification, tagging and translation, dense and sparse, several seeds.

  python -m experiments.text_tasks                         the whole grid
  python -m experiments.text_tasks --set tasks=classify    a part of it

The same command goes on where it stopped: a run whose settings have not changed
is not made again. Every run is a process on one core, `workers` at a time.
"""

import sys

from experiments.bench import cli
from experiments.bench.experiment import Experiment
from experiments.bench.settings import GridSettings
from experiments.text_tasks import tables
from experiments.text_tasks.grid import GRID

EXPERIMENT = Experiment(
  name='text_tasks',
  about='what the recipes on texts reach, and what their sparse arms lose',
  settings=GridSettings(),
  quick=GridSettings(
    tasks=('tag',),
    seeds=1,
    changes=(('model.d_model', '8'), ('model.mlp_dim', '8'))
    + (('train.steps', '4'), ('train.batch_size', '8'))
    + (('optim.warmup_steps', '1'), ('eval.windows', '24'))
    + (('eval.every', '0'),),
  ),
  run=GRID.fill,
  sections=tables.sections,
  newest=GRID.newest,
  child=GRID.child,
)

if __name__ == '__main__':
  sys.exit(cli.main(EXPERIMENT))
