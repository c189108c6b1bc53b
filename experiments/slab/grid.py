"""What is trained: the norms of SLAB's table, on MNIST in small.

Seeds are the outermost loop, so a grid that was stopped early has every arm
with fewer seeds and not fewer arms.
"""

import contextlib
import dataclasses
import pathlib
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from psa_jax.config import Config, RunError
from psa_jax.config.recipe import load_recipe

ROOT = pathlib.Path(__file__).resolve().parents[2]
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
SEEDS = range(5)
SAME = {'eval.every': '0', 'log.tensorboard': 'false', 'log.every': '100'}
TEST = 1000  # pictures of the test split
BATCHES = 54  # of an epoch: statistics anew are those of all pictures


class Cell(NamedTuple):
  """One run."""

  arm: str
  seed: int

  def config(self, changes: Sequence[tuple[str, str]] = ()) -> Config:
    """Its configuration."""
    name, share, eta = ARMS[self.arm]
    own = [*SAME.items(), ('seed', str(self.seed))]
    spec = f'{ROOT / RECIPE}:{name}' if name else str(ROOT / RECIPE)
    config = load_recipe(spec, [*own, *changes])
    if share is None:
      return config
    steps = round(share * sum(config.train.steps))
    own.append(('model.norm.decay_steps', str(steps)))
    if eta is not None:
      own.append(('model.norm.eta_init', str(eta)))
    return load_recipe(spec, [*own, *changes])


def cells(
  arms: Sequence[str] = tuple(ARMS), seeds: Sequence[int] = SEEDS
) -> Iterator[Cell]:
  """All runs, in the order in which they are made."""
  for seed in seeds:
    for arm in arms:
      yield Cell(arm, seed)


def train(
  cell: Cell, changes: Sequence[tuple[str, str]] = ()
) -> dict[str, Any]:
  """One run by the project's trainer, and one look at the test split."""
  from psa_jax.train import loop

  config = cell.config(changes)
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    # What it says goes to standard error; standard output is the answer's.
    with contextlib.redirect_stdout(sys.stderr):
      try:
        result = loop.train_and_evaluate(config, folder)
      except RunError as e:
        return {'diverged': str(e)}
      found = judge(config, folder, reestimate=0)
      anew = None
      if cell.arm != 'layernorm':
        anew = judge(config, folder, reestimate=BATCHES)
  return {
    'test': found,
    'test_anew': anew,
    'validation': result['validation']['dense']['accuracy'],
    'train_seconds': result['train_seconds'],
    'peak_bytes': result['peak_memory_bytes'],
  }


def judge(config: Config, folder: pathlib.Path, *, reestimate: int) -> float:
  """Accuracy of the last checkpoint on the test split."""
  from psa_jax.train import loop

  evaluation = dataclasses.replace(
    config.eval, split='test', windows=TEST, reestimate=reestimate
  )
  config = dataclasses.replace(config, eval=evaluation)
  found = loop.evaluate_checkpoint(config, folder)
  return found['validation']['dense']['accuracy']
