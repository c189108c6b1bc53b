"""The edge of the configuration: keys, types, overrides, JSON, differences."""

import dataclasses
import json
import typing

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict, config_dict

from psa_jax.config import (
  Config,
  ConfigError,
  apply_overrides,
  diff,
  find_leaf,
  flatten,
  from_config_dict,
  leaves,
  to_dict,
  with_task,
)
from psa_jax.config.tree import RENAMED, read_value


def override(path, value):
  """What an override of one key is read as."""
  return read_value(path, value)


def refusal(call, *args):
  with pytest.raises(ConfigError) as caught:
    call(*args)
  message = str(caught.value)
  assert '\n' not in message
  return message


def test_nothing_given_is_the_default():
  assert from_config_dict({}) == Config()
  assert from_config_dict(ConfigDict()) == Config()
  assert from_config_dict({'model': {'attention': {'dense': {}}}}) == Config()


def test_values_land_at_their_key_and_nowhere_else():
  values = {
    'model': {'norm': {'kind': 'prepbn'}, 'num_heads': 4},
    'train': {'steps': (50,)},
  }
  config = from_config_dict(ConfigDict(values))
  assert config.model.norm.kind == 'prepbn'
  assert config.model.num_heads == 4
  assert config.train.steps == (50,)
  changes = diff(Config(), config)
  assert set(changes.runtime) == {'train.steps'}
  assert set(changes.other) == {'model.norm.kind', 'model.num_heads'}


@pytest.mark.parametrize(
  ('given_key', 'near'),
  [
    ('optim.lr', 'optim.learning_rate'),
    ('optim.learning_rte', 'optim.learning_rate'),
    ('learning_rate', 'optim.learning_rate'),
    ('model.window', 'model.attention.psa.window'),
    ('model.layers', 'model.num_layers'),
    ('modle', 'model'),
    ('train.steps[0]', 'train.steps'),
    ('model.atention', 'model.attention'),
    ('seeed', 'seed'),
  ],
)
def test_an_unknown_key_names_the_nearest(given_key, near):
  nested = 1
  for name in reversed(given_key.split('.')):
    nested = {name: nested}
  for message in (
    refusal(from_config_dict, nested),
    refusal(apply_overrides, Config(), [(given_key, '1')]),
  ):
    assert f'unknown key config.{given_key};' in message
    assert f'did you mean config.{near}?' in message


def test_an_override_in_an_unknown_section():
  message = refusal(apply_overrides, Config(), [('modle.num_layers', '1')])
  assert message.startswith('unknown key config.modle.num_layers; did you ')
  assert 'did you mean config.model.num_layers?' in message


def test_an_unknown_key_lists_its_section():
  message = refusal(from_config_dict, {'mesh': {'rows': 2}})
  assert message.endswith('config.mesh has: data, fsdp, tensor')


@pytest.mark.parametrize('old, new', RENAMED.items())
def test_a_key_of_before_is_refused_by_its_new_name(old, new):
  assert set(new) <= leaves().keys() and old not in leaves()
  nested = 3
  for name in reversed(old.split('.')):
    nested = {name: nested}
  for message in (
    refusal(from_config_dict, nested),
    refusal(apply_overrides, Config(), [(old, '3')]),
  ):
    names = ' and '.join(f'config.{name}' for name in new)
    assert message == f'config.{old} is now {names}'


def test_a_saved_configuration_is_read_by_the_new_names():
  saved = to_dict(Config())
  saved['eval']['reestimate'] = saved['eval'].pop('recalibrate_bn')
  norm = saved['model']['norm']
  del norm['base_eps'], norm['bn_eps']
  norm['eps'] = 1e-5  # of both, when there was one
  changes = diff(with_task(saved), Config())
  assert not changes.runtime
  assert changes.other == {'model.norm.base_eps': (1e-5, 1e-6)}


def test_a_section_takes_no_value_and_a_key_no_section():
  message = refusal(apply_overrides, Config(), [('mesh', '4')])
  assert 'config.mesh is a section' in message
  message = refusal(from_config_dict, {'seed': {'a': 1}})
  assert message == "config.seed: expected an int, got {'a': 1}"
  message = refusal(from_config_dict, ConfigDict({'seed': {'a': 1}}))
  assert message == "config.seed: expected an int, got {'a': 1}"


@pytest.mark.parametrize('text', ['1000', '1e3', '1000.0', ' 1_000 ', 1e3])
def test_a_whole_number_is_an_int_however_written(text):
  value = override('train.loss_chunk', text)
  assert value == 1000
  assert type(value) is int


@pytest.mark.parametrize(
  'value', ['1.5', 1.5, 'ten', '', True, 'inf', 'nan', (3,), float('inf')]
)
def test_anything_else_is_no_int(value):
  message = refusal(override, 'train.loss_chunk', value)
  assert message == f'config.train.loss_chunk: expected an int, got {value!r}'


@given(st.integers(-(2**62), 2**62))
def test_every_int_is_read_exactly(number):
  assert override('seed', str(number)) == number
  assert override('seed', number) == number


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_float_is_read_exactly(number):
  assert override('optim.eps', repr(number)) == number


def test_floats():
  value = override('optim.learning_rate', 1)
  assert (value, type(value)) == (1.0, float)
  for bad in ('fast', True, [0.1]):
    message = refusal(override, 'optim.learning_rate', bad)
    assert (
      message == f'config.optim.learning_rate: expected a float, got {bad!r}'
    )


