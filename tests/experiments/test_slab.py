"""The grid of norms: what differs, what is looked at, what the page says."""

import dataclasses
import json

import numpy as np
import pytest

from experiments.bench.grid import Run
from experiments.bench.settings import GridSettings
from experiments.slab import grid, latency, tables
from experiments.slab.__main__ import EXPERIMENT
from psa_jax.config import ImageConfig, RunError
from psa_jax.train import loop

STAMP = dict(
  date='2026-01-01', commit='abc', jax='1', python='3', machine='two cores'
)
QUICK = [
  ('data.source', 'digits'),
  ('data.shift', '0'),
  ('model.image.size', '8'),
  ('model.image.patch', '4'),
  ('model.num_layers', '1'),
  ('model.d_model', '8'),
  ('train.seq_len', '4'),
  ('train.steps', '5'),
  ('optim.warmup_steps', '1'),
]


def train(arm):
  run = Run('', arm, 0)
  return grid.train(run, grid.configure(run, tuple(QUICK)))


def test_arms_differ_in_their_norm_alone():
  configs = {arm: grid.configure(Run('', arm, 0)) for arm in grid.ARMS}
  norms = {arm: config.model.norm for arm, config in configs.items()}
  assert len(set(norms.values())) == len(grid.ARMS)
  assert norms['prepbn_16'].decay_steps == 0.16 * grid.STEPS
  assert norms['prepbn_80'].decay_steps == 0.8 * grid.STEPS
  for name in ('prepbn_16', 'prepbn_80'):
    assert norms[name].eta_init == 1
    other = dataclasses.replace(norms[name], eta_init=0.0)
    assert norms[f'{name}_eta0'] == other

  def rest(config):
    model = dataclasses.replace(config.model, norm=norms['layernorm'])
    return dataclasses.replace(config, name='any', model=model)

  assert len({rest(config) for config in configs.values()}) == 1


def test_seeds_come_last():
  cells = list(grid.GRID.runs(GridSettings(seeds=2)))
  assert len(cells) == 2 * len(grid.ARMS) == len(set(cells))
  assert {x.seed for x in cells[: len(grid.ARMS)]} == {0}


@pytest.mark.tier('default')
@pytest.mark.parametrize('arm', ['layernorm', 'prepbn_80'])
def test_a_run_looks_at_the_test_split_once_it_has_ended(arm, monkeypatch):
  seen, whole = [], loop.evaluate_checkpoint

  def watched(config, folder, **settings):
    seen.append((config.eval.split, config.eval.recalibrate_bn))
    assert (folder / 'result.json').exists()
    return whole(config, folder, **settings)

  monkeypatch.setattr(loop, 'evaluate_checkpoint', watched)
  monkeypatch.setattr(grid, 'BATCHES', 2)
  found = train(arm)
  assert 0 <= found['test'] <= 1 and 0 <= found['validation'] <= 1
  anew = [('test', 2)] if arm == 'prepbn_80' else []
  assert seen == [('test', 0), *anew]
  assert (found['test_anew'] is None) == (not anew)


def test_a_run_that_diverges_is_counted_as_such(monkeypatch):
  def fails(config, folder):
    raise RunError('step 3: loss is not finite')

  monkeypatch.setattr(loop, 'train_and_evaluate', fails)
  found = train('batchnorm')
  assert found == {'diverged': 'step 3: loss is not finite'}
  rows = [row('batchnorm', 0, 0.9), {**row('batchnorm', 1, 0), **found}]
  assert (
    '| BatchNorm | 90.0 % | 91.0 % | 88.0 % | 1 of 2 |'
    in (tables.sections(rows)['accuracy'])
  )


def row(arm, seed, test):
  return {
    'what': 'run',
    'arm': arm,
    'seed': seed,
    'test': test,
    'test_anew': test + 0.01,
    'validation': test - 0.02,
    **STAMP,
  }


def test_the_page_shows_mean_and_spread_of_the_newest_rows():
  rows = [row('repbn', 0, 0.1), row('repbn', 1, 0.7), row('repbn', 0, 0.9)]
  rows = EXPERIMENT.shown(rows)
  text = tables.sections(rows)['accuracy']
  spread = 100 * np.std([0.9, 0.7], ddof=1)
  assert f'| RepBN | 80.0 ± {spread:.1f} % |' in text
  assert 'abc, jax 1, python 3' in text
  assert 'latency' not in tables.sections(rows)
  assert '| DeiT-T | 72.2 % | 73.6 % |' in tables.sections(rows)['published']


def test_latency_compares_two_programs_of_one_size(monkeypatch):
  monkeypatch.setattr(latency, 'ROUNDS', 3)
  small = dict(
    num_layers=1, d_model=8, num_heads=2, num_kv_heads=2, mlp_dim=8
  ) | {'image': ImageConfig(8, 1, 4)}
  pair = [
    dataclasses.replace(grid.configure(Run('', arm, 0)).model, **small)
    for arm in ('layernorm', 'prepbn_80')
  ]
  found = latency.compare(*pair, batch=2)
  assert found['layernorm'] > 0 and found['folded'] > 0
  low, high = found['quartiles']
  assert low <= found['ratio'] <= high
  line = {'what': 'latency', 'size': 'tiny', 'batch': 2, **found, **STAMP}
  assert '| tiny | 2 |' in tables.sections([line])['latency']
  assert json.loads(json.dumps(line)) == line
