"""A mechanism from outside the package: registered, in the table, trained."""

import ast
import dataclasses
import importlib.util
import pathlib

import pytest

from psa_jax.attention import registry
from psa_jax.config import (
  AttentionConfig,
  ConfigError,
  ScheduleConfig,
  TrainConfig,
  from_config_dict,
  leaves,
  to_dict,
)
from psa_jax.config import attention as config_lib
from psa_jax.train import loop
from tests.attention import test_contract as contract
from tests.train import tiny

# A scheduled share of the nearest keys, in a few lines of jax.numpy.
FILE = '''
"""Attention to a scheduled share of the nearest keys (`nearby`)."""

from dataclasses import dataclass

import jax.numpy as jnp

import psa_jax
from psa_jax.attention.block_lists import document_start
from psa_jax.config import MechanismConfig, ScheduleConfig
from psa_jax.config.fields import SHARE, schedule
from psa_jax.schedules import make
from psa_jax.types import AttnOut


@dataclass(frozen=True)
class NearbyConfig(MechanismConfig):
  keep: ScheduleConfig = schedule(ScheduleConfig(), SHARE)


def nearby(q, k, v, *, config, context, learned=None):
  B, T, N, H = q.shape
  t, s = jnp.arange(T)[None, :, None], jnp.arange(T)[None, None]
  begin = document_start(context.segment_ids, B, T)[..., None]
  visible = t - begin + 1
  kept = jnp.ceil(make(config.nearby.keep)(context.step) * visible - 1e-3)
  read = (s <= t) & (s >= begin) & (t - s < kept)
  rows = q.reshape(B, T, k.shape[2], -1, H)
  scores = jnp.einsum('btkgh,bskh->bkgts', rows, k).astype(jnp.float32)
  scores = jnp.where(read[:, None, None], scores * H**-0.5, -jnp.inf)
  weights = jnp.exp(scores - scores.max(-1, keepdims=True))
  weights = weights / weights.sum(-1, keepdims=True)
  out = jnp.einsum('bkgts,bskv->btkgv', weights, v.astype(jnp.float32))
  density = 1 - ((visible - kept) / visible).mean()
  return AttnOut(out.reshape(B, T, N, -1).astype(v.dtype), {'density': density})


SPEC = psa_jax.register(
  psa_jax.MechanismSpec(
    name='nearby', function=nearby, config=NearbyConfig, causal_only=True
  )
)
'''


@pytest.fixture(scope='module')
def spec(tmp_path_factory):
  """The spec of the file; unknown again afterwards."""
  path = tmp_path_factory.mktemp('outside') / 'nearby.py'
  path.write_text(FILE)
  found = importlib.util.spec_from_file_location('nearby', path)
  module = importlib.util.module_from_spec(found)
  found.loader.exec_module(module)
  yield module.SPEC
  del config_lib.MECHANISMS['nearby']


def test_a_mechanism_is_named_in_its_own_module_only():
  """What others must know is in its spec; `dense` and `psa` are defaults."""
  package = pathlib.Path(registry.__file__).parents[1]
  names = set(registry.names()) - {'dense', 'psa'}
  assert len(names) >= 8
  homes = {'nsa_tile': 'nsa'}
  for path in package.rglob('*.py'):
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Constant) and node.value in names:
        home = homes.get(node.value, node.value)
        assert home in (path.stem, path.parent.name), (path, node.lineno)


def test_its_settings_are_keys(spec):
  assert 'model.attention.nearby.keep.init' in leaves()
  attention = {'name': 'nearby', 'nearby': {'keep': {'init': 0.25}}}
  config = from_config_dict({'model': {'attention': attention}})
  assert config.model.attention.nearby.keep == ScheduleConfig(init=0.25)
  assert from_config_dict(to_dict(config)) == config
  attention['nearby']['keep']['init'] = 1.5
  with pytest.raises(ConfigError, match=r'nearby\.keep\.init is 1\.5'):
    from_config_dict({'model': {'attention': attention}})
  bidirectional = {'kind': 'encoder', 'attention': {'name': 'nearby'}}
  with pytest.raises(ConfigError, match='nearby, which is causal.*dense'):
    from_config_dict({'model': bidirectional})


def test_it_passes_the_contract(spec, monkeypatch):
  def nearby(keep):
    settings = spec.config(keep=ScheduleConfig(init=keep))
    return AttentionConfig('nearby', nearby=settings)

  row = contract.Row(nearby(0.3), nearby(1.0))
  monkeypatch.setitem(contract.ROWS, 'nearby', row)
  contract.test_shapes_dtypes_and_scalars('nearby', 'float32')
  for cut in (False, True):
    contract.test_the_limit_is_dense('nearby', 'xla', cut)
  contract.test_future_tokens_change_no_bit_of_the_past('nearby', 31)
  # In plain products 0 x NaN is NaN, so finite numbers only.
  contract.check_what_is_not_read('nearby', 'xla', [None])
  contract.test_packed_documents_never_mix('nearby')
  contract.test_groups_equal_repeated_heads('nearby')
  contract.test_a_mesh_changes_nothing('nearby')
  contract.test_one_compilation_for_all_steps('nearby')


@pytest.mark.tier('default')
def test_it_trains_by_its_key(spec, tmp_path):
  text = tmp_path / 'text'
  text.mkdir()
  config = tiny.config(source=tiny.write_text(text))
  keep = ScheduleConfig('linear', final=0.2, length=2)
  attention = AttentionConfig('nearby', nearby=spec.config(keep=keep))
  model = dataclasses.replace(config.model, attention=attention)
  train = TrainConfig(steps=(3,), seq_len=(32,), batch_size=(8,))
  config = dataclasses.replace(config, model=model, train=train)
  result = loop.train_and_evaluate(config, tmp_path / 'run')
  validation = result['validation']
  assert validation['nearby']['density'] < 0.5
  assert validation['dense']['density'] == 1


def test_a_name_or_a_section_is_registered_once(spec):
  with pytest.raises(ConfigError, match="'nearby' is registered already"):
    registry.register(dataclasses.replace(spec, causal_only=False))
  taken = dataclasses.replace(spec, name='other', section='psa')
  with pytest.raises(ConfigError, match="'psa'.*holds a PsaConfig"):
    registry.register(taken)
  axes = {'wq': ('embed', 'head_dim')}
  with pytest.raises(ConfigError, match="'wq' has the axes"):
    registry.register(dataclasses.replace(spec, name='third', axes=axes))
  with pytest.raises(ConfigError, match='one word'):
    dataclasses.replace(spec, name='two words')
