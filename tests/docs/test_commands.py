"""Every command that the documentation names works.

Read are all pages and the text of the Python files that a user starts or copies
(`pages.STARTED`). A command for launch.py is run with `--print_config`, so its
recipe, flags and overrides are resolved and nothing is trained.
"""

import json
import pathlib
import re
import shlex

import pytest
from absl import flags
from absl.testing import flagsaver

import launch
from psa_jax.config import recipe
from tests.docs.pages import README, RECIPES, ROOT, code, commands, name_of

MAKEFILE = (ROOT / 'Makefile').read_text()
LAUNCHES = commands(r'python launch\.py ([^#`|]*)')
PROGRAMS = commands(r'python ([\w./]+\.py)')
MODULES = commands(r'python -m (psa_jax[\w.]*)')
MAKES = commands(r'^\s*(?:\$ )?make ([a-z-]+\b[^#`]*)')


def resolve(words, capsys):
  """The configuration that launch.py makes of a command line."""
  with flagsaver.flagsaver():
    exit_code = launch.main(['launch.py', *words, '--print_config'])
  flags.FLAGS.mark_as_parsed()
  printed = capsys.readouterr()
  assert exit_code == 0, printed.err
  return json.loads(printed.out)


@pytest.fixture(autouse=True)
def in_the_root(monkeypatch):
  monkeypatch.chdir(ROOT)


def test_the_two_commands_are_there():
  assert {'train', 'test'} <= {
    command for file, command in MAKES if file == 'README.md'
  }


@pytest.mark.parametrize('file, command', LAUNCHES)
def test_launch_command_resolves(file, command, capsys):
  words = shlex.split(command)
  if words == ['--help']:
    assert launch.main(['launch.py', '--help']) == 0
    return
  assert any(word.startswith('--config=') for word in words)
  made = [w for w in words if w.startswith('--config=runs/')]
  if made:  # by another command of the README
    run = pathlib.Path(made[0].partition('=')[2]).parent
    exports = [
      recipe.default_workdir(spec) / 'export'
      for _, other in LAUNCHES
      if '--mode=export' in other
      for spec in re.findall(r'--config=(\S+)', other)
    ]
    assert run in exports
    return
  assert resolve(words, capsys)['name']


@pytest.mark.parametrize('file, command', MAKES)
def test_make_command_resolves(file, command, capsys):
  words = shlex.split(command)
  targets = [word for word in words if '=' not in word]
  for target in targets:
    assert re.search(rf'^{target}:', MAKEFILE, re.MULTILINE), target
  values = dict(word.split('=', 1) for word in words if '=' in word)
  for name in values:
    assert re.search(rf'^{name} \??=', MAKEFILE, re.MULTILINE), name
  if 'train' in targets:
    default = re.search(r'^CONFIG = (.*)$', MAKEFILE, re.MULTILINE)
    assert default is not None
    config = values.get('CONFIG', default[1])
    resolve(
      [f'--config={config}', *shlex.split(values.get('ARGS', ''))], capsys
    )


@pytest.mark.parametrize('file', RECIPES, ids=lambda path: path.name)
def test_recipe_gives_the_command_of_each_argument(file):
  """What is stated for a recipe is stated for every argument it takes."""
  namespace = {}
  exec(compile(file.read_text(), str(file), 'exec'), namespace)
  for arg in namespace.get('ARGS', ()):
    spec = f'{name_of(file)}:{arg}' if arg else name_of(file)
    command = rf'python launch\.py --config={re.escape(spec)}(?![\w:])'
    assert re.search(command, file.read_text()), f'{spec} has no command'


@pytest.mark.parametrize('file, path', PROGRAMS)
def test_program_exists(file, path):
  assert (ROOT / path).is_file(), file


@pytest.mark.parametrize('file, module', MODULES)
def test_module_command_names_a_program(file, module):
  path = (ROOT / module.replace('.', '/')).with_suffix('.py')
  assert "if __name__ == '__main__':" in path.read_text(), file


def test_overrides_named_in_the_readme_are_keys(capsys):
  overrides = [
    word
    for line in code(README.read_text())
    if 'launch.py' not in line and 'make ' not in line
    for word in line.split()
    if re.match(r'--(no)?config\.', word)
  ]
  assert overrides
  resolve(['--config=configs/lm_64k.py', *overrides], capsys)
