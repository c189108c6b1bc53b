"""The grid of mechanisms: complete, resumable, and honest in its tables."""

import dataclasses

import pytest

from experiments.bench.grid import Run, digest
from experiments.bench.settings import GridSettings
from experiments.mechanisms import cost, grid, plot, tables
from experiments.mechanisms.__main__ import EXPERIMENT
from psa_jax.attention import registry

STAMP = dict(
  date='2026-01-01', commit='abc', jax='1', python='3', machine='two cores'
)


def row(task='mqar', arm='psa', seed=0, **fields):
  quality = {'quality': 0.5, 'density': 0.25, 'peak_bytes': 2**30}
  by = {'distance': [['0 to 15', 10, 0.75], ['16 or more', 10, 0.25]]}
  return {
    'what': 'quality',
    'task': task,
    'arm': arm,
    'seed': seed,
    'settings': 'x',
    **quality,
    **({} if task == 'text' else {'by': by}),
    **STAMP,
    **fields,
  }


def test_every_mechanism_is_an_arm():
  # `on_demand` is for inference alone: nothing trains with it.
  trained = set(registry.names()) - {'on_demand'}
  names = {
    grid.configure(Run('text', arm, 0)).model.attention.name
    for arm in grid.ARMS
  }
  assert names == trained


@pytest.mark.parametrize('task', grid.TASKS)
def test_arms_differ_in_their_attention_alone(task):
  configs = {arm: grid.configure(Run(task, arm, 0)) for arm in grid.ARMS}

  def rest(config):
    model = dataclasses.replace(
      config.model, attention=configs['dense'].model.attention, remat='none'
    )
    return dataclasses.replace(config, name='any', model=model)

  same = {arm: rest(config) for arm, config in configs.items()}
  assert all(x == same['dense'] for x in same.values())
  attention = [x.model.attention for x in configs.values()]
  assert all(a != b for a, b in zip(attention, attention[1:], strict=False))


def test_seeds_come_last():
  cells = list(grid.GRID.runs(GridSettings(seeds=2)))
  assert len(cells) == 2 * len(grid.TASKS) * len(grid.ARMS) == len(set(cells))
  first = cells[: len(cells) // 2]
  assert {x.seed for x in first} == {0}
  assert {x.arm for x in first} == set(grid.ARMS)


def test_settings_know_every_key_but_the_seed():
  run = Run('mqar', 'psa', 0)
  want = digest(grid.configure(run))
  assert digest(grid.configure(run._replace(seed=1))) == want
  for key in ('model.d_model', 'model.attention.psa.block_k', 'eval.windows'):
    assert digest(grid.configure(run, ((key, '32'),))) != want, key


def test_the_last_row_of_a_run_counts():
  cost = {'what': 'cost', 'arm': 'psa', 'settings': None, 'commit': 'abc'}
  found = [row(error='x'), row(seed=1), cost, row(quality=0.75), cost]
  shown = EXPERIMENT.shown(found)
  assert [x.get('quality') for x in shown] == [0.75, 0.5, None]


def test_tables_tell_mean_spread_and_what_is_missing():
  made = [
    row(quality=0.5),
    row(quality=0.7, seed=1),
    row('text', 'dense', quality=2.5, density=1.0),
    row('needle', 'nsa', error='ValueError: no'),
    row('text', 'nsa', quality=3.0),
  ]
  found = tables.sections(made)
  lines = found['quality'].splitlines()
  assert lines[0].startswith('| attention | bits per byte')
  at = {line.split(' | ')[0].strip('| '): line for line in lines[2:]}
  assert '| 2.500 |' in at['dense (control)']
  assert '60.0 ± 14.1 %' in at['psa'] and at['psa'].endswith('| 0 2 0 |')
  assert at['nsa'].endswith('| 1 0 0 |')
  assert 'nsa, needle, seed 0: failed. ValueError: no' in found['quality']
  assert '75 % | 25 %' in found['recall']
  assert 'commit abc' in found['quality']


def test_costs_are_beside_dense():
  cost = dict(what='cost', temporary_bytes=100, keys=64.0, **STAMP)
  made = [
    cost | dict(arm='dense', forward=1.0, both=4.0),
    cost | dict(arm='psa', forward=0.5, both=1.0, temporary_bytes=50),
    cost | dict(arm='nsa', error='no'),
  ]
  text = tables.sections(made)['cost']
  assert '500 ms, 0.50 | 1000 ms, 0.25 | 64 | 0.50 |' in text
  assert 'nsa, cost, seed 0: failed. no' in text


def test_a_picture_is_drawn():
  made = [row(), row(seed=1, quality=0.6), row('text', quality=2.0)]
  figure = plot.draw(made)
  assert [len(axis.containers) for axis in figure.axes] == [1, 1, 0]


@pytest.mark.tier('default')
def test_a_run_of_the_grid_is_a_run_of_the_trainer():
  small = [('train.steps', '2,2'), ('optim.warmup_steps', '1')]
  small += [('train.batch_size', '8,8'), ('eval.windows', '8')]
  small += [('model.attention.psa.keep.length', '2')]
  small += [('model.attention.psa.keep.begin', '1')]
  run = Run('mqar', 'psa', 0)
  found = grid.train(run, grid.configure(run, tuple(small)))
  assert 0 <= found['quality'] <= 1 and 0 < found['density'] < 1
  assert found['length'] == 128 and found['by']['distance']


@pytest.mark.tier('default')
def test_costs_are_measured_in_turn(monkeypatch):
  monkeypatch.setattr(cost, 'ROUNDS', 1)
  small = (('train.seq_len', '64,128'), ('train.steps', '2,2'))
  small += (('optim.warmup_steps', '1'), ('model.num_layers', '1'))
  small += (('model.attention.psa.window', '16'),)
  small += (('model.attention.psa.block_q', '16'),)
  small += (('model.attention.psa.block_k', '16'),)
  small += (('model.attention.psa.keep.begin', '0'),)
  small += (('model.attention.psa.keep.length', '2'),)
  arms = ('psa', 'psa_bounds')
  measured = list(cost.measure(arms, small))
  assert tuple(row['arm'] for row in measured) == arms
  for found in measured:
    assert 0 < found['density'] < 1
    assert found['length'] == 128
    assert found['keys'] == found['density'] * 129 / 2
    assert 0 < found['forward'] and 0 < found['both']
    assert found['temporary_bytes'] > 2**16
