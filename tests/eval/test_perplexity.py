"""Bits per byte: the sums behind it, in float64."""

import math

import numpy as np
import pytest

from psa_jax import sharding
from psa_jax.config import MeshConfig, RunError
from psa_jax.eval import perplexity as lib
from psa_jax.tasks import Loss

pytestmark = pytest.mark.tier('default')

BATCHES = [
  {'nats': 3.0, 'tokens': 2, 'bytes': 4, 'density': 0.5},
  {'nats': 5.0, 'tokens': 6, 'bytes': 6, 'density': 0.1},
]


@pytest.fixture(scope='module')
def mesh():
  return sharding.make_mesh(MeshConfig(data=1))


def as_batch(numbers):
  return {name: np.array([value]) for name, value in numbers.items()}


def eval_step(state, batch):
  nats, tokens, size, density = (
    np.float32(batch[name][0])
    for name in ('nats', 'tokens', 'bytes', 'density')
  )
  return Loss(nats * state, tokens, {'bytes': size}, {'density': density})


def evaluate(batches, mesh, **options):
  batches = [as_batch(numbers) for numbers in batches]
  return lib.evaluate_lm(eval_step, 1.0, batches, mesh=mesh, **options)


def test_sums_over_batches_not_means_of_means(mesh):
  result = evaluate(BATCHES, mesh)
  assert result['tokens'] == 8
  assert result['loss'] == pytest.approx(8.0 / 8)
  assert result['bits_per_byte'] == pytest.approx(8.0 / math.log(2) / 10)
  assert result['density'] == pytest.approx((2 * 0.5 + 6 * 0.1) / 8)


def test_a_batch_in_which_nothing_counts_may_report_nan(mesh):
  nothing = dict(nats=0.0, tokens=0, bytes=0, density=np.nan)
  assert evaluate([*BATCHES, nothing], mesh) == evaluate(BATCHES, mesh)


def test_many_small_losses_do_not_vanish_beside_a_large_sum(mesh):
  """A float32 sum would stop growing at 2^24."""
  large = {**BATCHES[0], 'nats': 2.0**25}
  small = {**BATCHES[0], 'nats': 1.0}
  result = evaluate([large, *[small] * 10], mesh)
  assert result['loss'] * result['tokens'] == 2.0**25 + 10


def test_a_uniform_model_over_bytes_has_8_bits_per_byte():
  tokens = 1000
  result = lib.language_metrics(tokens * math.log(256), tokens, tokens)
  assert result['bits_per_byte'] == pytest.approx(8)
  assert result['loss'] == pytest.approx(math.log(256))


def test_tokens_of_several_bytes_share_their_bits():
  result = lib.language_metrics(math.log(2), 1, 4)
  assert result['bits_per_byte'] == pytest.approx(0.25)


def test_nothing_counted_is_a_loss_of_0_in_training():
  assert lib.language_metrics(0.0, 0, 0) == {'loss': 0, 'bits_per_byte': 0}


@pytest.mark.parametrize('batches', [[], [{**BATCHES[0], 'tokens': 0}]])
def test_nothing_to_evaluate_is_an_error(batches, mesh):
  with pytest.raises(RunError, match='no validation token'):
    evaluate(batches, mesh)


def test_it_can_be_stopped_between_batches(mesh):
  calls = []

  def before_batch():
    calls.append(1)
    if len(calls) == 2:
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    evaluate(BATCHES, mesh, before_batch=before_batch)
