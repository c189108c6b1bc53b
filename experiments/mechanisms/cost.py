"""What a train step of the text recipes costs at 8,192 tokens, arm by arm.

Everything is at the setting that a recipe ends with. Forward is the loss of one
window as in validation, forward and backward a whole train step, the optimiser
included: the model is small, so attention is most of it. Arms are interleaved.
"""

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp

from experiments.mechanisms.grid import Cell
from experiments.speed_64k import training
from experiments.speed_64k.timing import interleave, timed
from psa_jax.train import state as state_lib
from psa_jax.train import step as step_lib

ROUNDS = 5


def measure(
  arms: Sequence[str], changes: Sequence[tuple[str, str]] = ()
) -> Iterator[dict[str, Any]]:
  """A row for each arm, after all of them were timed in turn."""
  contenders, steps = {}, {}
  for arm in arms:
    config = Cell('text', arm, 0).config(changes)
    length = config.train.seq_len[-1]
    mechanism = config.model.attention.name
    step = training.TrainStep(config, mechanism, length)
    steps[arm] = step, config
    contenders[arm, 'forward'] = forward(step, length)
    contenders[arm, 'both'] = step
  found = interleave(contenders, ROUNDS)
  for arm, (step, config) in steps.items():
    length = config.train.seq_len[-1]
    errors = [
      found[arm, which].error
      for which in ('forward', 'both')
      if found[arm, which].error
    ]
    if errors:
      yield {'what': 'cost', 'arm': arm, 'error': errors[0]}
      continue
    times = {
      which: statistics.median(found[arm, which].seconds)
      for which in ('forward', 'both')
    }
    yield {
      'what': 'cost',
      'arm': arm,
      'length': length,
      **times,
      'seconds': {
        which: found[arm, which].seconds for which in ('forward', 'both')
      },
      'density': step.density,
      # The mean query sees half of the keys.
      'keys': (step.density or 0) * (length + 1) / 2,
      'temporary_bytes': training.temporaries(config, length),
    }


def forward(step: training.TrainStep, length: int):
  """The loss of one window, as validation reads it."""
  config = step.config
  task, program, _, batch = training.parts(config, length)
  state = state_lib.init_state(config, task.vocab_size, program)
  state = state._replace(step=jnp.int32(sum(config.train.steps)))
  mechanism = config.model.attention.name
  loss = step_lib.make_eval_step(task, program, mechanism=mechanism)
  return timed(loss, state, batch)
