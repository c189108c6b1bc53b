"""A whole run with progressive sparse attention and accumulation."""

import signal

import pytest

from psa_jax.train import loop, metrics
from tests.train import tiny
from tests.train.runs import assert_same_run, interrupted

pytestmark = pytest.mark.tier('default')


@pytest.fixture(scope='module')
def text(tmp_path_factory):
  return tmp_path_factory.mktemp('text')


@pytest.fixture(scope='module')
def config(text):
  return tiny.config_psa(source=tiny.write_text(text))


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp('psa')


@pytest.fixture(scope='module')
def run(config, folder):
  result = loop.train_and_evaluate(config, folder)
  return result, metrics.read_rows(folder / metrics.METRICS)


@pytest.mark.tier('all')
def test_kill_9_and_resume_equals_a_run_that_was_not_killed(
  run, config, folder, text, tmp_path, capsys
):
  """In the middle of the ramp, with moving statistics and remat."""
  code, output = interrupted(
    tmp_path, text, signal.SIGKILL, 3, config='config_psa'
  )
  assert code == -signal.SIGKILL, output
  loop.train_and_evaluate(config, tmp_path)
  assert 'going on from step' in capsys.readouterr().out
  assert_same_run(config, folder, tmp_path)


def test_density_falls_with_the_schedule_and_is_logged(run):
  _, rows = run
  density = [row['density'] for row in rows if row['kind'] == 'train']
  assert density[0] == 1
  assert density == sorted(density, reverse=True)
  assert density[3] < 0.7
  assert density[3] == density[4], 'the schedule ends at step 3'


def test_the_end_compares_sparse_with_dense(run):
  result, rows = run
  sparse, dense = result['validation']['psa'], result['validation']['dense']
  assert sparse['density'] < 0.7 and dense['density'] == 1
  assert sparse['bits_per_byte'] != dense['bits_per_byte']
  assert [r['mechanism'] for r in rows if r['kind'] == 'final'] == [
    'psa',
    'dense',
  ]
  (stage,) = result['stages']
  assert stage['start']['density'] == 1
  assert stage['end']['density'] == pytest.approx(sparse['density'], rel=0.2)
