"""The grid of text tasks: what differs, what is looked at, and the page."""

import dataclasses

import numpy as np
import pytest

from experiments.bench.grid import Run, digest
from experiments.bench.settings import GridSettings
from experiments.text_tasks import grid, tables
from psa_jax.config import RunError
from psa_jax.eval import tfidf
from psa_jax.train import loop

STAMP = dict(
  date='2026-01-01', commit='abc', jax='1', python='3', machine='two cores'
)
QUICK = [
  ('data.tokenizer', 'bytes'),
  ('model.d_model', '8'),
  ('model.mlp_dim', '8'),
  ('train.seq_len', '12'),
  ('train.batch_size', '8'),
  ('train.steps', '4'),
  ('optim.warmup_steps', '1'),
  ('eval.windows', '24'),
  ('eval.every', '0'),
]


@pytest.mark.parametrize('task', grid.ARMS)
def test_arms_differ_in_their_model_alone(task):
  configs = [grid.configure(Run(task, arm, 0)) for arm in grid.ARMS[task]]
  assert len({config.model for config in configs}) == len(configs)

  def rest(config):
    return dataclasses.replace(config, name='any', model=configs[0].model)

  assert len({rest(config) for config in configs}) == 1


def test_pruning_differs_from_its_controls_in_one_thing_each():
  deep, cascade, chance = (
    grid.configure(Run('classify', arm, 0)).model
    for arm in ('deep', 'cascade', 'cascade_random')
  )
  attention = cascade.attention
  assert dataclasses.replace(cascade, attention=deep.attention) == deep
  blind = dataclasses.replace(attention.cascade, importance='random')
  assert chance.attention == dataclasses.replace(attention, cascade=blind)


def test_seeds_come_last():
  cells = list(grid.GRID.runs(GridSettings(seeds=2)))
  half = len(cells) // 2
  assert {x.seed for x in cells[:half]} == {0}
  assert len(set(cells)) == 2 * half


@pytest.mark.tier('default')
def test_a_run_keeps_half_of_the_tokens_and_ends_with_the_test_split(
  monkeypatch,
):
  seen, whole = [], loop.evaluate_checkpoint

  def watched(config, folder, **settings):
    seen.append(config.eval.split)
    assert (folder / 'result.json').exists()
    return whole(config, folder, **settings)

  monkeypatch.setattr(loop, 'evaluate_checkpoint', watched)
  monkeypatch.setattr(tfidf, 'MOST', 5000)
  amount = 'model.attention.cascade.amount.'
  always = [(amount + 'init', '1'), (amount + 'begin', '0')]
  run = Run('classify', 'cascade', 0)
  found = grid.train(run, grid.configure(run, (*QUICK, *always)))
  assert seen == ['test']
  # Of 12 bytes each: 12, 4 and 2.
  assert found['kept_tokens'] == pytest.approx(0.5, abs=0.01)
  assert found['metric'] == 'macro_f1' and found['baseline'] == 'TF-IDF'
  assert 0 <= found['test'] <= 1 and 0 <= found['validation'] <= 1
  assert found['baseline_test'] != found['baseline_validation']


def test_a_run_that_was_stopped_is_no_result(monkeypatch):
  monkeypatch.setattr(
    loop, 'train_and_evaluate', lambda *args: {'step': 3, 'stopped': True}
  )
  run = Run('tag', '', 0)
  with pytest.raises(RunError, match='stopped the run at step 3'):
    grid.train(run, grid.configure(run))


def row(arm, seed, test, **more):
  hashed = digest(grid.configure(Run('classify', arm, seed)))
  return {
    'settings': hashed,
    'what': 'run',
    'task': 'classify',
    'arm': arm,
    'seed': seed,
    'metric': 'macro_f1',
    'validation': test + 0.02,
    'test': test,
    'baseline': 'TF-IDF',
    'baseline_validation': 0.5,
    'baseline_test': 0.4,
    'density': 1.0,
    **STAMP,
    **more,
  }


def test_the_page_shows_mean_and_spread_of_the_newest_rows():
  rows = [row('deep', 0, 0.1), row('deep', 1, 0.7), row('deep', 0, 0.9)]
  rows.append(row('cascade', 0, 0.5, density=0.3, kept_tokens=0.5))
  rows.append({**row('topk', 0, 0.5), 'error': 'it broke'})
  rows.insert(0, row('deep', 2, 0.5, settings='of another recipe'))
  text = tables.sections(grid.GRID.newest(rows))
  assert list(text) == ['classify']
  spread = np.std([0.9, 0.7], ddof=1)
  assert f'| 0.820 ± {spread:.3f} | 0.800 ± {spread:.3f} |' in text['classify']
  assert '| 0.520 | 0.500 | 50% | 30% | 1 |' in text['classify']
  assert '| TF-IDF (baseline) | 0.500 | 0.400 |' in text['classify']
  assert 'the default' not in text['classify']
  assert 'topk, seed 0: failed. it broke' in text['classify']
  assert 'abc, jax 1, python 3' in text['classify']
