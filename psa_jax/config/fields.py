"""What a section of the configuration is: fields, their ranges, its checks.

A section is a frozen dataclass derived from `Section`. What a single value may
be stands in its field (`number`, `choice`, `schedule`); what depends on several
values is in `check`. Both are asked when a section is made, so the library
refuses what the command line refuses, in the same words: the path in front is
`PsaConfig.window` there and `config.model.attention.psa.window` here.
"""

import dataclasses
import functools
import math
import numbers
import re
import struct
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from psa_jax.config.errors import ConfigError, shown, unknown, wrong_type

# Intervals as in mathematics; `inf` itself and NaN are never allowed. For a
# tuple the interval is that of each entry, for a schedule that of its values.
COUNT = '[1, inf)'
OPTIONAL = '[0, inf)'
POSITIVE = '(0, inf)'
REAL = '(-inf, inf)'
SHARE = '(0, 1]'
UNIT = '[0, 1]'
PROBABILITY = '[0, 1)'
# What becomes int32 on the device and has room to be added to.
COUNTED = '[1, 1073741824]'

# Steps and sizes are int32 on the device, everything else is f32.
_INT_LIMIT = 2**31
_FLOAT_LIMIT = 3.4028235e38
_FLOAT_LEAST = 1.1754944e-38  # below it a device has 0

NAMES = {
  int: 'an int',
  float: 'a float',
  bool: 'a bool (true or false)',
  str: 'text',
}


def number(default: Any, interval: str, *, runtime: bool = False) -> Any:
  """A number, or a tuple of them, within `interval`.

  Args:
    default: its value where nothing else is said.
    interval: as `[1, inf)`, or `0 or [2, 16]` with one value more.
    runtime: whether it may change when a run is resumed.
  """
  return field(
    default=default, metadata={'interval': interval, 'runtime': runtime}
  )


def choice(
  default: str,
  *options: str,
  ask: Callable[[], Iterable[str]] | None = None,
  runtime: bool = False,
) -> Any:
  """Text that is one of `options`, or of what `ask` returns when asked."""
  options_of = ask or (lambda: options)
  return field(
    default=default, metadata={'options': options_of, 'runtime': runtime}
  )


def runtime(default: Any) -> Any:
  """A value that may change when a run is resumed."""
  return field(default=default, metadata={'runtime': True})


def schedule(default: Any, interval: str) -> Any:
  """A `ScheduleConfig` whose values lie within `interval`."""
  return field(default=default, metadata={'interval': interval})


def section(make: Callable[[], Any]) -> Any:
  """A section that is made when its parent is.

  One that asks the registry of mechanisms cannot be made while classes are
  defined: nothing is registered yet.
  """
  return field(default_factory=make)


class Entry(NamedTuple):
  """One field of a section.

  Attributes:
    name: of the field.
    type: its annotation.
    value: what the section holds.
    metadata: what `number`, `choice` and the others say of it.
  """

  name: str
  type: Any
  value: Any
  metadata: Mapping[str, Any]


