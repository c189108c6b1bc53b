"""Keys and values of a configuration, odd ones, and what must come of them.

Every set of overrides is either a configuration that survives a round trip
through JSON, or one `ConfigError` of a bounded line that names a key.
"""

import json
import math

import numpy as np
from hypothesis import strategies as st

import launch
from psa_jax import config as config_lib
from psa_jax import tasks
from psa_jax.config import Config, ConfigError, from_config_dict
from psa_jax.config.errors import line

LONGEST = 4000  # characters of a message
LONG = 10_000

_PATHS = sorted(config_lib.leaves())
_WORDS = sorted(
  {option for leaf in config_lib.leaves().values() for option in leaf.options}
)


def _broken(path: str) -> st.SearchStrategy[str]:
  """Names that are near a key."""
  return st.sampled_from(
    [path[:-1], path + 'x', path.upper(), path.rpartition('.')[0], f'.{path}.']
    + [path.replace('_', '-'), path[::-1], f'{path}.{path}', path * 300, '']
  )


def paths() -> st.SearchStrategy[str]:
  """Mostly keys, some of them misspelt."""
  known = st.sampled_from(_PATHS)
  return st.one_of(known, known, known, known.flatmap(_broken), st.text())


_NUMBERS = st.one_of(
  st.integers(-3, 300),
  st.integers(),
  st.floats(),
  st.sampled_from([2**31 - 1, 2**31, 2**63, 10**30, 1e38, 1e39, 1e60, 1e-60]),
)
_TEXTS = st.one_of(
  _NUMBERS.map(str),
  st.lists(_NUMBERS, max_size=5).map(lambda v: ','.join(map(str, v))),
  st.lists(_NUMBERS, max_size=3).map(str),
  st.sampled_from(_WORDS),
  st.sampled_from(['', ' ', 'None', 'none', 'true', 'False', '1e3', '0x10'])
  | st.sampled_from(['nan', '-inf', '1e400', '1_0', '(', '[1', ',', '1,,2'])
  | st.sampled_from(['~nosuchuser/x', 'a\0b', '\udcff', '１', '{"a": 1}'])
  | st.sampled_from(['x' * LONG, '9' * LONG, '1,' * LONG, ' ' * LONG]),
  st.text(max_size=20),
)
_VALUES = st.one_of(
  _TEXTS,
  _NUMBERS,
  st.none(),
  st.booleans(),
  st.binary(max_size=5),
  st.recursive(
    _NUMBERS | st.text(max_size=5) | st.none(),
    lambda inner: (
      st.lists(inner, max_size=3)
      | st.tuples(inner)
      | st.dictionaries(st.text(max_size=5), inner, max_size=2)
    ),
    max_leaves=5,
  ),
  st.sampled_from([10**5000, [10**5000], float, object(), 1j, {1: 2}, {}])
  | st.sampled_from([np.float32(2), np.int64(3), np.ones(3), np.bool_(True)]),
)


def cases() -> st.SearchStrategy[list]:
  """Overrides: (dotted path, value), half of them from a command line."""
  text = st.lists(st.tuples(paths(), _TEXTS), min_size=1, max_size=4)
  value = st.lists(st.tuples(paths(), _VALUES), min_size=1, max_size=4)
  return text | value


def fault(overrides: list) -> str | None:
  """What is wrong with what becomes of the overrides; None if all is well."""
  try:
    if all(isinstance(value, str) for _, value in overrides):
      words = [f'--config.{path}={value}' for path, value in overrides]
      _, overrides = launch.split_overrides(words)
    config = from_config_dict({}, overrides)
    refused = _refusal(config)
  except ConfigError as e:
    refused = str(e)
  except Exception as e:
    return f'traceback: {type(e).__name__}: {line(e)}'
  if refused is None:
    return _differs(config)
  if len(refused) > LONGEST:
    return f'wrong: a message of {len(refused)} characters: {refused[:300]}'
  if '.' not in refused and '--config' not in refused:
    return f'wrong: no key is named: {refused}'
  return None


def _refusal(config: Config) -> str | None:
  """What the tasks say against it."""
  try:
    tasks.check(config)
  except ConfigError as e:
    return str(e)
  return None


def _differs(config: Config) -> str | None:
  """Whether it is another one, or none, after a way through JSON."""
  values = config_lib.to_dict(config)
  text = json.dumps(values, allow_nan=False)
  if from_config_dict(json.loads(text)) != config:
    return f'wrong: another configuration after JSON: {text[:300]}'
  for path, value in config_lib.flatten(values).items():
    for number in value if isinstance(value, list) else [value]:
      if isinstance(number, int | float) and not math.isfinite(number):
        return f'wrong: {path} is {number}'
  return None