@pytest.mark.parametrize('path', ['optim.clip_norm', 'seed', 'name'])
@pytest.mark.parametrize('source', ['dict', 'placeholder'])
def test_none_is_refused_and_the_default_named(path, source):
  none = None if source == 'dict' else config_dict.placeholder(object)
  values = ConfigDict()
  with values.unlocked():
    node = values
    *sections, name = path.split('.')
    for section in sections:
      node[section] = ConfigDict()
      node = node[section]
    node[name] = none
  message = refusal(from_config_dict, values)
  default = find_leaf(path).default
  assert message.startswith(f'config.{path}: None is not a value')
  assert repr(default) in message


def test_a_required_placeholder_is_named():
  values = ConfigDict({'optim': {}})
  values.optim.eps = config_dict.required_placeholder(float)
  assert 'config.optim' in refusal(from_config_dict, values)


@pytest.mark.parametrize(
  ('text', 'value'),
  [
    ('true', True),
    ('True', True),
    ('1', True),
    (1, True),
    (True, True),
    ('false', False),
    ('FALSE', False),
    ('0', False),
    (0, False),
    (False, False),
  ],
)
def test_bools(text, value):
  assert override('eval.dense', text) is value


@pytest.mark.parametrize('bad', ['yes', 2, 1.0, '', 'truee'])
def test_no_bools(bad):
  message = refusal(override, 'eval.dense', bad)
  assert 'expected a bool (true or false)' in message
  assert repr(bad) in message


@pytest.mark.parametrize(
  'written',
  [
    '4,5e0',
    '(4,5)',
    '[4, 5]',
    ' ( 4 , 5 ) ',
    '4,5,',
    [4, 5],
    (4.0, '5'),
  ],
)
def test_tuples_however_written(written):
  value = override('train.steps', written)
  assert value == (4, 5)
  assert [type(v) for v in value] == [int, int]


@pytest.mark.parametrize(
  ('written', 'value'),
  [('7', (7,)), ('(7,)', (7,)), (7, (7,)), ('()', ()), ('', ()), ([], ())],
)
def test_short_tuples(written, value):
  assert override('train.steps', written) == value


def test_a_tuple_of_floats_and_a_wrong_entry():
  path = 'model.attention.psa.keep.values'
  assert override(path, '1,.5') == (1.0, 0.5)
  message = refusal(override, path, '1,half')
  assert message == f"config.{path}[1]: expected a float, got 'half'"
  message = refusal(override, 'train.steps', '4,,5')
  assert message == "config.train.steps[1]: expected an int, got ''"
  message = refusal(override, 'train.steps', {'a': 1})
  assert 'config.train.steps[0]: expected an int' in message


def test_lists_of_a_config_dict_become_tuples():
  config = from_config_dict(ConfigDict({'train': {'steps': [30]}}))
  assert config.train.steps == (30,)


def test_text_and_choices():
  assert override('name', '1e3') == '1e3'
  assert 'expected text, got 3' in refusal(override, 'name', 3)
  message = refusal(override, 'model.norm.kind', 'PreBN')
  assert "unknown 'PreBN'; did you mean 'prepbn'?" in message
  assert 'rmsnorm, layernorm, batchnorm, repbn, prepbn' in message
  assert 'expected text' in refusal(override, 'model.norm.kind', 3)


def test_the_last_override_wins_and_the_whole_is_validated():
  overrides = [('seed', '1'), ('seed', '2')]
  assert from_config_dict({'seed': 5}, overrides).seed == 2
  heads = {'model': {'num_heads': 3, 'num_kv_heads': 2, 'd_model': 96}}
  assert 'num_kv_heads' in refusal(from_config_dict, heads)
  mended = from_config_dict(heads, [('model.num_kv_heads', '3')])
  assert mended.model.num_kv_heads == 3


def test_an_impossible_value_is_refused():
  message = refusal(from_config_dict, {'train': {'steps': (0,)}})
  assert message.startswith('config.train.steps is (0,)')


def test_dict_and_back():
  config = from_config_dict(
    {
      'model': {'attention': {'psa': {'keep': {'kind': 'linear'}}}},
      'train': {
        'seq_len': (64, 128),
        'batch_size': 2 * (2,),
        'steps': (10, 20),
      },
    }
  )
  saved = json.loads(json.dumps(to_dict(config)))
  assert from_config_dict(saved) == config
  assert from_config_dict(ConfigDict(saved)) == config
  assert from_config_dict(flatten(saved)) == config
  assert diff(saved, config) == ({}, {})


def test_every_leaf_is_written_and_of_a_type_that_can_be_read():
  assert set(flatten(to_dict(Config()))) == set(leaves())
  scalars = {int, float, bool, str}
  for leaf in leaves().values():
    kind = leaf.type
    if typing.get_origin(kind) is tuple:
      kind, dots = typing.get_args(kind)
      assert dots is ...
    assert kind in scalars, leaf.path


def test_diff_splits_by_what_a_resumed_run_may_change():
  changes = diff(
    Config(),
    from_config_dict(
      {
        'log': {'every': 7},
        'checkpoint': {'keep': 3},
        'data': {'data_dir': 'elsewhere'},
        'optim': {'learning_rate': 1e-4},
        'model': {'attention': {'psa': {'eval_keep': 0.5}}},
      }
    ),
  )
  assert changes.runtime == {
    'log.every': (1, 7),
    'checkpoint.keep': (2, 3),
    'data.data_dir': ('', 'elsewhere'),
    'model.attention.psa.eval_keep': (0.0, 0.5),
  }
  assert changes.other == {'optim.learning_rate': (1e-3, 1e-4)}


def test_diff_with_a_file_from_before_or_after_a_key_existed():
  old = to_dict(Config())
  del old['seed']
  assert diff(old, Config()) == ({}, {})
  changed = dataclasses.replace(Config(), seed=4)
  assert diff(old, changed).other == {'seed': (0, 4)}
  old['gone'] = {'key': 3}
  assert diff(old, Config()).other == {'gone.key': (3, None)}
