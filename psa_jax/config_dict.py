"""Untyped values in, the typed configuration out, and back to JSON.

The edge of the configuration: a recipe's `ConfigDict` and the text of
`--config.a.b=v`. Both are laid on the dataclass tree of `config.py`, so a key
needs no mention in the recipe to be overridden, and a value has the field's
type or `ConfigError` says what was expected where. `to_dict` and `diff` lead
back to JSON and compare two configurations.
"""

import dataclasses
import difflib
import functools
import math
import numbers
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict
from ml_collections.config_dict import RequiredValueError

from psa_jax.config import Config, ConfigError
from psa_jax.validate import validate


class Leaf(NamedTuple):
  """One key of the configuration tree.

  Attributes:
    path: dotted, without a leading `config.`.
    type: annotation of the field.
    default: value where no recipe and no override names the key.
    options: the only values allowed, or () for any.
    runtime: whether it may change when a run is resumed.
  """

  path: str
  type: Any
  default: Any
  options: tuple[str, ...]
  runtime: bool


class Changes(NamedTuple):
  """Dotted key -> (old, new), split by whether a resumed run may change it."""

  runtime: dict[str, tuple[Any, Any]]
  other: dict[str, tuple[Any, Any]]


def from_config_dict(
  values: ConfigDict | Mapping[str, Any],
  overrides: Iterable[tuple[str, Any]] = (),
) -> Config:
  """The validated configuration that `values` changes the defaults to.

  Args:
    values: nested; only what differs from the defaults.
    overrides: laid on top, see `apply_overrides`.

  Raises:
    ConfigError: an unknown key, a wrong type or an impossible value.
  """
  config = _replace(Config(), dict(_typed(values)))
  return validate(apply_overrides(config, overrides))


def apply_overrides(
  config: Config, overrides: Iterable[tuple[str, Any]]
) -> Config:
  """`config` with single keys replaced; not validated as a whole.

  Args:
    config: any configuration.
    overrides: (dotted path, value); text is read by the field's type, the
      last of equal paths wins.

  Raises:
    ConfigError: an unknown key or a wrong type.
  """
  flat = {}
  for path, value in overrides:
    flat[path] = _convert(find_leaf(path), value)
  return _replace(config, flat)


def to_dict(config: Any) -> dict[str, Any]:
  """Nested dicts of JSON types, tuples as lists; loads back unchanged."""
  values = {}
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if dataclasses.is_dataclass(value):
      value = to_dict(value)
    values[field.name] = list(value) if isinstance(value, tuple) else value
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
  """A saved configuration, with the task that its run had.

  Runs of before there was a `task` had the one that followed from their model
  and their data.

  Args:
    saved: the content of a `config.json`, or a part of it.
  """
  if 'task' in saved or not {'model', 'data'} <= saved.keys():
    return dict(saved)
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


@functools.cache
def leaves() -> dict[str, Leaf]:
  """Every key of the tree by its dotted path, in the order of definition."""
  return {leaf.path: leaf for leaf in _walk(Config(), '')}


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


def nearest(word: str, options: Iterable[str]) -> str:
  """The option most like `word`; there must be one."""
  return max(options, key=lambda option: _likeness(word, option))


def _walk(node: Any, prefix: str) -> Iterator[Leaf]:
  hints = typing.get_type_hints(type(node))
  for field in dataclasses.fields(node):
    value, path = getattr(node, field.name), prefix + field.name
    if dataclasses.is_dataclass(value):
      yield from _walk(value, path + '.')
    else:
      options = field.metadata.get('options', ())
      is_runtime = field.metadata.get('runtime', False)
      yield Leaf(path, hints[field.name], value, options, is_runtime)


@functools.cache
def _sections() -> dict[str, list[str]]:
  """Keys of every section by its dotted path; '' is the top."""
  sections: dict[str, list[str]] = {}

  def visit(node: Any, path: str) -> None:
    names = [field.name for field in dataclasses.fields(node)]
    sections[path] = names
    for name in names:
      if dataclasses.is_dataclass(getattr(node, name)):
        visit(getattr(node, name), f'{path}.{name}'.lstrip('.'))

  visit(Config(), '')
  return sections


def _likeness(word: str, option: str) -> float:
  word, option = word.lower(), option.lower()
  return difflib.SequenceMatcher(None, word, option).ratio()


