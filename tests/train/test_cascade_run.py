"""A whole run with cascade pruning on a schedule: trained, saved, logged."""

import dataclasses

import pytest

from psa_jax.attention.cascade import CascadeConfig
from psa_jax.config import (
  AttentionConfig,
  EvalConfig,
  ScheduleConfig,
  TrainConfig,
)
from psa_jax.train import loop, metrics
from tests.train import tiny

pytestmark = pytest.mark.tier('default')


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """PRepBN, accumulation and remat; the amount goes up in one jump."""
  source = tiny.write_text(tmp_path_factory.mktemp('text'))
  found = tiny.config(source=source, accumulate=2)
  amount = ScheduleConfig('piecewise', boundaries=(3,), values=(0.0, 1.0))
  own = CascadeConfig(token_keep=0.4, head_keep=0.5, amount=amount)
  model = dataclasses.replace(
    found.model, attention=AttentionConfig('cascade', cascade=own), remat='full'
  )
  config = dataclasses.replace(
    found,
    model=model,
    train=TrainConfig(steps=(5,), seq_len=(64,), batch_size=(4,)),
    eval=EvalConfig(windows=2),
  )
  folder = tmp_path_factory.mktemp('cascade')
  result = loop.train_and_evaluate(config, folder)
  return result, metrics.read_rows(folder / metrics.METRICS)


def test_shares_fall_with_the_schedule_and_are_logged(run):
  _, rows = run
  rows = [row for row in rows if row['kind'] == 'train']
  for name in ('density', 'kept_tokens', 'kept_heads'):
    values = [row[name] for row in rows]
    assert values[:3] == [1, 1, 1]
    assert all(0 < value < 1 for value in values[3:])
  # Two layers: the second keeps 0.4 of the tokens, and one of two kv heads.
  assert rows[-1]['kept_tokens'] == pytest.approx(0.7, abs=0.1)
  assert rows[-1]['kept_heads'] == 0.75
  assert sum('compile_seconds' in row for row in rows) == 1


def test_the_end_compares_pruned_with_dense(run):
  result, _ = run
  pruned, dense = result['validation']['cascade'], result['validation']['dense']
  assert pruned['density'] < 0.7 and dense['density'] == 1
  assert pruned['bits_per_byte'] != dense['bits_per_byte']
