"""Which mechanism reads the keys, and the settings of all of them.

The mechanisms themselves are above this package, each with its settings in its
own module; `attention.registry.register` puts them into `MECHANISMS` here, and
the configuration asks that table: which names there are, which section belongs
to which, and what goes together.
"""

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from psa_jax.config.errors import ConfigError, nearest, unknown, wrong_type
from psa_jax.config.fields import (
  OPTIONAL,
  REAL,
  UNIT,
  Entry,
  ScheduleConfig,
  Section,
  choice,
  number,
  runtime,
  schedule,
)

IMPLEMENTATIONS = (
  'auto',
  'reference',
  'xla',
  'xla_keys',
  'pallas_tpu',
  'pallas_gpu',
  'cudnn',
)


@dataclass(frozen=True)
class MechanismConfig(Section):
  """What the settings of every mechanism derive from.

  A mechanism overrides what it has something to say about.
  """

  @property
  def frozen_steps(self) -> int:
    """Steps in which only the mechanism's own parameters train."""
    return 0

  def check_model(self, path: str, model: Any) -> Iterator[str]:
    """A message for each setting that this `ModelConfig` cannot have.

    Args:
      path: what stands in front of a setting's name, dot included.
      model: the model whose attention this is.
    """
    del path, model
    return iter(())

  def check_run(self, path: str, run: Any) -> Iterator[str]:
    """A message for each setting that a run of this `Config` cannot have.

    Args:
      path: what stands in front of a setting's name, dot included.
      run: the whole configuration, whose attention this is.
    """
    del path, run
    return iter(())

  def check_budget(self, path: str) -> Iterator[str]:
    """What stands in the way of a controller that sets the budget."""
    del path
    return iter(())

  def idle_schedule(self, path: str, *, length: int, step: int) -> str | None:
    """Why the schedule of the budget has no say at this length and step.

    Args:
      path: what stands in front of a setting's name, dot included.
      length: tokens of a row.
      step: optimiser step.

    Returns:
      One line with what it asks for, what is read anyway, and the length from
      which it acts; None where it acts.
    """
    del path, length, step
    return None


@runtime_checkable
class Mechanism(Protocol):
  """What the configuration asks of a mechanism; see `MechanismSpec`."""

  @property
  def name(self) -> str: ...
  @property
  def section(self) -> str: ...
  @property
  def config(self) -> type[MechanismConfig]: ...
  @property
  def causal_only(self) -> bool: ...
  @property
  def takes_budget(self) -> bool: ...
  @property
  def reads_cross(self) -> bool: ...
  @property
  def approximates_softmax(self) -> bool: ...


_SOFTMAX = (0.0, 1.0, 0.0, 0.0)  # the cubic that changes nothing

# By name, in the order of registration.
MECHANISMS: dict[str, Mechanism] = {}


def sections() -> dict[str, type[MechanismConfig]]:
  """Section of `model.attention` -> the class of its settings."""
  return {spec.section: spec.config for spec in MECHANISMS.values()}


@functools.cache
def _default(kind: type[MechanismConfig]) -> MechanismConfig:
  """Settings that nobody set."""
  return kind()


def names(**facts: bool) -> tuple[str, ...]:
  """The mechanisms of which all `facts` hold, as `takes_budget=True`."""
  return tuple(
    name
    for name, spec in MECHANISMS.items()
    if all(getattr(spec, fact) == value for fact, value in facts.items())
  )


@dataclass(frozen=True)
class SoftmaxConfig(Section):
  """Which softmax block lists are read with (docs/mechanisms.md#softmax).

  Attributes:
    kind: `polynomial` takes the softmax of a cubic of the scores, `sas`
      replaces e^x by a table and a cubic and drops what is below e^-6.
    coefficients: a0 to a3 of the polynomial; (0, 1, 0, 0) changes nothing.
    clamp: scores are cut to [-clamp, clamp] before the polynomial; 0 is off.
    mix: schedule of the share of these coefficients, in [0, 1]; the rest is
      the plain softmax.
  """

  kind: str = choice('exact', 'exact', 'polynomial', 'sas')
  coefficients: tuple[float, ...] = number(_SOFTMAX, REAL)
  clamp: float = number(0.0, OPTIONAL)
  mix: ScheduleConfig = schedule(ScheduleConfig(), UNIT)

  def check(self, path: str) -> Iterator[str]:
    """A cubic has four coefficients; only a polynomial has any."""
    yield from check_cubic(path, self.coefficients)
    plain = (_SOFTMAX, 0.0, ScheduleConfig())
    cubic = (self.coefficients, self.clamp, self.mix)
    if self.kind != 'polynomial' and cubic != plain:
      yield (
        f'{path}coefficients, clamp and mix are read by kind=polynomial only, '
        f'but the kind is {self.kind}'
      )


def check_cubic(path: str, coefficients: tuple[float, ...]) -> Iterator[str]:
  """A message if a cubic has not four coefficients."""
  if len(coefficients) != 4:
    yield (
      f'{path}coefficients has {len(coefficients)} entries, but a cubic '
      'has four, a0 to a3; (0, 1, 0, 0) is the plain softmax'
    )


