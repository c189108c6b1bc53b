"""A whole run with progressive sparse attention and accumulation."""

import dataclasses

import pytest

from psa_jax.config import (
  AttentionConfig,
  EvalConfig,
  PsaConfig,
  ScheduleConfig,
  TrainConfig,
)
from psa_jax.train import loop, metrics
from tests.train import tiny

PSA = PsaConfig(
  block_q=8,
  block_k=8,
  window=8,
  keep=ScheduleConfig('linear', init=1.0, final=0.1, length=3),
)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  config = tiny.config(tiny.NormConfig(), accumulate=2)
  config = dataclasses.replace(
    config,
    model=dataclasses.replace(
      config.model, attention=AttentionConfig('psa', psa=PSA)
    ),
    train=TrainConfig(steps=(5,), seq_len=(64,), batch_size=(4,)),
    eval=EvalConfig(windows=2),
  )
  folder = tmp_path_factory.mktemp('psa')
  result = loop.train_and_evaluate(config, folder, corpus=tiny.corpus())
  return result, metrics.read_rows(folder / metrics.METRICS)


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
