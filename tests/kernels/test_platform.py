"""Which implementation runs on which machine."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import pytest

from psa_jax.attention import attend as library_attend
from psa_jax.attention.context import AttentionContext
from psa_jax.config import AttentionConfig, ConfigError
from psa_jax.kernels import (
  block_scores,
  block_sparse,
  decode,
  dense,
  platform,
  topk,
)
from psa_jax.kernels.platform import Implementation

OPS = block_sparse, decode, dense, topk, block_scores


def wants(where):
  """An implementation for one platform that needs a positive argument."""

  def refusal(target, x):
    if target.platform != where:
      return f'it needs a {where}'
    return None if x > 0 else f'{x} is not positive'

  return Implementation(lambda x: where, refusal, platform=where)


KNOWN = {
  'fast': wants('tpu'),
  'other': wants('gpu'),
  'xla': Implementation(lambda x: 'any'),
  'reference': Implementation(lambda x: 'slow', automatic=False),
}


@pytest.mark.parametrize(
  ('where', 'x', 'taken'),
  [('tpu', 1, 'tpu'), ('gpu', 1, 'gpu'), ('cpu', 1, 'any'), ('tpu', 0, 'any')],
)
def test_auto_takes_the_first_that_can_run(where, x, taken):
  with platform.target(where):
    assert platform.pick('auto', KNOWN, x)(x) == taken


def test_a_fallback_is_said_once_and_only_about_the_own_platform(caplog):
  with platform.target('tpu'), caplog.at_level(logging.WARNING):
    for _ in range(3):
      platform.pick('auto', KNOWN, -7)
  assert [r.message for r in caplog.records] == [
    'fast was passed over for xla: -7 is not positive'
  ]
  caplog.clear()
  with platform.target('cpu'), caplog.at_level(logging.WARNING):
    platform.pick('auto', KNOWN, -7)
  assert not caplog.records


def test_a_named_one_runs_or_is_refused_with_the_reason():
  assert platform.pick('reference', KNOWN, 1)(1) == 'slow'
  with pytest.raises(ConfigError, match="'fast' cannot run here: it needs a"):
    platform.pick('fast', KNOWN, 1)
  with pytest.raises(ConfigError, match='choose from .*fast'):
    platform.pick('fats', KNOWN, 1)


def test_every_op_runs_on_every_platform_and_tries_xla_before_giving_up():
  for op in OPS:
    known = op.IMPLEMENTATIONS
    names = [n for n, i in known.items() if i.automatic]
    assert names[-1] == 'xla' and not known['reference'].automatic
    assert not known['xla'].platform
    # Before it come those of one machine, and those that say where they lose.
    everywhere = platform.Implementation._field_defaults['slower']
    for name in names[:-1]:
      one = known[name]
      assert one.platform in ('tpu', 'gpu') or one.slower is not everywhere


def test_the_target_is_this_machine_unless_another_is_set():
  assert platform.current().platform == jax.devices()[0].platform
  with platform.target('gpu', kind='H100', capability=90) as made:
    assert platform.current() == made and not made.interpret
  assert platform.current().platform == jax.devices()[0].platform


def test_an_implementation_is_named_for_the_configured_mechanism_only():
  """Evaluation with dense attention does not inherit the sparse kernel's."""
  config = AttentionConfig(name='psa', implementation='pallas_gpu')
  x = jnp.ones((1, 8, 1, 8))
  out, _ = library_attend(
    x, x, x, config=config.read_by('dense'), context=AttentionContext(step=0)
  )
  assert out.shape == x.shape
  with pytest.raises(ConfigError, match='pallas_gpu'):
    library_attend(x, x, x, config=config, context=AttentionContext(step=0))
  config = dataclasses.replace(config, implementation='cudnn')
  with pytest.raises(ConfigError, match='unknown implementation'):
    library_attend(x, x, x, config=config, context=AttentionContext(step=0))
