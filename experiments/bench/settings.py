"""What `--set KEY=VALUE` changes: the fields of an experiment's settings."""

import dataclasses
import typing
from collections.abc import Iterable, Sequence
from typing import Any

from psa_jax import config as config_lib
from psa_jax.config import ConfigError

Changes = tuple[tuple[str, str], ...]


def option(
  default: Any, text: str, *, choices: Sequence[str] = (), least: int = 0
) -> Any:
  """A field of settings.

  Args:
    default: also says the type.
    text: for `--help`.
    choices: the only words allowed; () for any.
    least: smallest number allowed.
  """
  about = {'help': text, 'choices': tuple(choices), 'least': least}
  return dataclasses.field(default=default, metadata=about)


@dataclasses.dataclass(frozen=True)
class Settings:
  """Of every experiment; each adds its own."""

  results: str = option('', "File of rows; empty: the experiment's own.")
  commit: str = option('', 'Written as the commit where git cannot tell.')
  resume: bool = option(False, 'Skip what this commit has measured already.')


@dataclasses.dataclass(frozen=True)
class GridSettings(Settings):
  """Of an experiment that trains a grid; it goes on where it stopped.

  Attributes:
    changes: keys of the recipes that `--set` changes in every run.
  """

  tasks: tuple[str, ...] = option((), 'Tasks of the grid; empty: all.')
  arms: tuple[str, ...] = option((), 'Arms; empty: all.')
  seeds: int = option(3, 'Runs of each arm.', least=1)
  workers: int = option(2, 'Runs at a time.', least=1)
  changes: Changes = ()


def known(settings: Settings) -> dict[str, dataclasses.Field]:
  """The fields that `--set` names."""
  fields = dataclasses.fields(settings)
  return {field.name: field for field in fields if field.metadata}


def apply(settings: Settings, words: Iterable[str]) -> Settings:
  """The settings with KEY=VALUE laid on, the last of equal keys winning.

  Raises:
    ConfigError: an unknown key or an impossible value.
  """
  fields, changes = known(settings), getattr(settings, 'changes', None)
  for word in words:
    key, equals, value = word.partition('=')
    if not equals:
      raise ConfigError(f'--set {word}: it takes KEY=VALUE')
    if key in fields:
      read = _read(settings, fields[key], value)
      settings = dataclasses.replace(settings, **{key: read})
    elif changes is not None and ('.' in key or key in config_lib.leaves()):
      config_lib.find_leaf(key)
      changes = (*changes, (key, value))
      settings = dataclasses.replace(settings, changes=changes)
    else:
      more = '' if changes is None else ', and every key of its recipes'
      raise ConfigError(
        f'--set {word}: there is no {key}; there are {", ".join(fields)}{more}'
      )
  return settings


def words(settings: Settings) -> list[str]:
  """`--set` flags that make these settings of the defaults."""
  flags = []
  usual = type(settings)()
  for name in known(settings):
    value = getattr(settings, name)
    if value != getattr(usual, name):
      flags.append(f'--set={name}={text(value)}')
  changes = getattr(settings, 'changes', ())
  return flags + [f'--set={key}={value}' for key, value in changes]


def text(value: Any) -> str:
  """A value as `--set` takes it."""
  if isinstance(value, bool):
    return str(value).lower()
  return ','.join(map(str, value)) if isinstance(value, tuple) else str(value)


def _read(settings: Settings, field: dataclasses.Field, value: str) -> Any:
  """`value` as the field's type."""
  kind = typing.get_type_hints(type(settings))[field.name]
  if typing.get_origin(kind) is tuple:
    one = typing.get_args(kind)[0]
    parts = [part for part in value.split(',') if part]
    return tuple(_one(field, one, part) for part in parts)
  return _one(field, kind, value)


def _one(field: dataclasses.Field, kind: type, value: str) -> Any:
  choices = field.metadata['choices']
  if choices and value not in choices:
    raise ConfigError(
      f'--set {field.name}={value}: choose of {", ".join(choices)}'
    )
  if kind is bool:
    if value not in ('true', 'false'):
      raise ConfigError(f'--set {field.name}={value}: it takes true or false')
    return value == 'true'
  try:
    read = kind(value)
  except ValueError:
    raise ConfigError(
      f'--set {field.name}={value}: it takes {kind.__name__}'
    ) from None
  least = field.metadata['least']
  if kind in (int, float) and read < least:
    raise ConfigError(f'--set {field.name}={value}: at least {least}')
  return read
