"""What is trained: the norms of SLAB's table, on MNIST in small."""

import dataclasses
import pathlib
from typing import NamedTuple

from experiments.bench.grid import Grid, Run, trained
from experiments.bench.rows import Row
from experiments.bench.settings import Changes
from psa_jax.config import Config, RunError

RECIPE = 'configs/vit_mnist.py'
STEPS = 1000


class Arm(NamedTuple):
  """What is compared.

  Attributes:
    recipe: argument of the recipe.
    share: of the steps, over which gamma falls.
    eta: where RepBN's weight of the identity begins; None is the recipe's 1.
  """

  recipe: str
  share: float | None = None
  eta: float | None = None


ARMS = {
  'layernorm': Arm('layernorm'),
  'batchnorm': Arm('batchnorm'),
  'repbn': Arm('repbn'),
  'prepbn_16': Arm('', 0.16),
  'prepbn_80': Arm('', 0.8),
  'prepbn_16_eta0': Arm('', 0.16, 0.0),
  'prepbn_80_eta0': Arm('', 0.8, 0.0),
}
SAME = (
  ('eval.every', '0'),
  ('log.tensorboard', 'false'),
  ('log.every', '100'),
)
TEST = 1000  # pictures of the test split
BATCHES = 54  # of an epoch: recalibration reads all pictures


def configure(run: Run, changes: Changes = ()) -> Config:
  """A run's configuration: gamma falls over a share of the steps."""
  name, share, eta = ARMS[run.arm]
  spec = f'{RECIPE}:{name}' if name else RECIPE
  config = run.recipe(spec, [*SAME, *changes])
  if share is None:
    return config
  steps = round(share * sum(config.train.steps))
  own = [('model.norm.decay_steps', str(steps))]
  if eta is not None:
    own.append(('model.norm.eta_init', str(eta)))
  return run.recipe(spec, [*SAME, *own, *changes])


def train(run: Run, config: Config) -> Row:
  """One run by the project's trainer, and one look at the test split."""
  try:
    with trained(config) as (result, folder):
      test = judge(config, folder, batches=0)
      recalibrated = None
      if run.arm != 'layernorm':
        recalibrated = judge(config, folder, batches=BATCHES)
  except RunError as error:
    return {'diverged': str(error)}
  return {
    'test': test,
    'test_anew': recalibrated,
    'validation': result['validation']['dense']['accuracy'],
    'train_seconds': result['train_seconds'],
    'peak_bytes': result['peak_memory_bytes'],
  }


def judge(config: Config, folder: pathlib.Path, *, batches: int) -> float:
  """Accuracy of the last checkpoint on the test split."""
  from psa_jax.train import loop

  evaluation = dataclasses.replace(
    config.eval, split='test', windows=TEST, recalibrate_bn=batches
  )
  config = dataclasses.replace(config, eval=evaluation)
  result = loop.evaluate_checkpoint(config, folder)
  return result['validation']['dense']['accuracy']


GRID = Grid(
  experiment='slab',
  what='run',
  arms={'': tuple(ARMS)},
  configure=configure,
  train=train,
  quality=lambda row: str(row.get('diverged', row.get('test'))),
)
