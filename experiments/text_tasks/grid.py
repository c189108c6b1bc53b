"""What is trained: the recipes on texts, dense and sparse."""

import dataclasses

from experiments.bench.grid import Grid, Run, trained
from experiments.bench.rows import Row
from experiments.bench.settings import Changes
from psa_jax.config import Config, RunError

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
SHARES = ('density', 'cross_density', 'kept_tokens')


def configure(run: Run, changes: Changes = ()) -> Config:
  """A run's configuration."""
  spec = RECIPES[run.task] + (f':{run.arm}' if run.arm else '')
  return run.recipe(spec, list(changes))


def train(run: Run, config: Config) -> Row:
  """One run by the project's trainer, and one look at the test split.

  Raises:
    RunError: it was stopped.
  """
  from psa_jax.train import loop

  judged = dataclasses.replace(config.eval, split='test')
  with trained(config) as (result, folder):
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


GRID = Grid(
  experiment='text_tasks',
  what='run',
  arms=ARMS,
  configure=configure,
  train=train,
  quality=lambda row: f'{row["metric"]} {row["validation"]:.4g}',
)
