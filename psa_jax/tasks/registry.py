"""Which `task` there is, and whether a configuration fits together.

A task is a file of this folder that ends with one `register(TaskSpec(...))`,
and a line in `__init__.py` that imports it. `check` refuses what does not fit
before anything is read or compiled.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jax.sharding import Mesh

from psa_jax.config import Config, ConfigError
from psa_jax.data import sources
from psa_jax.tasks.base import Data, Metric, Task


def _no_problem(config: Config) -> Iterator[str]:
  del config
  return iter(())


@dataclasses.dataclass(frozen=True)
class TaskSpec:
  """What the framework must know of a task.

  Attributes:
    name: value of `config.task`.
    task: `(config, data, mesh)` to a `Task`, which has its loss, its metrics
      and its baselines.
    models: values of `config.model.kind` that it trains.
    reads: kind of data, one of those in `data.sources`.
    metrics: what is shown of its metrics beside the loss, the one that a run
      is judged by (`Task.quality`) among them.
    load: configuration to data; None takes what the source yields.
    keys: dotted keys, or sections, of the configuration that only tasks which
      name them have.
    check: one line for each setting that the task cannot work with.
  """

  name: str
  task: Callable[[Config, Any, Mesh], Task]
  models: tuple[str, ...]
  reads: str
  metrics: Mapping[str, Metric]
  load: Callable[[Config], Data] | None = None
  keys: tuple[str, ...] = ()
  check: Callable[[Config], Iterator[str]] = _no_problem


_TASKS: dict[str, TaskSpec] = {}


def register(spec: TaskSpec) -> TaskSpec:
  """Makes a task known by its name.

  Raises:
    ValueError: there is one of that name, or one that shows a metric of the
      same name in another way.
  """
  if spec.name in _TASKS:
    raise ValueError(f'there is a task {spec.name} already')
  for name, metric in spec.metrics.items():
    if metrics().get(name, metric) != metric:
      raise ValueError(f'the metric {name} is {metrics()[name]} already')
  _TASKS[spec.name] = spec
  return spec


def names() -> tuple[str, ...]:
  """Names of all tasks."""
  return tuple(sorted(_TASKS))


def metrics() -> dict[str, Metric]:
  """The metrics of all tasks, by name."""
  return {k: m for task in _TASKS.values() for k, m in task.metrics.items()}


def get(name: str) -> TaskSpec:
  """The task of that name.

  Raises:
    ConfigError: there is none.
  """
  if name not in _TASKS:
    raise ConfigError(
      f'config.task is {name!r}, not one of {", ".join(names())}'
    )
  return _TASKS[name]


def check(config: Config) -> None:
  """Refuses a task, a model and a source that do not go together.

  Raises:
    ConfigError: one line that names the keys and the way out.
  """
  problems = [*_problems(config)]
  if problems:
    raise ConfigError('; '.join(problems))


def load_data(config: Config) -> Data:
  """What the run's task is made of; its `manifest` identifies it.

  Raises:
    ConfigError: data that is missing or does not fit the run.
    RunError: the data cache cannot be written.
  """
  check(config)
  spec = get(config.task)
  return (
    spec.load(config) if spec.load else sources.load(config.data, spec.reads)
  )


def make_task(config: Config, data: Data, mesh: Mesh) -> Task:
  """The task on data from `load_data`; raises as `check` and its class do."""
  check(config)
  return get(config.task).task(config, data, mesh)


def _problems(config: Config) -> Iterator[str]:
  spec, source = get(config.task), sources.find(config.data.source)
  if source is None:
    yield f'config.{sources.unknown(config.data.source, spec.reads)}'
  elif spec.reads not in source.yields or config.model.kind not in spec.models:
    yield _mismatch(config, spec, source)
  else:
    yield from source.check(config.data)
    yield from spec.check(config)
    yield from _foreign_keys(config, spec)


def _mismatch(config: Config, spec: TaskSpec, source: sources.Source) -> str:
  """What of task, model and source does not fit, and what would."""
  kind, value = config.model.kind, config.data.source
  reads, trains = spec.reads in source.yields, kind in spec.models
  words, hints = [], []
  if not reads:
    words.append(
      f'reads {spec.reads}, but config.data.source={value} yields '
      f'{", ".join(source.yields)}'
    )
    hints.append(
      f'config.data.source to one of {", ".join(sources.names(spec.reads))}'
    )
  if not trains:
    models = ' or '.join(spec.models)
    words.append(f'trains config.model.kind={models}, not {kind}')
    hints.append(f'config.model.kind={models}')
  readers = [t for t in _TASKS.values() if t.reads in source.yields]
  fitting = [t.name for t in readers if kind in t.models]
  if fitting:
    hints = [f'config.task={" or ".join(sorted(fitting))}']
  elif not reads and readers:
    others = (f'{t.name} with model.kind={t.models[0]}' for t in readers)
    hints.append(f'or config.task={", ".join(sorted(others))}')
  return (
    f'config.task={spec.name} {" and ".join(words)}; set {", ".join(hints)}'
  )


def _foreign_keys(config: Config, spec: TaskSpec) -> Iterator[str]:
  """Keys of other tasks that are not at their defaults."""
  owners: dict[str, list[str]] = {}
  for task in _TASKS.values():
    for key in task.keys:
      owners.setdefault(key, []).append(task.name)
  for key, tasks in owners.items():
    if key not in spec.keys:
      for path, value in _changed(config, key):
        yield (
          f'config.{path} is {value!r}, but config.task={spec.name} does not '
          f'have it, only {", ".join(sorted(tasks))}; leave it out'
        )


def _changed(config: Config, key: str) -> Iterator[tuple[str, Any]]:
  """(dotted path, value) at and below `key` where it is not the default."""
  *sections, name = key.split('.')
  parent: Any = config
  for section in sections:
    parent = getattr(parent, section)
  value = getattr(parent, name)
  if dataclasses.is_dataclass(value):
    for field in dataclasses.fields(value):
      yield from _changed(config, f'{key}.{field.name}')
  elif value != getattr(type(parent), name):
    yield key, value
