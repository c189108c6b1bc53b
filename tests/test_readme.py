"""Every command and path that the documentation names works and exists.

Read are README.md, the pages below experiments/ and psa_jax/, and the text of
the Python files that a user starts or copies (launch.py, configs/,
experiments/). A command for launch.py is run with `--print_config`, so its
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

ROOT = pathlib.Path(__file__).resolve().parents[1]
README = (ROOT / 'README.md').read_text()
PAGES = [
  ROOT / 'README.md',
  *sorted((ROOT / 'experiments').rglob('*.md')),
  *sorted((ROOT / 'psa_jax').rglob('*.md')),
]
RECIPES = sorted((ROOT / 'configs').glob('*.py'))
SOURCES = [
  ROOT / 'launch.py',
  *RECIPES,
  *sorted((ROOT / 'experiments').rglob('*.py')),
]
TOP = {path.name for path in ROOT.iterdir()} - {'runs'}
MAKEFILE = (ROOT / 'Makefile').read_text()


def code(page):
  """Lines of fenced blocks and inline code of a Markdown text."""
  fenced = re.findall(r'^```.*?\n(.*?)^```', page, re.DOTALL | re.MULTILINE)
  prose = re.sub(r'^```.*?^```', '', page, flags=re.DOTALL | re.MULTILINE)
  inline = re.findall(r'`([^`\n]+)`', prose)
  return [line.strip() for block in fenced for line in block.split('\n')] + [
    *inline
  ]


def lines(path):
  text = path.read_text()
  return code(text) if path.suffix == '.md' else text.split('\n')


def found(pattern):
  """(file, command) of every line that matches; two spaces end a command."""
  return sorted({
    (str(path.relative_to(ROOT)), match[1].split('  ')[0].strip())
    for path in [*PAGES, *SOURCES]
    for line in lines(path)
    if (match := re.search(pattern, line))
  })  # fmt: skip


LAUNCHES = found(r'python launch\.py ([^#`|]*)')
PROGRAMS = found(r'python ([\w./]+\.py)')
MODULES = found(r'python -m (psa_jax[\w.]*)')
MAKES = found(r'^\s*(?:\$ )?make ([a-z-]+\b[^#`]*)')


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
  relative = file.relative_to(ROOT)
  for arg in namespace.get('ARGS', ()):
    spec = f'{relative}:{arg}' if arg else str(relative)
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
    for line in code(README)
    if 'launch.py' not in line and 'make ' not in line
    for word in line.split()
    if re.match(r'--(no)?config\.', word)
  ]
  assert overrides
  resolve(['--config=configs/lm_64k.py', *overrides], capsys)


def is_path(word):
  """Whether a word of code is meant as a path of this repository."""
  if not re.fullmatch(r'[\w.][\w./-]*', word):
    return False
  first = word.split('/')[0]
  return ('/' in word and first in TOP) or word.endswith(
    ('.py', '.md', '.toml', '.txt')
  )


@pytest.mark.parametrize('page', PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_paths_exist(page):
  text = page.read_text()
  prose = re.sub(r'^```.*?^```', '', text, flags=re.DOTALL | re.MULTILINE)
  words = re.findall(r'`([^`\n]+)`', prose)
  links = re.findall(r'\]\((?!https?:|#)([^)#]+)', text)
  named = [w.partition(':')[0] for w in words if is_path(w.partition(':')[0])]
  for path in [*named, *links]:
    assert (ROOT / path).exists() or (page.parent / path).exists(), path


def tree():
  """The paths in the README's tree: two spaces of indent a folder."""
  block = re.search(r'^## The tree\n.*?^```\w*\n(.*?)^```', README, re.S | re.M)
  assert block is not None
  folders, paths = [], []
  for line in block[1].rstrip('\n').split('\n'):
    match = re.fullmatch(r'( *)(\S+) +(\S.*)', line)
    assert match, f'{line!r} is not: indent, name, description'
    indent, name = match[1], match[2].rstrip('/')
    folders = [*folders[: len(indent) // 2], name]
    paths.append('/'.join(folders))
  return paths


def test_tree_names_what_exists():
  assert [path for path in tree() if not (ROOT / path).exists()] == []


def test_tree_names_every_module():
  modules = {
    str((path.parent if path.name == '__init__.py' else path).relative_to(ROOT))
    for folder in ('psa_jax', 'configs', 'experiments')
    for path in (ROOT / folder).rglob('*.py')
  }
  assert modules - set(tree()) == set()
