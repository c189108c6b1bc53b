"""Recall tasks in the one loop: only answers count, runs resume, tables."""

import dataclasses
import signal

import jax
import numpy as np
import pytest

from psa_jax import sharding
from psa_jax.attention.context import AttentionContext
from psa_jax.config import ConfigError
from psa_jax.models import ModelOut
from psa_jax.tasks import LanguageModel, Recall, load_data, make_task
from psa_jax.train import loop
from psa_jax.train import result as result_lib
from psa_jax.train.stages import plan
from tests.train import tiny
from tests.train.runs import interrupted, rows

pytestmark = pytest.mark.tier('default')


@pytest.fixture(scope='module')
def config():
  return tiny.config_recall()


@pytest.fixture(scope='module')
def whole(config, tmp_path_factory):
  folder = tmp_path_factory.mktemp('recall')
  return folder, loop.train_and_evaluate(config, folder)


def test_the_task_is_the_one_that_is_named(config):
  mesh = sharding.make_mesh(config.mesh)
  data = load_data(config)
  assert isinstance(make_task(config, data, mesh), Recall)
  assert isinstance(
    make_task(tiny.config(), tiny.corpus(), mesh), LanguageModel
  )


def batch_of(config, mesh):
  task = make_task(config, load_data(config), mesh)
  return task, next(task.train_iterator(plan(config)[0]))


class Constant:
  """A model whose logits are the same everywhere: token 3 is most likely."""

  def __call__(self, tokens, *, context):
    shape = (*tokens.shape, 64)
    hidden = jax.numpy.zeros(shape).at[..., 3].set(2.0)
    return ModelOut(hidden, {'density': jax.numpy.float32(1)})

  def unembed(self, hidden):
    return hidden


def test_the_loss_is_that_of_the_answers(config):
  mesh = sharding.make_mesh(config.mesh)
  task, batch = batch_of(config, mesh)
  arrays = sharding.put_batch(batch, mesh)
  loss = task.loss(Constant(), arrays, AttentionContext(step=0, train=True))
  real = batch['weights'] == 1
  targets = batch['targets'][real]
  log_z = np.log(np.exp(2.0) + 63)
  want = (log_z - 2.0 * (targets == 3)).sum()
  np.testing.assert_allclose(loss.total, want, rtol=1e-5)
  assert loss.weight == targets.size
  assert loss.sums['questions'] == real.sum()
  assert loss.sums['hits'] == (targets == 3).all(-1).sum()
  found = task.metrics(loss)
  np.testing.assert_allclose(found['loss'], want / targets.size, rtol=1e-5)
  share = (targets == 3).all(-1).mean()
  np.testing.assert_allclose(found['accuracy'], share, rtol=1e-5)


def test_a_model_too_small_for_the_ids_is_refused(config):
  model = dataclasses.replace(config.model, vocab_size=63)
  config = dataclasses.replace(config, model=model)
  with pytest.raises(ConfigError, match='vocab_size=63 is below'):
    make_task(config, load_data(config), sharding.make_mesh(config.mesh))


def test_a_run_logs_and_prints_accuracy(whole, config):
  folder, result = whole
  trained = [row for row in rows(folder) if row['kind'] == 'train']
  assert all(0 <= row['accuracy'] <= 1 for row in trained)
  assert 'bits_per_byte' not in trained[0]
  found = result['validation']['psa']
  assert set(result['validation']) == {'psa', 'dense'}
  assert found['windows'] == config.eval.windows
  for cells in found['by'].values():
    assert sum(asked for _, asked, _ in cells) == found['questions']
  assert result['baselines'] == {'chance': 1 / 32}
  shown = dict(result_lib.table(result))
  assert shown['accuracy, psa attention'] == f'{found["accuracy"]:.1%}'
  assert shown['accuracy, chance'] == '3.1%'


def test_evaluation_prints_the_same_by_bucket(whole, config, capsys):
  folder, result = whole
  again = loop.evaluate_checkpoint(config, folder)
  for name, found in result['validation'].items():
    assert again['validation'][name]['by'] == found['by']
    assert again['validation'][name]['accuracy'] == found['accuracy']
  text = capsys.readouterr().out
  for part in ('accuracy, psa attention', 'distance 0 to 15,', 'needles 2, '):
    assert part in text


def test_validation_is_the_same_for_every_seed_of_the_run(config):
  left, right = (
    load_data(dataclasses.replace(config, seed=seed)) for seed in (0, 1)
  )
  assert left.manifest == right.manifest
  one, two = (d.validation(seq_len=16, rows=2)[0] for d in (left, right))
  tiny.assert_identical(one, two)


@pytest.mark.tier('ci')
def test_kill_9_and_resume_equals_a_run_that_was_not_killed(
  whole, config, tmp_path, capsys
):
  code, output = interrupted(
    tmp_path, tmp_path / 'text', signal.SIGKILL, 3, config='config_recall'
  )
  assert code == -signal.SIGKILL, output
  loop.train_and_evaluate(config, tmp_path)
  assert 'going on from step' in capsys.readouterr().out
  assert rows(tmp_path) == rows(whole[0])


def test_other_settings_of_the_task_are_another_run(whole, config):
  changed = dataclasses.replace(
    config,
    data=dataclasses.replace(
      config.data,
      synthetic=dataclasses.replace(config.data.synthetic, needles=(1,)),
    ),
  )
  with pytest.raises(ConfigError, match='data.synthetic.needles'):
    loop.train_and_evaluate(changed, whole[0])
