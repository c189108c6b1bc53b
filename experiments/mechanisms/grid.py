"""What is trained: every mechanism and control, on text and recall tasks.

Seeds are the outermost loop, so a grid that was stopped early has every cell
with fewer seeds and not fewer cells.
"""

import contextlib
import pathlib
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from psa_jax.config import Config
from psa_jax.config.recipe import load_recipe

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONTROLS = ('dense', 'window', 'random')
MECHANISMS = (
  'psa',
  'psa_bounds',
  'topk',
  'hybrid',
  'nsa',
  'nsa_tile',
  'dsa',
  'sla',
  'cascade',
)
ARMS = CONTROLS + MECHANISMS
# Recipe of each task; {} is the arm.
TASKS = {
  'text': 'configs/mechanisms.py:{}',
  'mqar': 'configs/recall.py:{},mqar',
  'needle': 'configs/recall.py:{},needle',
}
SEEDS = (0, 1, 2)
SAME = {'eval.dense': 'false', 'log.tensorboard': 'false'}


class Cell(NamedTuple):
  """One run."""

  task: str
  arm: str
  seed: int

  def config(self, changes: Sequence[tuple[str, str]] = ()) -> Config:
    """Its configuration."""
    changes = [*SAME.items(), ('seed', str(self.seed)), *changes]
    return load_recipe(str(ROOT / TASKS[self.task].format(self.arm)), changes)


def cells(
  tasks: Sequence[str] = tuple(TASKS),
  arms: Sequence[str] = ARMS,
  seeds: Sequence[int] = SEEDS,
) -> Iterator[Cell]:
  """All runs, in the order in which they are made."""
  for seed in seeds:
    for task in tasks:
      for arm in arms:
        yield Cell(task, arm, seed)


def train(
  cell: Cell, changes: Sequence[tuple[str, str]] = ()
) -> dict[str, Any]:
  """One run by the project's trainer, and its last validation."""
  from psa_jax.train import loop

  config = cell.config(changes)
  with tempfile.TemporaryDirectory() as folder:
    # What it says goes to standard error; standard output is the answer's.
    with contextlib.redirect_stdout(sys.stderr):
      result = loop.train_and_evaluate(config, pathlib.Path(folder))
  last = result['validation'][config.model.attention.name]
  text = cell.task == 'text'
  return {
    'quality': last['bits_per_byte' if text else 'accuracy'],
    'density': last['density'],
    'length': last['seq_len'],
    'train_seconds': result['train_seconds'],
    'peak_bytes': result['peak_memory_bytes'],
  } | ({} if text else {'by': last['by']})
