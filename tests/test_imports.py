"""Import directions: a layer may use those below it, and nothing in a circle.

The rules read the source, so an import inside a function counts as well.
"""

import ast
import graphlib
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]

# A package may import those of its own number and below. What is planned and
# not there yet (decode between models and tasks, sweep beside report) gets its
# number when it comes.
LAYER = {
  'types': 0,
  'extras': 0,
  'command_line': 0,
  'compile_cache': 0,
  'config': 0,
  'schedules': 0,
  'sharding': 0,
  'kernels': 1,
  'attention': 2,
  'norm': 2,
  'quant': 2,
  'models': 3,
  'eval': 5,
  'tasks': 5,
  'train': 6,
  'report': 7,
  # The public names: psa_jax/__init__.py and its modules.
  'nnx': 3,
  '': 7,
}
# Data stands beside the layers: it uses these, and only LAYER 5 up uses it.
DATA_USES = {'types', 'config', 'data', 'extras', 'command_line'}
DATA_USED_FROM = 5

# (module, module it imports in a function) -> why that may close a circle.
LATE: dict[tuple[str, str], str] = {}

# Data classes and text, no arrays. Its last module reads ConfigDicts, which no
# other may see.
LIGHT = {'config', 'extras'}
READS_CONFIG_DICTS = {'psa_jax.config.recipe'}
# Mechanisms are functions of arrays. What is learned is a module: those of the
# layer, and those of mechanisms that have parameters.
WITH_MODULES = {'layer', 'cross', 'registry', 'projections', 'parameters'}
WITH_MODULES |= {'sla', 'topk'}

NEVER = {'tensorflow', 'torch', 'clu', 'configs', 'experiments', 'launch'}
NEVER |= {'tests'}


def sources():
  """Dotted module name -> source of every file of the library."""
  found = {}
  for path in sorted((ROOT / 'psa_jax').rglob('*.py')):
    parts = path.relative_to(ROOT).with_suffix('').parts
    name = '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)
    found[name] = path.read_text(encoding='utf-8')
  return found


def imported(tree, module, *, is_package=False):
  """Absolute names that the nodes of `tree` import.

  `from a.b import c` gives both `a.b` and `a.b.c`: c may be a module.
  """
  names = set()
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      base = node.module or ''
      if node.level:
        up = node.level - is_package
        parts = module.split('.')
        parent = '.'.join(parts[: len(parts) - up])
        base = f'{parent}.{base}'.strip('.')
      names |= {base} | {f'{base}.{alias.name}' for alias in node.names}
  return names


def violations(module, source, *, is_package=False):
  """One line for each import in `source` that the rules forbid."""
  names = imported(ast.parse(source), module, is_package=is_package)
  own = (module.split('.') + [''])[1]
  tops = {name.split('.')[0] for name in names}
  used = {name.split('.')[1] for name in names if name.startswith('psa_jax.')}
  bad = [f'{module} imports {top}' for top in sorted(tops & NEVER)]
  if own in LIGHT:
    allowed = sys.stdlib_module_names | {'psa_jax'}
    if module in READS_CONFIG_DICTS:
      allowed = allowed | {'ml_collections'}
    bad += [f'{module} imports {top}' for top in sorted(tops - allowed)]
  elif 'ml_collections' in tops:
    bad.append(f'{module} imports ml_collections')
  functional = own == 'attention' and module.split('.')[-1] not in WITH_MODULES
  if 'flax' in tops and (own == 'kernels' or functional):
    bad.append(f'{module} imports flax')
  return bad + [
    f'{module} imports psa_jax.{other}'
    for other in sorted(used)
    if not may_use(own, other)
  ]


def may_use(own, other):
  if own == 'data':
    return other in DATA_USES
  if other == 'data':
    return LAYER.get(own, 0) >= DATA_USED_FROM
  return LAYER.get(other, 99) <= LAYER.get(own, 0)


def is_package(module):
  return (ROOT / module.replace('.', '/') / '__init__.py').exists()


def test_every_module_has_a_layer():
  found = {name.split('.')[1] for name in sources() if '.' in name}
  assert found >= {'config', 'kernels', 'attention', 'models', 'data'}
  assert found <= {*LAYER, 'data'}, 'give the new module its number in LAYER'


def test_every_name_of_the_lists_exists():
  """A rule about a file that is gone would hold for ever."""
  tops = {f'psa_jax.{name}'.rstrip('.') for name in {*LAYER, *DATA_USES}}
  assert tops | READS_CONFIG_DICTS <= sources().keys()
  assert WITH_MODULES <= {name.split('.')[-1] for name in sources()}
  for importer, other in LATE:
    tree = ast.parse(sources()[importer])
    assert other in imported(tree, importer, is_package=is_package(importer))


@pytest.mark.parametrize('module', sources())
def test_directions(module):
  source = sources()[module]
  assert violations(module, source, is_package=is_package(module)) == []


