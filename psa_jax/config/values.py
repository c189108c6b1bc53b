"""Text, numbers and lists in, values of a field's type out."""

import math
import numbers
import typing
from collections.abc import Callable
from typing import Any

from psa_jax.config.errors import ConfigError, unknown, wrong_type
from psa_jax.config.fields import NAMES


def convert(
  path: str, value: Any, kind: Any, default: Any, options: tuple[str, ...]
) -> Any:
  """`value` with the type `kind` of a field.

  Args:
    path: the key, for messages.
    value: as a recipe gives it, or text.
    kind: the field's annotation.
    default: the field's default, for messages.
    options: the only values allowed, or ().

  Raises:
    ConfigError: it cannot be read as that type, or is no option.
  """
  # Text too: `None` on the command line is never meant as the word.
  if value is None or (isinstance(value, str) and value == 'None'):
    raise ConfigError(
      f'{path}: None is not a value; leave the key out for its default '
      f'{default!r}'
    )
  if typing.get_origin(kind) is tuple:
    item = typing.get_args(kind)[0]
    return tuple(
      _scalar(f'{path}[{i}]', v, item, default)
      for i, v in enumerate(_items(value))
    )
  value = _scalar(path, value, kind, default)
  if options and value not in options:
    raise ConfigError(unknown(path, value, options))
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


def _scalar(path: str, value: Any, kind: type, default: Any) -> Any:
  try:
    return _READERS[kind](value)
  except (TypeError, ValueError, OverflowError):
    name = NAMES.get(kind, f'like {default!r}')
    raise ConfigError(wrong_type(path, name, value)) from None


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
