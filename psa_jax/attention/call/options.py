"""From the keywords of a call to the settings of a mechanism."""

import dataclasses
import difflib
import numbers
from collections.abc import Mapping
from typing import Any

import numpy as np

from psa_jax.attention.call import kinds
from psa_jax.attention.registry import MechanismSpec
from psa_jax.config import (
  AttentionConfig,
  ConfigError,
  ScheduleConfig,
  SoftmaxConfig,
)


def resolve(
  name: str,
  *,
  config: Any = None,
  softmax: str | SoftmaxConfig = 'exact',
  implementation: str | None = 'auto',
  options: Mapping[str, Any],
) -> AttentionConfig:
  """The configuration that a call asks for.

  Args:
    name: the mechanism.
    config: its settings, or a whole `AttentionConfig`; None means defaults.
    softmax: which softmax, for mechanisms that can take another one.
    implementation: how its kernels run; None and 'auto' are the platform's
      best.
    options: fields of the settings that are other than in `config`; a number
      in a schedule's place is a constant schedule.

  Raises:
    ConfigError: an unknown mechanism or option, a value of another type or out
      of range.
  """
  kind = kinds.find(name)
  implementation = implementation or 'auto'
  if isinstance(config, AttentionConfig):
    if config.name != kind.name:
      raise ConfigError(
        f'config is an AttentionConfig of {config.name!r}, but kind is '
        f'{kind.name!r}; pass kind={config.name!r}'
      )
    softmax = config.softmax if softmax == 'exact' else softmax
    if implementation == 'auto':
      implementation = config.implementation
    config = getattr(config, kind.section)
  settings = kind.config() if config is None else config
  if not isinstance(settings, kind.config):
    hint = ''
    if isinstance(config, numbers.Real):
      hint = f'; a setting has a name, as keep={config}'
    raise ConfigError(
      f'config is a {type(config).__name__}, but kind={kind.name!r} takes a '
      f'{kind.config.__name__}{hint}'
    )
  if isinstance(softmax, str):
    softmax = SoftmaxConfig(softmax)
  changes = {
    key: _coerce(kind, settings, key, value) for key, value in options.items()
  }
  settings = dataclasses.replace(settings, **changes)
  return kinds.configure(kind, settings, softmax, implementation)


def _coerce(kind: MechanismSpec, settings: Any, key: str, value: Any) -> Any:
  """`value` as the field `key` of the settings holds it."""
  fields = {field.name: field for field in dataclasses.fields(settings)}
  if key not in fields:
    close = difflib.get_close_matches(key, fields, 1, 0.5)
    hint = f'did you mean {close[0]}=? ' if close else ''
    has = f'it has {", ".join(fields)}' if fields else 'it has none'
    raise ConfigError(f'{key}= is no option of kind={kind.name!r}; {hint}{has}')
  if isinstance(value, np.generic):
    value = value.item()
  default = getattr(settings, key)
  if isinstance(default, ScheduleConfig):
    return _schedule(key, value)
  if isinstance(default, tuple) and isinstance(value, list | np.ndarray):
    return tuple(np.asarray(value).tolist())
  return value


def _schedule(key: str, value: Any) -> ScheduleConfig:
  if isinstance(value, ScheduleConfig):
    return value
  if isinstance(value, numbers.Real) and not isinstance(value, bool):
    return ScheduleConfig(init=float(value))
  raise ConfigError(
    f'{key} is a {type(value).__name__}, but it takes a number or a schedule '
    'of psa_jax.schedules, as linear(1.0, 0.25, length=1000)'
  )