@pytest.mark.parametrize(
  ('module', 'source'),
  [
    ('psa_jax.kernels.dense.xla', 'from flax import nnx'),
    ('psa_jax.kernels.dense.xla', 'import flax.nnx as nnx'),
    ('psa_jax.kernels.tiles', 'from psa_jax.attention import attend'),
    ('psa_jax.kernels.tiles', 'from psa_jax import attention'),
    ('psa_jax.kernels.tiles', 'from ..attention import attend'),
    ('psa_jax.attention.psa', 'from flax import nnx'),
    ('psa_jax.attention.psa', 'from psa_jax.models import blocks'),
    ('psa_jax.norm.prepbn', 'import psa_jax.train.step'),
    ('psa_jax.models.blocks', 'from psa_jax.data import pipeline'),
    ('psa_jax.models.blocks', 'def f():\n  from psa_jax import train'),
    ('psa_jax.data.pipeline', 'from psa_jax.schedules import make'),
    ('psa_jax.data.pipeline', 'from psa_jax import report'),
    ('psa_jax.data.sources.tfds', 'from psa_jax.tasks import Loss'),
    ('psa_jax.data.sources.tfds', 'import tensorflow as tf'),
    ('psa_jax.tasks.recall', 'from psa_jax.train.stages import plan'),
    ('psa_jax.eval.perplexity', 'from psa_jax.train import step'),
    ('psa_jax.train.loop', 'import torch'),
    ('psa_jax.train.loop', 'from configs import lm_64k'),
    ('psa_jax.train.loop', 'import launch'),
    ('psa_jax.train.loop', 'from psa_jax.report import table'),
    ('psa_jax.train.loop', 'from ml_collections import ConfigDict'),
    ('psa_jax.config', 'import jax'),
    ('psa_jax.config', 'from psa_jax.kernels import tiles'),
    ('psa_jax.config.fields', 'import numpy'),
    ('psa_jax.config.tree', 'import ml_collections'),
    ('psa_jax.train.workdir', 'import ml_collections'),
    ('psa_jax.unheard_of', 'from psa_jax.kernels import tiles'),
  ],
)
def test_a_forbidden_import_is_seen(module, source):
  assert len(violations(module, source)) == 1


@pytest.mark.parametrize(
  ('module', 'source'),
  [
    ('psa_jax.attention.layer', 'from flax import nnx'),
    ('psa_jax.attention.topk', 'from flax import nnx'),
    ('psa_jax.attention.nsa.parameters', 'from flax import nnx'),
    ('psa_jax.attention.psa', 'from psa_jax.kernels.dense import api'),
    ('psa_jax.data.text.corpus', 'from psa_jax.data import sources'),
    ('psa_jax.data.sources.tfds', 'import tensorflow_datasets as tfds'),
    ('psa_jax.train.loop', 'from psa_jax.data import pipeline'),
    ('psa_jax.train.loop', 'from psa_jax import tasks'),
    ('psa_jax.tasks.recall', 'from psa_jax.eval import recall'),
    ('psa_jax.train.loop', 'from psa_jax.config import recipe'),
    ('psa_jax.config.recipe', 'from ml_collections import ConfigDict'),
  ],
)
def test_an_allowed_import_is_let_through(module, source):
  assert violations(module, source) == []


def graph_of(found, *, late=LATE):
  """Module -> modules of `found` that it imports anywhere, but for `late`."""
  graph = {}
  for module, source in found.items():
    tree = ast.parse(source)
    names = imported(tree, module, is_package=is_package(module)) & found.keys()
    # `from package import module` needs the module, not the whole package.
    graph[module] = {
      name
      for name in names
      if not any(other.startswith(name + '.') for other in names)
      and (module, name) not in late
    }
  return graph


def test_no_modules_import_each_other_in_a_circle():
  graphlib.TopologicalSorter(graph_of(sources())).prepare()


@pytest.mark.parametrize('last', ['import a', 'def f():\n  import a'])
def test_a_circle_is_seen_in_a_function_too(last):
  circle = {'a': 'from b import f', 'b': 'import c', 'c': last}
  with pytest.raises(graphlib.CycleError):
    graphlib.TopologicalSorter(graph_of(circle)).prepare()
  known = {('c', 'a'): 'documented'}
  graphlib.TopologicalSorter(graph_of(circle, late=known)).prepare()


def test_a_refused_command_starts_no_device():
  program = """
import sys, launch
from jax._src import xla_bridge
code = launch.main(['launch.py', '--config=configs/lm_64k.py:nothing'])
print(code, xla_bridge.backends_are_initialized())
print({'orbax', 'tensorflow', 'grain'} & set(sys.modules))
"""
  done = subprocess.run(
    [sys.executable, '-c', program],
    capture_output=True,
    text=True,
    cwd=ROOT,
  )
  assert done.stdout == '2 False\nset()\n', done.stderr
