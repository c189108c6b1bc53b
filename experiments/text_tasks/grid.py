"""What is trained: the recipes on texts, dense and sparse.

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
RECIPES = {
  'classify': 'configs/classify_verses.py',
  'tag': 'configs/tag_stdlib.py',
  'translate': 'configs/translate_asv_bbe.py',
}
# Arguments of the recipe; '' is the default.
ARMS = {
  'classify': ('', 'topk', 'deep', 'cascade', 'cascade_random'),
  'tag': ('', 'topk'),
  'translate': ('', 'topk'),
}
SEEDS = range(3)
SHARES = ('density', 'cross_density', 'kept_tokens')


class Cell(NamedTuple):
  """One run."""

  task: str
  arm: str
  seed: int

  def config(self, changes: Sequence[tuple[str, str]] = ()) -> Config:
    """Its configuration."""
    spec = str(ROOT / RECIPES[self.task])
    spec += f':{self.arm}' if self.arm else ''
    return load_recipe(spec, [('seed', str(self.seed)), *changes])


def cells(
  tasks: Sequence[str] = tuple(ARMS), seeds: Sequence[int] = SEEDS
) -> Iterator[Cell]:
  """All runs, in the order in which they are made."""
  for seed in seeds:
    for task in tasks:
      for arm in ARMS[task]:
        yield Cell(task, arm, seed)


def train(
  cell: Cell, changes: Sequence[tuple[str, str]] = ()
) -> dict[str, Any]:
  """One run by the project's trainer, and one look at the test split.

  Raises:
    RunError: it was stopped.
  """
  from psa_jax.train import loop

  config = cell.config(changes)
  judged = dataclasses.replace(config.eval, split='test')
  # What it says goes to standard error; standard output is the answer's.
  with (
    tempfile.TemporaryDirectory() as name,
    contextlib.redirect_stdout(sys.stderr),
  ):
    folder = pathlib.Path(name)
    result = loop.train_and_evaluate(config, folder)
    if 'quality' not in result:
      raise RunError(f'stopped at step {result["step"]}')
    test = loop.evaluate_checkpoint(
      dataclasses.replace(config, eval=judged), folder
    )
  name, quality = config.model.attention.name, result['quality']
  last = result['validation'][name]
  [[kind, base], *_] = result['baselines'].items()
  return {
    'metric': quality,
    'validation': last[quality],
    'test': test['validation'][name][quality],
    'baseline': kind,
    'baseline_validation': base,
    'baseline_test': test['baselines'][kind],
    'train_seconds': result['train_seconds'],
    **{share: last[share] for share in SHARES if share in last},
  }
