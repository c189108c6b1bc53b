"""What a train step of the text recipes costs at 8,192 tokens, arm by arm.

Everything is at the setting that a recipe ends with. Forward is the loss of one
window as in validation, forward and backward a whole train step, the optimiser
included: the model is small, so attention is most of it. Arms are interleaved.
"""

import statistics
from collections.abc import Iterator, Sequence

from experiments.bench import training
from experiments.bench.grid import Run
from experiments.bench.rows import Row
from experiments.bench.settings import Changes
from experiments.bench.timing import interleave
from experiments.mechanisms.grid import configure

ROUNDS = 5
PASSES = ('forward', 'both')


def measure(arms: Sequence[str], changes: Changes = ()) -> Iterator[Row]:
  """A row for each arm, after all of them were timed in turn."""
  contenders, steps = {}, {}
  for arm in arms:
    config = configure(Run('text', arm, 0), changes)
    length = config.train.seq_len[-1]
    mechanism = config.model.attention.name
    step = training.TrainStep(config, mechanism, length)
    steps[arm] = step, config, length
    contenders[arm, 'forward'] = training.forward(step, length)
    contenders[arm, 'both'] = step
  timings = interleave(contenders, ROUNDS)
  for arm, (step, config, length) in steps.items():
    mine = {which: timings[arm, which] for which in PASSES}
    errors = [took.error for took in mine.values() if took.error]
    if errors:
      yield {'what': 'cost', 'arm': arm, 'error': errors[0]}
      continue
    yield {
      'what': 'cost',
      'arm': arm,
      'length': length,
      **{which: statistics.median(mine[which].seconds) for which in PASSES},
      'seconds': {which: mine[which].seconds for which in PASSES},
      'density': step.density,
      # The mean query sees half of the keys.
      'keys': (step.density or 0) * (length + 1) / 2,
      'temporary_bytes': training.temporaries(config, length),
    }