@dataclass(frozen=True)
class Section:
  """A frozen dataclass that refuses impossible values when it is made."""

  def __post_init__(self):
    """Raises ConfigError, one line with a clause for each problem."""
    path = f'{type(self).__name__}.'
    refuse([*self.field_problems(path)] or [*self.rule_problems(path)])

  def check(self, path: str) -> Iterator[str]:
    """A message for each combination of values that cannot be.

    Args:
      path: what stands in front of a field's name, dot included.
    """
    del path
    return iter(())

  def rule_problems(self, path: str) -> Iterator[str]:
    """`check`, and what a schedule may say where it stands.

    Called where every single value is possible.
    """
    defaults = {f.name: f.default for f in dataclasses.fields(self)}
    for entry in self.entries():
      if isinstance(entry.value, ScheduleConfig):
        yield from entry.value.unread(
          f'{path}{entry.name}.', default=defaults.get(entry.name)
        )
    yield from self.check(path)

  def entries(self) -> Iterator[Entry]:
    """Every field with its value, in the order of definition."""
    hints = _hints(type(self))
    for each in dataclasses.fields(self):
      value = getattr(self, each.name)
      yield Entry(each.name, hints[each.name], value, each.metadata)

  @classmethod
  def unchecked(cls, values: Mapping[str, Any]) -> Any:
    """A section of these values, one for each field, that nothing has checked.

    The tree is built from such sections, so that one message can name all that
    is wrong with it by its path.
    """
    made = object.__new__(cls)
    for name, value in values.items():
      object.__setattr__(made, name, value)
    return made

  def field_problems(self, path: str) -> Iterator[str]:
    """A message for each value that cannot be, whatever the others are."""
    for entry in self.entries():
      where = f'{path}{entry.name}'
      problem = _type_problem(where, entry)
      if problem:
        yield problem
      elif 'options' in entry.metadata:
        options = tuple(entry.metadata['options']())
        if entry.value not in options:
          yield unknown(where, entry.value, options)
      elif isinstance(entry.value, ScheduleConfig):
        for name in ('init', 'final', 'values'):
          yield from interval_problems(
            f'{where}.{name}',
            getattr(entry.value, name),
            entry.metadata.get('interval'),
          )
      else:
        yield from interval_problems(
          where, entry.value, entry.metadata.get('interval')
        )


def refuse(problems: Iterable[str]) -> None:
  """Raises one ConfigError of all problems, if there are any."""
  problems = tuple(problems)
  if problems:
    raise ConfigError('; '.join(problems))


def interval_problems(
  path: str, value: Any, interval: str | None
) -> Iterator[str]:
  """What is wrong with a number, or with any of a tuple of them."""
  values = value if isinstance(value, tuple) else (value,)
  if not all(_is_number(v) for v in values):
    return
  each = 'each entry must be' if isinstance(value, tuple) else 'it must be'
  if interval is not None and not all(_inside(v, interval) for v in values):
    finite = '' if all(map(math.isfinite, values)) else 'finite and '
    yield f'{path} is {shown(value)}, but {each} {finite}{_words(interval)}'
  elif any(isinstance(v, int) and abs(v) >= _INT_LIMIT for v in values):
    yield f'{path} is {shown(value)}, but {each} below 2^31'
  elif any(abs(v) > _FLOAT_LIMIT for v in values):
    yield f'{path} is {shown(value)}, but {each} within the range of float32'
  elif interval is not None:
    near = [v for v in values if not _inside(_on_device(v), interval)]
    if near:
      yield (
        f'{path} is {shown(value)}, but float32 has {_on_device(near[0]):g} '
        f'for {near[0]!r}, and {each} {_words(interval)}'
      )


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
  return typing.get_type_hints(cls)


def _is_number(value: Any) -> bool:
  return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _type_problem(path: str, entry: Entry) -> str | None:
  """A message if a value has another type than its field."""
  kind, value = entry.type, entry.value
  if typing.get_origin(kind) is tuple:
    item = typing.get_args(kind)[0]
    if not isinstance(value, tuple):
      return wrong_type(path, 'a tuple', value)
    return next(
      (
        wrong_type(f'{path}[{i}]', NAMES[item], v)
        for i, v in enumerate(value)
        if not _has_type(item, v)
      ),
      None,
    )
  if kind in NAMES:
    if not _has_type(kind, value):
      return wrong_type(path, NAMES[kind], value)
  elif isinstance(kind, type) and not isinstance(value, kind):
    hint = ''
    if kind is ScheduleConfig and _is_number(value):
      hint = f'; for a constant give ScheduleConfig(init={value!r})'
    return wrong_type(path, f'a {kind.__name__}', value, hint)
  return None


def _has_type(kind: type, value: Any) -> bool:
  if kind is bool:
    return isinstance(value, bool)
  if kind is int:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)
  return _is_number(value) if kind is float else isinstance(value, kind)


