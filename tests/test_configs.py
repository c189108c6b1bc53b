"""Every recipe with every argument loads, is valid and says how to run it."""

import ast
import importlib.util
import pathlib
import re
import subprocess
import sys

import pytest

from psa_jax import config as config_lib
from psa_jax import tasks
from psa_jax.config.recipe import load_recipe
from psa_jax.schedules import ScheduleConfig

ROOT = pathlib.Path(__file__).resolve().parents[1]
RECIPES = sorted((ROOT / 'configs').glob('*.py'))


def module(path):
  spec = importlib.util.spec_from_file_location(path.stem, path)
  assert spec is not None and spec.loader is not None
  loaded = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(loaded)
  return loaded


ALL = [(path, arg) for path in RECIPES for arg in module(path).ARGS]
IDS = [f'{path.stem}:{arg}' for path, arg in ALL]
each = pytest.mark.parametrize(('path', 'arg'), ALL, ids=IDS)
RECALL = ROOT / 'configs/recall.py'


def load(path, arg):
  return load_recipe(f'{path}:{arg}')


def parameters(config):
  """Weights of the decoder LM by arithmetic, norms left out."""
  m = config.model
  kind, _, size = config.data.tokenizer.partition(':')
  vocabulary = int(size) if kind == 'bpe' else 257
  head = m.head_dim or m.d_model // m.num_heads
  attention = m.d_model * head * (2 * m.num_heads + 2 * m.num_kv_heads)
  layer = attention + 3 * m.d_model * m.mlp_dim
  return vocabulary * m.d_model + m.num_layers * layer


def tokens(config):
  t = config.train
  stages = zip(t.steps, t.seq_len, t.batch_size, strict=True)
  return sum(steps * length * batch for steps, length, batch in stages)


def test_there_are_recipes():
  assert {'lm_64k', 'recall'} <= {p.stem for p in RECIPES}
  sizes = module(ROOT / 'configs/lm_64k.py').ARGS
  assert list(sizes) == ['', 'quick', '125m', '1b', '7b']


@each
def test_it_loads_and_is_valid(path, arg):
  config = load(path, arg)
  suffix = f'_{arg}' if arg else ''
  assert config.name == f'{path.stem}{suffix}'


@each
def test_it_names_a_task_that_fits(path, arg):
  assert 'task' in module(path).get_config(*filter(None, [arg]))
  tasks.check(load(path, arg))


@each
def test_its_docstring_says_command_cost_and_metric(path, arg):
  text = module(path).ARGS[arg].__doc__
  spec = f'configs/{path.name}' + (f':{arg}' if arg else '')
  assert f'Command: python launch.py --config={spec}\n' in text
  assert re.search(r'Cost: \S+', text)
  assert re.search(r'Expected: \S+', text)


@pytest.mark.parametrize('path', RECIPES, ids=lambda p: p.stem)
def test_it_imports_ml_collections_only(path):
  imported = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      imported |= {alias.name.split('.')[0] for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0
      imported.add((node.module or '').split('.')[0])
  assert imported == {'ml_collections'}


def test_loading_recipes_needs_no_jax():
  program = (
    'import runpy, sys\n'
    'for spec in sys.argv[1:]:\n'
    '  path, _, arg = spec.partition(":")\n'
    '  runpy.run_path(path)["get_config"](*[arg] if arg else [])\n'
    'print({"jax", "numpy", "flax", "psa_jax"} & set(sys.modules))'
  )
  specs = [f'{path}:{arg}' for path, arg in ALL]
  done = subprocess.run(
    [sys.executable, '-c', program, *specs],
    capture_output=True,
    text=True,
    cwd=ROOT,
  )
  assert (done.stdout, done.stderr) == ('set()\n', '')


@pytest.mark.parametrize('arg', ['', 'quick', '125m', '1b', '7b'])
def test_lm_64k_is_progressive_and_sparse_at_the_end(arg):
  config = load(ROOT / 'configs/lm_64k.py', arg)
  total = sum(config.train.steps)
  norm, psa = config.model.norm, config.model.attention.psa
  assert config.model.attention.name == 'psa'
  assert norm.kind == 'prepbn'
  assert psa.keep.init == 1.0
  assert psa.keep.final <= 0.05
  # Both reach their final form with training time left in it.
  assert psa.keep.begin + psa.keep.length < total
  assert norm.warmup_steps + norm.decay_steps < total
  assert config.optim.warmup_steps < total
  longest = 8192 if arg == 'quick' else 65_536
  assert config.train.seq_len[-1] == max(config.train.seq_len) == longest


@pytest.mark.parametrize(
  ('arg', 'size', 'fewest', 'most'),
  [('125m', 125e6, 8, 8), ('1b', 1e9, 8, 16), ('7b', 7e9, 8, 64)],
)
def test_accelerator_recipes_are_what_their_docstrings_say(
  arg, size, fewest, most
):
  config = load(ROOT / 'configs/lm_64k.py', arg)
  assert parameters(config) == pytest.approx(size, rel=0.06)
  assert config.model.compute_dtype == 'bfloat16'
  assert config.model.num_kv_heads < config.model.num_heads
  mesh = config.mesh
  assert mesh.data == -1
  fixed = mesh.fsdp * mesh.tensor
  assert fewest % fixed == 0
  # At most this many devices get a row of their own in every micro-batch.
  rows = min(config.train.batch_size) // config.optim.accumulate
  assert rows * mesh.tensor == most
  assert config.model.num_kv_heads % mesh.tensor == 0
  text = module(ROOT / 'configs/lm_64k.py').ARGS[arg].__doc__
  assert 'Cost: not measured' in text
  assert 'Expected: not measured' in text
  cost = re.search(r'(\S+) tokens, (\S+) FLOP', text)
  assert cost is not None
  count = tokens(config)
  assert float(cost[1]) == pytest.approx(count, rel=0.05)
  flops = 6 * parameters(config) * count
  assert float(cost[2]) == pytest.approx(flops, rel=0.1)


@pytest.mark.parametrize('task', module(RECALL).OPTIONS)
@pytest.mark.parametrize('mechanism', module(RECALL).ARGS)
def test_recall_joins_every_mechanism_with_every_task(mechanism, task):
  config = load(RECALL, f'{mechanism},{task}')
  assert config.data.source == f'synthetic:{task}'
  assert config.name == f'recall_{mechanism}_{task}'
  tasks.load_data(config)  # the task fits into every stage
  attention = config.model.attention
  own = getattr(attention, attention.name.removesuffix('_tile'))
  schedules = [
    x
    for x in vars(own).values()
    if isinstance(x, ScheduleConfig) and x.init != x.final
  ]
  assert bool(schedules) == (mechanism not in ('dense', 'sla'))
  for schedule in schedules:
    # The last steps are at the setting that is judged.
    assert schedule.begin + schedule.length < sum(config.train.steps)


def test_the_controls_of_recall_differ_from_psa_by_the_ranking_only():
  arms = {arg: load(RECALL, arg) for arg in ('psa', 'window', 'random')}
  rankings = {arg: arm.model.attention.psa.scoring for arg, arm in arms.items()}
  assert rankings == {'psa': 'mean', 'window': 'recent', 'random': 'random'}
  for arm in arms.values():
    changes = config_lib.diff(arms['psa'], arm)
    changed = {**changes.runtime, **changes.other}
    assert set(changed) <= {'name', 'model.attention.psa.scoring'}


def test_recall_without_a_task_is_the_first_one():
  left, right = load(RECALL, 'psa'), load(RECALL, 'psa,mqar')
  changes = config_lib.diff(left, right)
  assert set(changes.other) == {'name'} and not changes.runtime
