"""A sparse run that begins with the parameters of a dense one."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from psa_jax.config import AttentionConfig, CheckpointConfig, ConfigError
from psa_jax.train import loop, metrics
from psa_jax.train import state as state_lib
from tests.train import tiny

pytestmark = pytest.mark.tier('default')


@pytest.fixture(scope='module')
def source(tmp_path_factory):
  return tiny.write_text(tmp_path_factory.mktemp('text'))


@pytest.fixture(scope='module')
def dense(source, tmp_path_factory):
  folder = tmp_path_factory.mktemp('dense')
  config = sparse(source, '', attention=AttentionConfig('dense'))
  loop.train_and_evaluate(config, folder)
  return folder


def sparse(source, init_from, **model):
  found = tiny.config_dsa(source=source)
  return dataclasses.replace(
    found,
    model=dataclasses.replace(found.model, **model),
    train=dataclasses.replace(found.train, steps=(4,), init_from=init_from),
    checkpoint=CheckpointConfig(every=0),
  )


def test_a_dense_run_becomes_a_sparse_one(dense, source, tmp_path, capsys):
  """It begins where the dense run ended; only the indexer is new."""
  loop.train_and_evaluate(sparse(source, str(dense)), tmp_path)
  shown = capsys.readouterr().out
  assert f'beginning with the parameters of {dense}' in shown
  assert 'initial values for' in shown and 'index_q' in shown
  assert 'embedding' not in shown
  rows = [
    [r for r in metrics.read_rows(f / metrics.METRICS) if r['kind'] == 'train']
    for f in (dense, tmp_path)
  ]
  began, ended, taken = rows[0][0], rows[0][-1], rows[1][0]
  assert ended['loss'] < began['loss'] - 0.2
  # Before an update of its own, and after one more of the dense run's.
  assert taken['loss'] < ended['loss'] + 0.1
  result = json.loads((dense / 'result.json').read_text())
  assert result['step'] == 4 and rows[1][-1]['step'] == 4


def test_parameters_are_taken_over_bit_for_bit(source):
  left = tiny.Steps(
    sparse(source, '', attention=AttentionConfig('dense'))
  ).init()
  steps = tiny.Steps(sparse(source, ''))
  saved = {
    'params': jax.tree.map(lambda x: np.asarray(x) + 1, left.params),
    'model_state': jax.tree.map(lambda x: np.asarray(x) + 1, left.model_state),
  }
  first = steps.init()
  got, new = state_lib.adopt(first, saved)
  assert sorted(name.split("'")[-2] for name in new) == [
    *('index_k', 'index_q', 'index_w')
  ]
  for part in ('params', 'model_state'):
    for path, x in jax.tree_util.tree_leaves_with_path(getattr(got, part)):
      if 'mechanism' in jax.tree_util.keystr(path):
        continue
      want = saved[part]
      for entry in path:
        want = want[entry.key]
      np.testing.assert_array_equal(x, want)
  tiny.assert_identical(
    got.params['layers']['attention']['mechanism'],
    first.params['layers']['attention']['mechanism'],
  )
  assert int(got.step) == 0
  tiny.assert_identical(got.opt_state, first.opt_state)


def test_another_model_is_refused(dense, source, tmp_path):
  config = sparse(source, str(dense), mlp_dim=48)
  with pytest.raises(ConfigError, match=r'another model: .*has shape'):
    loop.train_and_evaluate(config, tmp_path)
  assert not (tmp_path / 'config.json').exists()


def test_a_folder_without_a_run_is_refused(source, tmp_path):
  config = sparse(source, str(tmp_path / 'nothing'))
  with pytest.raises(ConfigError, match='there is no checkpoint in'):
    loop.train_and_evaluate(config, tmp_path / 'run')
