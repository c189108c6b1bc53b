"""What hybrid attention reads at 65,536 tokens, and what that does to the loss.

  python -m experiments.hybrid                    some minutes on two cores
  python -m experiments.hybrid --set what=cost    the counts alone, a minute

Cost: the block lists of one head are made for queries of several sizes, from
zero (attention as flat as can be: the cap decides everywhere, so this row is
the most that any model can read) to large (peaked). Pairs and multiply-adds are
counted from the lists, the causal half of the diagonal included in neither.

Quality: two runs of the same recipe, seed and steps, one with dense attention
and one with hybrid under its schedule, and the validation loss of both.
"""

import dataclasses
import sys

from experiments.bench import cli, rows, tables
from experiments.bench.experiment import Experiment
from experiments.bench.grid import Grid, trained
from experiments.bench.settings import GridSettings, option
from experiments.hybrid.counts import cost
from psa_jax import report

WHAT = ('cost', 'quality')
SCALES = (0.0, 1.0, 4.0, 16.0)  # of the queries
RECIPE = 'configs/lm_64k.py:quick'
KEY = ('what', 'scale', 'arm', 'seed')
COMMON = {
  'model.norm.kind': 'rmsnorm',
  'train.seq_len': '2048',
  'train.batch_size': '2',
  'train.steps': '100',
  'eval.windows': '8',
  'eval.dense': 'false',
  'log.tensorboard': 'false',
}
ARMS = {
  'dense': {'model.attention.name': 'dense'},
  'hybrid': {
    'model.attention.name': 'hybrid',
    'model.attention.hybrid.block_q': '64',
    'model.attention.hybrid.window': '128',
    'model.attention.hybrid.keep.begin': '10',
  },
}


@dataclasses.dataclass(frozen=True)
class HybridSettings(GridSettings):
  """What `--set` changes."""

  what: tuple[str, ...] = option(WHAT, 'What to find out.', choices=WHAT)
  length: int = option(65_536, 'Tokens of the counts.', least=1)
  seeds: int = option(1, 'Pairs of runs.', least=1)


def configure(run, changes):
  """A run's configuration: the cap falls over half of the steps."""
  own = [*COMMON.items(), *ARMS[run.arm].items()]
  config = run.recipe(RECIPE, [*own, *changes])
  if run.arm == 'hybrid':
    half = str(sum(config.train.steps) // 2)
    own.append(('model.attention.hybrid.keep.length', half))
  return run.recipe(RECIPE, [*own, *changes])


def train(run, config):
  """One run, and its last validation."""
  with trained(config) as (result, _):
    last = result['validation'][run.arm]
  return {
    'steps': sum(config.train.steps),
    'length': config.train.seq_len[-1],
    'bits_per_byte': last['bits_per_byte'],
    'density': last['density'],
  }


GRID = Grid(
  experiment='hybrid',
  what='quality',
  arms={'': tuple(ARMS)},
  configure=configure,
  train=train,
  quality=lambda row: f'{row["bits_per_byte"]:.4f}',
)


def run(settings, book):
  """Counts, and trains what is missing."""
  if 'cost' in settings.what:
    for scale in SCALES:
      if not book.has(what='cost', scale=scale):
        book.add({'what': 'cost', **cost(scale, settings.length)})
  if 'quality' in settings.what:
    GRID.fill(settings, book)


def newest(found):
  """Of every subject the last row; the first rows call `what` `kind`."""
  named = [{'what': row.get('kind'), **row} for row in found]
  return rows.newest(named, KEY)


def sections(found):
  """The tables of the page."""
  texts = {}
  for what, table in (('cost', cost_table), ('quality', quality_table)):
    mine = [row for row in found if row['what'] == what and 'error' not in row]
    if mine:
      text = report.markdown(table(mine))
      texts[what] = tables.paragraphs(text, tables.caption(mine))
  return texts


def cost_table(found):
  """Header and rows."""
  lines = [
    ('tokens', 'size of the queries', 'entropy, nats', 'tiles at the cap')
    + ('keys read, of dense', 'multiply-adds, of dense')
  ]
  for row in found:
    adds = row['multiply_adds'] / row['dense_multiply_adds']
    lines.append((
      f'{row["length"]:,}',
      f'{row["scale"]:g}',
      f'{row["entropy"]:.2f}',
      f'{100 * row["capped"]:.0f} %',
      f'{100 * row["pairs"] / row["dense_pairs"]:.1f} %',
      f'{100 * adds:.1f} %',
    ))  # fmt: skip
  return lines


def quality_table(found):
  """Header and rows."""
  lines = [
    ('attention', 'seed', 'steps', 'tokens', 'validation bits per byte')
    + ('density',)
  ]
  for row in found:
    lines.append((
      row['arm'],
      str(row['seed']),
      str(row['steps']),
      f'{row["length"]:,}',
      f'{row["bits_per_byte"]:.4f}',
      f'{100 * row["density"]:.1f} %',
    ))  # fmt: skip
  return lines


EXPERIMENT = Experiment(
  name='hybrid',
  about='what window plus entropy-budgeted blocks read, and the loss with them',
  settings=HybridSettings(),
  quick=HybridSettings(
    length=4096,
    changes=(('train.steps', '8'), ('train.seq_len', '512'))
    + (('optim.warmup_steps', '1'), ('eval.windows', '2'))
    + (('model.attention.hybrid.keep.begin', '2'),),
  ),
  run=run,
  sections=sections,
  key=KEY,
  newest=newest,
  child=GRID.child,
)

if __name__ == '__main__':
  sys.exit(cli.main(EXPERIMENT))