def _unknown_key(path: str) -> ConfigError:
  name = path.rpartition('.')[2]

  def score(known: str) -> tuple[bool, float]:
    last = known.rpartition('.')[2]
    initials = ''.join(word[:1] for word in last.split('_'))
    return name in (last, initials), _likeness(path, known)

  best = max([*leaves(), *filter(None, _sections())], key=score)
  parent = path.rpartition('.')[0]
  while parent not in _sections():
    parent = parent.rpartition('.')[0]
  section = f'config.{parent}' if parent else 'config'
  return ConfigError(
    f'unknown key config.{path}; did you mean config.{best}? '
    f'{section} has: {", ".join(_sections()[parent])}'
  )


def _typed(
  values: ConfigDict | Mapping[str, Any], prefix: str = ''
) -> Iterator[tuple[str, Any]]:
  """(dotted path, value of the field's type) of every leaf in `values`."""
  try:
    items = list(values.items())
  except RequiredValueError:
    name = f'config.{prefix}'.rstrip('.')
    raise ConfigError(f'{name} has a required placeholder not set') from None
  for key, value in items:
    path = f'{prefix}{key}'
    if not isinstance(value, ConfigDict | Mapping):
      yield path, _convert(find_leaf(path), value)
    elif path in _sections():
      yield from _typed(value, path + '.')
    else:
      raise _wrong(find_leaf(path), path, value)


def _replace(node: Any, flat: Mapping[str, Any], prefix: str = '') -> Any:
  changes = {}
  for field in dataclasses.fields(node):
    value, path = getattr(node, field.name), prefix + field.name
    if dataclasses.is_dataclass(value):
      changes[field.name] = _replace(value, flat, path + '.')
    elif path in flat:
      changes[field.name] = flat[path]
  return dataclasses.replace(node, **changes)


def _convert(leaf: Leaf, value: Any) -> Any:
  if value is None:
    raise ConfigError(
      f'config.{leaf.path}: None is not a value; leave the key out for its '
      f'default {leaf.default!r}'
    )
  if typing.get_origin(leaf.type) is tuple:
    item = typing.get_args(leaf.type)[0]
    return tuple(
      _scalar(item, v, leaf, f'{leaf.path}[{i}]')
      for i, v in enumerate(_items(value))
    )
  value = _scalar(leaf.type, value, leaf, leaf.path)
  if leaf.options and value not in leaf.options:
    raise ConfigError(
      f'config.{leaf.path}: unknown {value!r}; did you mean '
      f'{nearest(value, leaf.options)!r}? options: {", ".join(leaf.options)}'
    )
  return value


def _items(value: Any) -> list[Any]:
  """The entries of a list, a tuple, text like `1,2` or `(1, 2)`, or [value]."""
  if isinstance(value, list | tuple):
    return list(value)
  if not isinstance(value, str):
    return [value]
  text = value.strip()
  if (text[:1], text[-1:]) in (('(', ')'), ('[', ']')):
    text = text[1:-1]
  items = text.split(',')
  return items if items[-1].strip() else items[:-1]


def _scalar(kind: type, value: Any, leaf: Leaf, path: str) -> Any:
  try:
    return _READERS[kind](value)
  except (TypeError, ValueError, OverflowError):
    raise _wrong(leaf, path, value, kind) from None


def _wrong(
  leaf: Leaf, path: str, value: Any, kind: type | None = None
) -> ConfigError:
  if isinstance(value, ConfigDict):
    value = value.to_dict()
  name = _NAMES.get(kind or leaf.type, f'like {leaf.default!r}')
  return ConfigError(f'config.{path}: expected {name}, got {value!r}')


def _read_int(value: Any) -> int:
  if isinstance(value, str):
    try:
      return int(value)
    except ValueError:
      value = float(value)
  number = _read_float(value)
  if number != math.floor(number):
    raise ValueError('not a whole number')
  return int(value)


def _read_float(value: Any) -> float:
  if isinstance(value, bool) or not isinstance(value, str | numbers.Real):
    raise TypeError('not a number')
  return float(value)


def _read_bool(value: Any) -> bool:
  words = {'true': True, '1': True, 'false': False, '0': False}
  if isinstance(value, bool | int | str) and str(value).lower() in words:
    return words[str(value).lower()]
  raise ValueError('not a bool')


def _read_str(value: Any) -> str:
  if not isinstance(value, str):
    raise TypeError('not text')
  return value


_READERS: dict[type, Callable[[Any], Any]] = {
  int: _read_int,
  float: _read_float,
  bool: _read_bool,
  str: _read_str,
}
_NAMES = {
  int: 'an int',
  float: 'a float',
  bool: 'a bool (true or false)',
  str: 'text',
}
