"""Speed and memory of sparse attention against dense, 2k to 64k tokens.

  make bench-peers                     once, for the PyTorch rows
  python -m experiments.speed_64k      everything, about 25 minutes

Measures what `what` names (see `measurements.py`). Contenders of one length are
interleaved (A B C A B C ...) after a warm-up; the tables show medians. Nothing
else should use the machine. `--set resume=true` goes on with a run that was cut
off, at the same commit.
"""

import sys

from experiments.bench import cli
from experiments.bench.experiment import Experiment
from experiments.speed_64k import measurements, plot, tables
from experiments.speed_64k.measurements import SpeedSettings


def run(settings, book):
  """The chosen measurements, in their order."""
  for what, measure in measurements.MEASUREMENTS.items():
    if what in settings.what:
      measure(settings, book)


EXPERIMENT = Experiment(
  name='speed_64k',
  about='speed and memory of sparse attention against dense, two CPU cores',
  settings=SpeedSettings(),
  quick=SpeedSettings(
    what=('lengths', 'decode', 'peak'),
    lengths=(1024,),
    blocks=(14,),
    repeats=1,
    length=1024,
    peers='',
  ),
  run=run,
  sections=tables.sections,
  key=('what', 'length', 'contender', 'pass'),
  one_commit=True,
  pictures={'speed.png': plot.draw},
  child=lambda settings, name: measurements.CHILDREN[name](settings),
)

if __name__ == '__main__':
  sys.exit(cli.main(EXPERIMENT))