def _inside(value: int | float, interval: str) -> bool:
  alternative, _, interval = interval.rpartition(' or ')
  if alternative and value == float(alternative):
    return True
  low, high = map(float, interval[1:-1].split(','))
  above = low <= value if interval[0] == '[' else low < value
  below = value <= high if interval[-1] == ']' else value < high
  return above and below


def _on_device(value: int | float) -> int | float:
  """The value as a device holds it: int32, or the nearest float32."""
  if isinstance(value, numbers.Integral):
    return value
  nearest = struct.unpack('f', struct.pack('f', value))[0]
  return nearest if abs(nearest) >= _FLOAT_LEAST else 0.0


def _words(interval: str) -> str:
  """`at least 1` for `[1, inf)` and so on."""
  text = interval.replace(REAL, 'a number')
  text = re.sub(r'\[(\S+), inf\)', r'at least \1', text)
  text = re.sub(r'\((\S+), inf\)', r'above \1', text)
  return text if text != interval else f'in {interval}'


@dataclass(frozen=True)
class ScheduleConfig(Section):
  """A value as a function of the optimiser step (see `schedules.py`).

  Attributes:
    kind: shape of the curve between `init` and `final`.
    init: value up to and including step `begin`.
    final: value from step `begin + length` on.
    begin: last step with the value `init`.
    length: steps that the change takes; 0 with a non-constant kind is a jump.
    boundaries, values: for `piecewise`: `values[i]` holds from step
      `boundaries[i - 1]` (inclusive) to `boundaries[i]` (exclusive).
  """

  kind: str = choice(
    'constant',
    'constant',
    'linear',
    'cosine',
    'exponential',
    'cubic',
    'piecewise',
  )
  init: float = number(1.0, REAL)
  final: float = number(1.0, REAL)
  begin: int = number(0, OPTIONAL)
  length: int = number(0, OPTIONAL)
  boundaries: tuple[int, ...] = number((), COUNT)
  values: tuple[float, ...] = number((), REAL)

  def check(self, path: str) -> Iterator[str]:
    """What no schedule can be, whatever it is a schedule of."""
    boundaries, values = self.boundaries, self.values
    if self.begin + self.length >= _INT_LIMIT:
      yield (
        f'{path}begin and {path}length end at step '
        f'{self.begin + self.length}, but steps are below 2^31'
      )
    if self.kind != 'piecewise':
      if boundaries or values:
        yield (
          f'{path}boundaries and values are read by kind=piecewise only, but '
          f'the kind is {self.kind}; set {path}kind=piecewise or leave them out'
        )
      if self.kind == 'exponential' and min(self.init, self.final) <= 0:
        yield (
          f'{path}kind is exponential, which cannot begin or end at 0 or '
          f'below, but init is {self.init:g} and final {self.final:g}; set '
          f'{path}kind=linear'
        )
      return
    if len(values) != len(boundaries) + 1:
      yield (
        f'{path}values has {len(values)} entries, but piecewise needs one more '
        f'than the {len(boundaries)} of {path}boundaries'
      )
    if any(a >= b for a, b in zip(boundaries, boundaries[1:], strict=False)):
      yield f'{path}boundaries is {boundaries}, but it must rise strictly'

  def unread(self, path: str, *, default: Any) -> Iterator[str]:
    """A message if a constant says how it moves.

    Args:
      path: of the schedule, dot included.
      default: the schedule that stands there if nothing is said; its `final`
        stays behind where only the kind and `init` are changed.
    """
    rests = [self.init, 1.0]  # what `final` is where nobody named it
    if isinstance(default, ScheduleConfig):
      rests.append(default.final)
    moves = self.begin or self.length or self.final not in rests
    if self.kind == 'constant' and moves:
      yield (
        f'{path}final, begin and length are not read by kind=constant, the '
        f'default; set {path}kind, for instance to linear'
      )
