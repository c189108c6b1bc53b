"""What is trained: every mechanism and control, on text and recall tasks."""

from experiments.bench.grid import Grid, Run, trained
from experiments.bench.rows import Row
from experiments.bench.settings import Changes
from psa_jax.config import Config

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
SAME = (('eval.dense', 'false'), ('log.tensorboard', 'false'))


def configure(run: Run, changes: Changes = ()) -> Config:
  """A run's configuration."""
  return run.recipe(TASKS[run.task].format(run.arm), [*SAME, *changes])


def train(run: Run, config: Config) -> Row:
  """One run by the project's trainer, and its last validation."""
  with trained(config) as (result, _):
    last = result['validation'][config.model.attention.name]
  text = run.task == 'text'
  return {
    'quality': last['bits_per_byte' if text else 'accuracy'],
    'density': last['density'],
    'length': last['seq_len'],
    'train_seconds': result['train_seconds'],
    'peak_bytes': result['peak_memory_bytes'],
  } | ({} if text else {'by': last['by']})


GRID = Grid(
  experiment='mechanisms',
  what='quality',
  arms=dict.fromkeys(TASKS, ARMS),
  configure=configure,
  train=train,
  quality=lambda row: str(row['quality']),
)
