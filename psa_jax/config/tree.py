"""Untyped values in, the typed configuration out, and back to JSON.

The edge of the configuration: a recipe's `ConfigDict` and the text of
`--config.a.b=v`. Both are laid on the tree of sections, so a key needs no
mention in the recipe to be overridden, and a value has the field's type or
`ConfigError` says what was expected where. `to_dict` and `diff` lead back to
JSON and compare two configurations.

`ml_collections.config_flags` is not used: it knows only the keys that a recipe
names, reads no JSON, and answers a mistake with a traceback.
"""

import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

from psa_jax.config import attention
from psa_jax.config.errors import ConfigError, cut, likeness, wrong_type
from psa_jax.config.fields import NAMES, Section, refuse
from psa_jax.config.run import Config
from psa_jax.config.values import convert

S = TypeVar('S', bound=Section)


class Leaf(NamedTuple):
  """One key of the configuration tree.

  Attributes:
    path: dotted, without a leading `config.`.
    type: annotation of the field.
    default: value where no recipe and no override names the key.
    options: the only values allowed, or () for any.
    interval: of a number, or of each of a tuple of them; see `fields.number`.
    runtime: whether it may change when a run is resumed.
  """

  path: str
  type: Any
  default: Any
  options: tuple[str, ...]
  interval: str | None
  runtime: bool


# Keys of before -> those of today that took their place, in the same section. A
# saved configuration is read by these names; a recipe or a flag with an old one
# is refused.
RENAMED = {
  'eval.reestimate': ('eval.recalibrate_bn',),
  'model.norm.eps': ('model.norm.base_eps', 'model.norm.bn_eps'),
}


class Changes(NamedTuple):
  """Dotted key -> (old, new), split by whether a resumed run may change it."""

  runtime: dict[str, tuple[Any, Any]]
  other: dict[str, tuple[Any, Any]]


def from_config_dict(
  values: Mapping[str, Any] | Any,
  overrides: Iterable[tuple[str, Any]] = (),
) -> Config:
  """The configuration that `values` changes the defaults to.

  Args:
    values: a nested mapping or `ConfigDict` of what differs from the defaults.
    overrides: (dotted path, value) laid on top; text is read by the field's
      type, the last of equal paths wins.

  Raises:
    ConfigError: an unknown key, a wrong type or an impossible value.
  """
  return _laid_on(Config(), dict(_typed(values)) | _flat(overrides))


def apply_overrides(
  config: Config, overrides: Iterable[tuple[str, Any]]
) -> Config:
  """`config` with single keys replaced; see `from_config_dict`."""
  return _laid_on(config, _flat(overrides))


def to_dict(config: Section) -> dict[str, Any]:
  """Nested dicts of JSON types, tuples as lists; loads back unchanged."""
  values = {}
  for name, _, value, _ in config.entries():
    if isinstance(value, Section):
      value = to_dict(value)
    values[name] = list(value) if isinstance(value, tuple) else value
  return values