@dataclass(frozen=True, init=False)
class AttentionConfig(Section):
  """Which mechanism reads the keys; one section per mechanism.

  `AttentionConfig('psa', psa=PsaConfig(window=256))` sets a section by its
  name, and `config.psa` reads it; one that is not set holds its defaults.

  Attributes:
    name: the mechanism.
    implementation: how its kernels run; `auto` takes the platform's best. One
      that the mechanism lacks or that cannot run is refused.
    check_lists: for debugging: a run stops at the first block list that names
      a block twice, or one that is not there. Slow.
    softmax: exact or approximate, for mechanisms that read block lists with it.
    settings: (section, settings) of what differs from its defaults, by name.
  """

  name: str = choice('', ask=lambda: MECHANISMS)
  implementation: str = choice('auto', *IMPLEMENTATIONS)
  check_lists: bool = runtime(False)
  softmax: SoftmaxConfig = SoftmaxConfig()
  settings: tuple[tuple[str, MechanismConfig], ...] = field(default=())

  def __init__(
    self,
    name: str = '',
    implementation: str = 'auto',
    check_lists: bool = False,
    softmax: SoftmaxConfig = SoftmaxConfig(),  # noqa: B008
    settings: tuple[tuple[str, MechanismConfig], ...] = (),
    **by_section: MechanismConfig,
  ):
    """Sets the sections of `by_section` on top of `settings`.

    Raises:
      ConfigError: no such mechanism or section, or an impossible value.
    """
    self._set(
      {
        'name': name,
        'implementation': implementation,
        'check_lists': check_lists,
        'softmax': softmax,
      },
      dict(settings) | by_section,
    )
    self.__post_init__()

  def __getattr__(self, name: str) -> Any:
    """The settings of a section."""
    # `copy` and `pickle` ask for attributes before there are any.
    stored = dict(self.__dict__.get('settings', ()))
    if name in stored:
      return stored[name]
    if name in sections():
      return _default(sections()[name])
    raise AttributeError(f'{type(self).__name__} has no attribute {name!r}')

  @property
  def mechanism(self) -> Mechanism:
    """The registered mechanism of this name."""
    return MECHANISMS[self.name]

  @property
  def mechanism_config(self) -> Any:
    """The settings of the mechanism."""
    return getattr(self, self.mechanism.section)

  @property
  def frozen_steps(self) -> int:
    """Steps in which only the mechanism's own parameters train."""
    return self.mechanism_config.frozen_steps

  def read_by(self, mechanism: str) -> 'AttentionConfig':
    """This attention with another mechanism, for the same weights.

    The implementation and the softmax were named for the configured one.
    """
    return AttentionConfig(
      mechanism, check_lists=self.check_lists, settings=self.settings
    )

  def entries(self) -> Iterator[Entry]:
    """The fields, and every section that is registered."""
    for entry in super().entries():
      if entry.name != 'settings':
        yield entry
    for name, kind in sections().items():
      yield Entry(name, kind, getattr(self, name), {})
    for name, value in self.settings:
      if name not in sections():
        yield Entry(name, MechanismConfig, value, {})

  @classmethod
  def unchecked(cls, values: Mapping[str, Any]) -> Any:
    """See `Section.unchecked`; takes sections by name."""
    made = object.__new__(cls)
    fields = ('name', 'implementation', 'check_lists', 'softmax')
    rest = {k: v for k, v in values.items() if k not in (*fields, 'settings')}
    made._set(
      {name: values[name] for name in fields},
      dict(values.get('settings', ())) | rest,
    )
    return made

  def field_problems(self, path: str) -> Iterator[str]:
    """See `Section`; also sections that nobody registered."""
    if not self.name:
      yield (
        f'{path}name is empty; name a mechanism, one of {", ".join(MECHANISMS)}'
      )
      return
    yield from super().field_problems(path)
    for name, _ in self.settings:
      if name not in sections():
        hint = nearest(name, sections())
        yield f'{path}{name} is no section; did you mean {path}{hint}?'

  def check(self, path: str) -> Iterator[str]:
    """An approximate softmax needs a mechanism that reads it."""
    kind = self.softmax.kind
    if kind != 'exact' and not self.mechanism.approximates_softmax:
      readers = names(approximates_softmax=True)
      yield (
        f'{path}softmax.kind is {kind}, but attention {self.name} does not '
        f'read it; it is for {" and ".join(readers)}, set it to exact'
      )

  def _set(self, values: dict[str, Any], by_section: dict[str, Any]) -> None:
    """Stores what was given; sections at their defaults are left out.

    So two configurations that mean the same are equal.
    """
    known = sections()
    settings = sorted(
      (name, value)
      for name, value in by_section.items()
      if not (name in known and value == _default(known[name]))
    )
    for name, value in (values | {'settings': tuple(settings)}).items():
      object.__setattr__(self, name, value)


def find(name: str) -> Mechanism:
  """The mechanism of this name.

  Raises:
    ConfigError: there is none; the nearest one is named.
  """
  if name not in MECHANISMS:
    raise ConfigError(unknown('attention', name, MECHANISMS))
  return MECHANISMS[name]


def require_config(config: Any) -> None:
  """Refuses what is no `AttentionConfig` where one is needed.

  Raises:
    ConfigError: names what to give instead.
  """
  if isinstance(config, AttentionConfig):
    return
  hint = "; give AttentionConfig('psa', psa=...)"
  if isinstance(config, MechanismConfig):
    for spec in MECHANISMS.values():
      if spec.config is type(config):
        hint = (
          f'; give AttentionConfig({spec.name!r}, {spec.section}='
          f'{type(config).__name__}(...))'
        )
        break
  raise ConfigError(wrong_type('config', 'an AttentionConfig', config, hint))
