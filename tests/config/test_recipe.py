"""Recipe files: loading one, and one clear line for each way to be wrong."""

import pathlib

import pytest

from psa_jax.config import ConfigError
from psa_jax.config.recipe import default_workdir, load_recipe

GOOD = """
from ml_collections import ConfigDict

def get_config(arg=''):
  return ConfigDict(ARGS[arg]())

ARGS = {'': lambda: {'seed': 1}, 'tiny': lambda: {'seed': 2}}
"""


@pytest.fixture
def recipe(tmp_path):
  """Writes a recipe file and returns its path."""

  def write(source, name='some.py'):
    path = tmp_path / name
    path.write_text(source)
    return str(path)

  return write


def refusal(spec, overrides=()):
  with pytest.raises(ConfigError) as caught:
    load_recipe(spec, overrides)
  return ' '.join(str(caught.value).split())


def test_argument_and_overrides(recipe):
  path = recipe(GOOD)
  assert load_recipe(path).seed == 1
  assert load_recipe(path + ':').seed == 1
  config = load_recipe(path + ':tiny', [('log.every', '1e1')])
  assert (config.seed, config.log.every) == (2, 10)
  assert load_recipe(path, [('seed', '9')]).seed == 9


def test_an_edit_counts_at_once(recipe):
  # Same size within the same second: a cached byte code would look current.
  assert load_recipe(recipe(GOOD)).seed == 1
  assert load_recipe(recipe(GOOD.replace("'seed': 1", "'seed': 5"))).seed == 5


def test_no_argument_is_no_suggestion():
  message = refusal('configs/lm_64k.py:fast')
  assert 'did you mean :?' not in message
  assert 'it takes (none), :quick' in message


def test_a_bad_argument_lists_the_valid_ones(recipe):
  path = recipe(GOOD)
  message = refusal(path + ':tyni')
  assert f'{path} has no argument :tyni' in message
  assert 'did you mean :tiny?' in message
  assert message.endswith('it takes (none), :tiny')


def test_an_option_may_follow_after_a_comma(recipe):
  source = (
    "def get_config(arg):\n  return {'name': arg}\n"
    "ARGS, OPTIONS = {'one': 1}, {'two': 2, 'three': 3}\n"
  )
  path = recipe(source)
  assert load_recipe(path + ':one').name == 'one'
  assert load_recipe(path + ':one,two').name == 'one,two'
  assert 'did you mean :one?' in refusal(path + ':onn,two')
  message = refusal(path + ':one,tow')
  assert "no 'tow' after :one, did you mean :one,two?" in message
  assert message.endswith('options: two, three')
  assert 'no argument :tiny,x' in refusal(recipe(GOOD) + ':tiny,x')


def test_an_argument_that_is_needed_or_not_taken(recipe):
  needs = recipe(GOOD.replace("'': lambda: {'seed': 1}, ", ''))
  assert 'needs an argument' in refusal(needs)
  assert refusal(needs).endswith('it takes :tiny')
  none = recipe('def get_config():\n  return {}\n')
  assert load_recipe(none).seed == 0
  assert 'too many positional arguments' in refusal(none + ':x')
  required = recipe("def get_config(arg):\n  return {'name': arg}\n")
  assert load_recipe(required + ':x').name == 'x'
  assert "missing a required argument: 'arg'" in refusal(required)


def test_a_missing_file_names_the_nearest(recipe):
  path = pathlib.Path(recipe(GOOD, 'lm_64k.py'))
  recipe(GOOD, 'vision.py')
  wrong = path.with_name('lm_46k.py')
  assert refusal(f'{wrong}:tiny') == (
    f'there is no recipe {wrong}; did you mean {path}?'
  )
  nowhere = path.parent / 'absent' / 'lm_64k.py'
  assert refusal(str(nowhere)).startswith(f'there is no recipe {nowhere}')


def test_a_folder_and_a_binary_file(tmp_path):
  assert 'is a folder; name a recipe in it' in refusal(str(tmp_path))
  binary = tmp_path / 'binary.py'
  binary.write_bytes(b'\xff\xfe\x00')
  assert 'cannot read the recipe' in refusal(str(binary))


def test_no_get_config(recipe):
  assert 'has no function get_config' in refusal(recipe('x = 1\n'))
  assert 'has no function get_config' in refusal(recipe('get_config = 1\n'))


def test_a_wrong_return_value(recipe):
  path = recipe('def get_config():\n  return None\n')
  assert 'returned NoneType' in refusal(path)


@pytest.mark.parametrize(
  ('source', 'text'),
  [
    ('x = 1\ny = nme\n', "line 2: NameError: name 'nme' is not defined"),
    ('x = (\n', "line 1: SyntaxError: '(' was never closed"),
    ('import absent_module\n', 'line 1: ModuleNotFoundError: No module'),
    ('def get_config():\n  x = {}\n  x[3]\n', 'line 3: KeyError: 3'),
    ('import json\njson.loads("{")\n', 'line 2: JSONDecodeError: Expecting'),
  ],
)
def test_an_exception_in_a_recipe_is_one_line_with_its_place(
  recipe, source, text
):
  path = recipe(source)
  assert refusal(path).startswith(f'{path} {text}')


def test_the_values_are_checked(recipe):
  unknown = recipe("def get_config():\n  return {'optim': {'lr': 1.0}}\n")
  assert 'did you mean config.optim.learning_rate?' in refusal(unknown)
  empty = recipe("def get_config():\n  return {'train': {'steps': 0}}\n")
  assert 'config.train.steps is (0,)' in refusal(empty)
  assert load_recipe(empty, [('train.steps', '30')]).train.steps == (30,)


@pytest.mark.parametrize(
  ('spec', 'folder'),
  [
    ('configs/lm_64k.py', 'runs/lm_64k'),
    ('configs/lm_64k.py:', 'runs/lm_64k'),
    ('configs/lm_64k.py:quick', 'runs/lm_64k_quick'),
    ('lm.py:a/../b', 'runs/lm_a_.._b'),
    ('recall.py:psa,mqar', 'runs/recall_psa_mqar'),
  ],
)
def test_default_workdir(spec, folder):
  assert default_workdir(spec) == pathlib.Path(folder)