def flatten(values: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
  """Nested dicts as one dict with dotted keys."""
  flat = {}
  for key, value in values.items():
    if isinstance(value, Mapping):
      flat |= flatten(value, f'{prefix}{key}.')
    else:
      flat[f'{prefix}{key}'] = value
  return flat


def diff(
  old: Config | Mapping[str, Any], new: Config | Mapping[str, Any]
) -> Changes:
  """Keys whose values differ, each side a `Config` or its `to_dict`.

  A key that `old` lacks, because it was saved before the key existed, counts
  as today's default; one that no longer exists is reported with new = None.
  """
  flat = [
    flatten(c if isinstance(c, Mapping) else to_dict(c)) for c in (old, new)
  ]
  defaults = flatten(to_dict(Config()))
  changes = Changes({}, {})
  for key in dict.fromkeys((*defaults, *flat[0], *flat[1])):
    before, after = (f.get(key, defaults.get(key)) for f in flat)
    if before != after:
      known = leaves().get(key)
      kind = changes.runtime if known and known.runtime else changes.other
      kind[key] = (before, after)
  return changes


def with_task(saved: Mapping[str, Any]) -> dict[str, Any]:
  """A saved configuration by today's keys, with the task that its run had.

  Runs of before there was a `task` had the one that followed from their model
  and their data.

  Args:
    saved: the content of a `config.json`, or a part of it.
  """
  saved = _renamed(saved)
  if 'task' in saved or not {'model', 'data'} <= saved.keys():
    return saved
  data = saved['data']
  source, kind = data.get('source', ''), saved['model'].get('kind')
  if kind == 'vit':
    task = 'image_classification'
  elif kind == 'encoder':
    tags = source == 'stdlib_tags' or data.get('words_key')
    task = 'tagging' if tags else 'classification'
  elif kind == 'encoder_decoder':
    task = 'translation'
  elif source.startswith('synthetic:'):
    task = 'recall'
  else:
    task = 'language_modeling'
  return {**saved, 'task': task}


def _renamed(saved: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
  """A saved configuration in which keys have their names of today."""
  values = {}
  for key, value in saved.items():
    path = prefix + key
    if isinstance(value, Mapping):
      values[key] = _renamed(value, f'{path}.')
    else:
      for name in RENAMED.get(path, (path,)):
        values[name.rpartition('.')[2]] = value
  return values


def leaves() -> dict[str, Leaf]:
  """Every key of the tree by its dotted path, in the order of definition."""
  return _leaves(tuple(attention.MECHANISMS))


def find_leaf(path: str) -> Leaf:
  """The key at `path`, or ConfigError naming the nearest one."""
  if path in leaves():
    return leaves()[path]
  if path in _sections():
    raise ConfigError(
      f'config.{path} is a section, not a value; its keys are: '
      f'{", ".join(_sections()[path])}'
    )
  raise _unknown_key(path)


# Cached by the names that are registered: another mechanism has other keys.
@functools.cache
def _leaves(mechanisms: tuple[str, ...]) -> dict[str, Leaf]:
  del mechanisms
  return {leaf.path: leaf for leaf in _walk(Config(), '')}


def _walk(
  node: Section, prefix: str, interval: str | None = None
) -> Iterator[Leaf]:
  """The leaves below a section.

  Args:
    node: the section.
    prefix: its path, dot included.
    interval: of a schedule's values, which its parent says.
  """
  for name, kind, value, metadata in node.entries():
    path = prefix + name
    if isinstance(value, Section):
      yield from _walk(value, path + '.', metadata.get('interval'))
      continue
    bounds = metadata.get('interval')
    if interval is not None and name in ('init', 'final', 'values'):
      bounds = interval
    options = metadata.get('options', tuple)
    is_runtime = metadata.get('runtime', False)
    yield Leaf(path, kind, value, tuple(options()), bounds, is_runtime)


def _sections() -> dict[str, list[str]]:
  """Keys of every section by its dotted path; '' is the top."""
  return _sections_of(tuple(attention.MECHANISMS))


@functools.cache
def _sections_of(mechanisms: tuple[str, ...]) -> dict[str, list[str]]:
  del mechanisms
  sections: dict[str, list[str]] = {}

  def visit(node: Section, path: str) -> None:
    entries = list(node.entries())
    sections[path] = [entry.name for entry in entries]
    for entry in entries:
      if isinstance(entry.value, Section):
        visit(entry.value, f'{path}.{entry.name}'.lstrip('.'))

  visit(Config(), '')
  return sections


def _unknown_key(path: str) -> ConfigError:
  if path in RENAMED:
    today = ' and '.join(f'config.{name}' for name in RENAMED[path])
    return ConfigError(f'config.{path} is now {today}')
  path = cut(path)  # megabytes of dots would be searched for ever
  name = path.rpartition('.')[2]

  def score(known: str) -> tuple[bool, float]:
    last = known.rpartition('.')[2]
    initials = ''.join(word[:1] for word in last.split('_'))
    return name in (last, initials), likeness(path, known)

  sections = _sections()
  best = max([*leaves(), *filter(None, sections)], key=score)
  parent = path.rpartition('.')[0]
  while parent not in sections:
    parent = parent.rpartition('.')[0]
  section = f'config.{parent}' if parent else 'config'
  return ConfigError(
    f'unknown key config.{path}; did you mean config.{best}? '
    f'{section} has: {", ".join(sections[parent])}'
  )


def _flat(overrides: Iterable[tuple[str, Any]]) -> dict[str, Any]:
  """Dotted path -> value of the field's type."""
  return {path: read_value(path, value) for path, value in overrides}


def _typed(values: Any, prefix: str = '') -> Iterator[tuple[str, Any]]:
  """(dotted path, value of the field's type) of every leaf in `values`."""
  for key, value in _items(values, prefix):
    path = f'{prefix}{key}'
    if not _is_mapping(value):
      yield path, read_value(path, value)
    elif path in _sections():
      yield from _typed(value, path + '.')
    else:
      leaf = find_leaf(path)
      plain = value.to_dict() if hasattr(value, 'to_dict') else value
      expected = NAMES.get(leaf.type, f'like {leaf.default!r}')
      raise ConfigError(wrong_type(f'config.{path}', expected, plain))


def _is_mapping(value: Any) -> bool:
  # A ConfigDict is no Mapping, but has what one needs.
  return isinstance(value, Mapping) or hasattr(value, 'to_dict')


def _items(values: Any, prefix: str) -> list[tuple[str, Any]]:
  try:
    return list(values.items())
  except Exception as e:  # ml_collections' RequiredValueError, from no base
    if type(e).__name__ != 'RequiredValueError':
      raise
    name = f'config.{prefix}'.rstrip('.')
    raise ConfigError(f'{name} has a required placeholder not set') from e


def read_value(path: str, value: Any) -> Any:
  """A value, or its text, with the type of the key at `path`.

  Raises:
    ConfigError: an unknown key, a wrong type or no option.
  """
  leaf = find_leaf(path)
  return convert(f'config.{path}', value, leaf.type, leaf.default, leaf.options)


def _laid_on(config: Config, flat: Mapping[str, Any]) -> Config:
  """`config` with the values of `flat`, checked as a whole.

  Raises:
    ConfigError: one line with a clause for each impossible value.
  """
  changed = _replace(config, flat)
  problems: dict[str, str] = {}
  for node, path in _nodes(changed, 'config.'):
    for problem in node.field_problems(path):
      # A schedule and its parent may both object to one value.
      problems.setdefault(problem.partition(' is ')[0], problem)
  # The rules between keys assume that each value makes sense by itself.
  if not problems:
    for node, path in _nodes(changed, 'config.'):
      for problem in node.rule_problems(path):
        problems.setdefault(problem, problem)
  refuse(problems.values())
  return changed


def _nodes(node: Section, path: str) -> Iterator[tuple[Section, str]]:
  """Every section of the tree with the path in front of its fields."""
  yield node, path
  for entry in node.entries():
    if isinstance(entry.value, Section):
      yield from _nodes(entry.value, f'{path}{entry.name}.')


def _replace(node: S, flat: Mapping[str, Any], prefix: str = '') -> S:
  values = {}
  for name, _, value, _ in node.entries():
    path = prefix + name
    if isinstance(value, Section):
      value = _replace(value, flat, path + '.')
    values[name] = flat.get(path, value)
  return node.unchecked(values)
