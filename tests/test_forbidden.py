"""Calls that no file of the project makes, each for a reason.

The rules read the source, so code that no other test runs counts as well.
"""

import ast
import functools
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
FOLDERS = ('psa_jax', 'configs', 'examples', 'experiments', '.ci')

# Attribute that is called -> why not.
CALLS = {
  'splitlines': r"it splits at form feeds and U+2028 too; use split('\n')",
  'expanduser': 'config.paths.expanded reads ~, with a message',
  'home': 'config.paths.expanded reads ~, with a message',
  'extractall': 'names in an archive may lead out of the folder',
  'unpack_archive': 'names in an archive may lead out of the folder',
  'system': 'a shell reads names as commands',
}
NAMES = {'eval': 'data would be code', 'exec': 'data would be code'}
# Their files run code when they are read.
MODULES = {'pickle', 'cPickle', 'dill', 'cloudpickle', 'joblib', 'marshal'}
MODULES |= {'shelve', 'yaml'}
KEYWORDS = {
  ('allow_pickle', True): 'data would be code',
  ('weights_only', False): 'data would be code',
  ('shell', True): 'a shell reads names as commands',
}
# Recipes are code; a path is expanded in one place.
ALLOWED = {
  ('psa_jax/config/recipe.py', 'exec'),
  ('psa_jax/config/paths.py', 'expanduser'),
}


def found(source):
  """(what is forbidden, why) for each place of a program."""
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      names = {alias.name.split('.')[0] for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      names = {(node.module or '').split('.')[0]}
    elif isinstance(node, ast.Call):
      yield from _in_call(node)
      continue
    else:
      continue
    for name in sorted(names & MODULES):
      yield name, 'data would be code'


def _in_call(node):
  match node.func:
    case ast.Attribute(value=ast.Name('torch'), attr='load'):
      yield 'torch.load', 'data would be code'
    case ast.Attribute(attr=name) if name in CALLS:
      yield name, CALLS[name]
    case ast.Name(name) if name in NAMES:
      yield name, NAMES[name]
  for keyword in node.keywords:
    value = keyword.value
    if isinstance(value, ast.Constant):
      key = keyword.arg, value.value
      if key in KEYWORDS:
        yield f'{keyword.arg}={value.value}', KEYWORDS[key]


@functools.cache
def files():
  folders = [path for name in FOLDERS for path in (ROOT / name).rglob('*.py')]
  return [ROOT / 'launch.py', *sorted(folders)]


def test_no_file_makes_a_forbidden_call():
  assert len(files()) > 200
  places = [
    f'{name}: {what}: {why}'
    for path in files()
    for name in [path.relative_to(ROOT).as_posix()]
    for what, why in found(path.read_text('utf-8'))
    if (name, what) not in ALLOWED
  ]
  assert not places


def test_every_exception_is_needed():
  for name, what in ALLOWED:
    source = (ROOT / name).read_text('utf-8')
    assert what in {found_name for found_name, _ in found(source)}


@pytest.mark.parametrize(
  'source',
  [
    'text.splitlines()',
    'pathlib.Path(x).expanduser()',
    'os.path.expanduser(x)',
    'pathlib.Path.home()',
    'tar.extractall(folder)',
    'os.system(x)',
    'import pickle',
    'from joblib import load',
    'def f():\n  import pickle as p',
    'torch.load(x)',
    'np.load(x, allow_pickle=True)',
    'subprocess.run(x, shell=True)',
    'eval(x)',
  ],
)
def test_a_forbidden_call_is_seen(source):
  assert len(list(found(source))) == 1


@pytest.mark.parametrize(
  'source',
  ['jax.jit(f).eval(x)', 'np.load(x)', 'text.split()', 'safetensors.load(x)'],
)
def test_an_allowed_call_is_let_through(source):
  assert not list(found(source))
