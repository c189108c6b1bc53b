"""What hybrid attention reads at 65,536 tokens, and what that does to the loss.

  python experiments/hybrid/run.py                 some minutes on two cores
  python experiments/hybrid/run.py --noquality     the counts alone, a minute

Cost: the block lists of one head are made for queries of several sizes, from
zero (attention as flat as can be: the cap decides everywhere, so this row is
the most that any model can read) to large (peaked). Pairs and multiply-adds are
counted from the lists, the causal half of the diagonal included in neither.

Quality: two runs of the same recipe, seed and steps, one with dense attention
and one with hybrid under its schedule, and the validation loss of both.
"""

import json
import pathlib
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))

from absl import app, flags  # noqa: E402

_LENGTH = flags.DEFINE_integer('length', 65_536, 'Tokens of the counts.')
_STEPS = flags.DEFINE_integer('steps', 100, 'Optimiser steps of each run.')
_SEEDS = flags.DEFINE_integer('seeds', 1, 'Pairs of runs.')
_QUALITY = flags.DEFINE_bool('quality', True, 'Train the two models.')
_WRITE = flags.DEFINE_bool('write', True, 'Append results and update README.')

SCALES = (0.0, 1.0, 4.0, 16.0)  # of the queries
SOURCES = ['psa_jax', 'configs', ':(glob)experiments/hybrid/*.py']
RECIPE = 'configs/lm_64k.py:quick'
COMMON = {
  'model.norm.kind': 'rmsnorm',
  'train.seq_len': '2048',
  'train.batch_size': '2',
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


def main(argv):
  """Counts, trains, and writes both down."""
  if len(argv) > 1:
    raise app.UsageError(f'unknown argument {argv[1]!r}')
  from experiments.hybrid.counts import cost
  from psa_jax import report

  stamp = report.provenance(ROOT, SOURCES)
  found = {'cost': [cost(scale, _LENGTH.value) for scale in SCALES]}
  print(report.markdown(cost_table(found['cost'])))
  if _QUALITY.value:
    found['quality'] = [
      train(arm, seed, _STEPS.value)
      for seed in range(_SEEDS.value)
      for arm in ARMS
    ]
    print(report.markdown(quality_table(found['quality'])))
  if not _WRITE.value:
    return
  versions = ', '.join(f'{key} {value}' for key, value in stamp.items())
  tables = {'cost': cost_table, 'quality': quality_table}
  for name, rows in found.items():
    with (HERE / 'results.jsonl').open('a') as file:
      file.writelines(
        json.dumps({'kind': name, **row, **stamp}) + '\n' for row in rows
      )
    text = f'{report.markdown(tables[name](rows))}\n\n{versions}'
    report.replace_section(HERE / 'README.md', name, text)


def cost_table(rows):
  """Header and rows."""
  lines = [
    ('tokens', 'size of the queries', 'entropy, nats', 'tiles at the cap')
    + ('keys read, of dense', 'multiply-adds, of dense')
  ]
  for row in rows:
    adds = row['multiply_adds'] / row['dense_multiply_adds']
    lines.append(
      (
        f'{row["length"]:,}',
        f'{row["scale"]:g}',
        f'{row["entropy"]:.2f}',
        f'{100 * row["capped"]:.0f} %',
        f'{100 * row["pairs"] / row["dense_pairs"]:.1f} %',
        f'{100 * adds:.1f} %',
      )
    )
  return lines


def train(arm, seed, steps):
  """One run, and its last validation."""
  from psa_jax.config.recipe import load_recipe
  from psa_jax.train import loop

  changes = {
    **COMMON,
    **ARMS[arm],
    'seed': str(seed),
    'train.steps': str(steps),
  }
  if arm == 'hybrid':
    changes['model.attention.hybrid.keep.length'] = str(steps // 2)
  config = load_recipe(str(ROOT / RECIPE), changes.items())
  with tempfile.TemporaryDirectory() as folder:
    result = loop.train_and_evaluate(config, pathlib.Path(folder))
  last = result['validation'][arm]
  return {
    'arm': arm,
    'seed': seed,
    'steps': steps,
    'length': config.train.seq_len[-1],
    'bits_per_byte': last['bits_per_byte'],
    'density': last['density'],
  }


def quality_table(rows):
  """Header and rows."""
  lines = [
    ('attention', 'seed', 'steps', 'tokens', 'validation bits per byte')
    + ('density',)
  ]
  for row in rows:
    lines.append(
      (
        row['arm'],
        str(row['seed']),
        str(row['steps']),
        f'{row["length"]:,}',
        f'{row["bits_per_byte"]:.4f}',
        f'{100 * row["density"]:.1f} %',
      )
    )
  return lines


if __name__ == '__main__':
  app.run(main)
