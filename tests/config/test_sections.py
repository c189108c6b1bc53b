"""Sections made by hand refuse what the command line refuses."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import pytest

from psa_jax.attention import attend
from psa_jax.attention.context import AttentionContext
from psa_jax.attention.psa import PsaConfig
from psa_jax.attention.topk import TopkConfig
from psa_jax.config import (
  AttentionConfig,
  Config,
  ConfigError,
  ModelConfig,
  OptimConfig,
  ScheduleConfig,
  SoftmaxConfig,
)

X = jnp.ones((1, 8, 2, 8))


def run(config):
  return attend(X, X, X, config=config, context=AttentionContext())


@pytest.mark.parametrize(
  ('make', 'words'),
  [
    (lambda: PsaConfig(budget='rato'), "unknown 'rato'; did you mean 'ratio'"),
    (lambda: PsaConfig(scoring='bound'), "did you mean 'bounds'"),
    (lambda: PsaConfig(block_k=0), 'PsaConfig.block_k is 0'),
    (lambda: PsaConfig(keep=ScheduleConfig(init=-1.0)), 'keep.init is -1.0'),
    (lambda: PsaConfig(keep=ScheduleConfig(init=0.0)), 'keep.init is 0.0'),
    (lambda: PsaConfig(keep=ScheduleConfig(init=2.0)), 'keep.init is 2.0'),
    (lambda: TopkConfig(coefficients=(1.0, 2.0)), 'has 2 entries'),
    (lambda: SoftmaxConfig('sas', clamp=3.0), 'read by kind=polynomial only'),
    (lambda: ScheduleConfig('exponential', final=0.0), 'begin or end at 0'),
    (lambda: ScheduleConfig(begin=2**30, length=2**30), 'below 2^31'),
    (lambda: OptimConfig(eps=1e60), 'within the range of float32'),
    (lambda: ModelConfig(num_heads=3, num_kv_heads=2), 'multiple of'),
    (lambda: AttentionConfig(), 'name is empty; name a mechanism'),
    (lambda: AttentionConfig('pza'), "did you mean 'psa'"),
    (lambda: AttentionConfig('psa', pza=PsaConfig()), 'AttentionConfig.psa?'),
    (
      lambda: AttentionConfig('topk', softmax=SoftmaxConfig('sas')),
      'it is for psa and hybrid',
    ),
    (
      lambda: ModelConfig(kind='encoder', attention=AttentionConfig('psa')),
      'psa, which is causal, but ModelConfig.kind=encoder reads both ways',
    ),
    (
      lambda: ModelConfig(
        kind='encoder_decoder', attention=AttentionConfig('psa')
      ),
      'an encoder_decoder takes dense or topk',
    ),
    (lambda: run(AttentionConfig('dsa')), 'learned is None'),
  ],
)
def test_an_impossible_value_is_refused_where_it_is_made(make, words):
  with pytest.raises(ConfigError) as error:
    make()
  assert words in str(error.value) and '\n' not in str(error.value)


WRONG_TYPES = {
  'PsaConfig(keep=0.3)': 'give ScheduleConfig(init=0.3)',
  "OptimConfig(learning_rate='fast')": 'expected a float',
  "AttentionConfig('psa', psa=0.3)": 'expected a PsaConfig, got 0.3',
  'attend(X, X, X, config=PsaConfig(), context=AttentionContext())': (
    "AttentionConfig('psa', psa=PsaConfig(...))"
  ),
  'attend(X, X, X, config=0.3, context=AttentionContext())': (
    'expected an AttentionConfig, got 0.3'
  ),
  "MechanismSpec(name='x', function=attend, config=dict)": (
    'a subclass of MechanismConfig'
  ),
}


def test_a_wrong_type_is_named():
  """As a user sees it: tests check annotations at run time, users do not."""
  program = """
import json, sys
import jax.numpy as jnp
from psa_jax.attention import AttentionContext, MechanismSpec, attend
from psa_jax.attention.psa import PsaConfig
from psa_jax.config import AttentionConfig, ConfigError, OptimConfig
X = jnp.ones((1, 8, 2, 8))
messages = {}
for text in json.loads(sys.argv[1]):
  try:
    eval(text)
  except ConfigError as e:
    messages[text] = str(e)
print(json.dumps(messages))
"""
  done = subprocess.run(
    [sys.executable, '-c', program, json.dumps([*WRONG_TYPES])],
    capture_output=True,
    text=True,
    cwd=pathlib.Path(__file__).resolve().parents[2],
  )
  messages = json.loads(done.stdout)
  for text, words in WRONG_TYPES.items():
    assert words in messages[text] and '\n' not in messages[text]


def test_long_values_are_cut():
  with pytest.raises(ConfigError) as error:
    PsaConfig(budget='x' * 100_000)
  assert len(str(error.value)) < 500


def test_sections_at_their_defaults_make_no_difference():
  plain = AttentionConfig('psa')
  assert plain == AttentionConfig('psa', psa=PsaConfig(), topk=TopkConfig())
  assert hash(plain) == hash(AttentionConfig('psa', psa=PsaConfig()))
  assert plain != AttentionConfig('psa', psa=PsaConfig(window=64))
  wide = dataclasses.replace(plain, psa=PsaConfig(window=64))
  assert wide.psa.window == 64 and plain.psa.window == 512
  assert dataclasses.replace(wide, implementation='xla').psa.window == 64
  with pytest.raises(AttributeError, match='no attribute'):
    _ = plain.nothing


def test_another_mechanism_reads_with_its_own_kernel_and_softmax():
  softmax = SoftmaxConfig('sas')
  config = AttentionConfig('psa', 'pallas_tpu', softmax=softmax)
  assert config.read_by('dense') == AttentionConfig('dense')
  assert Config().model.attention == AttentionConfig('dense')
