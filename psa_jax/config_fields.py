"""What every configuration is made of: errors, fields, schedules."""

from dataclasses import dataclass, field


class ConfigError(ValueError):
  """A request that is refused before anything runs: a key, a value, a flag.

  The text is one line and the whole message; the command line exits with 2.
  """


class RunError(RuntimeError):
  """A run that cannot go on for a reason outside the program.

  A checkpoint that cannot be read, a full disk, a loss that is not finite. The
  text is one line and the whole message; the command line exits with 1.
  """


def runtime(default, *options):
  """A field that may change when a run is resumed; `choice` with options."""
  metadata = {'runtime': True} | ({'options': options} if options else {})
  return field(default=default, metadata=metadata)


def choice(default, *options):
  """A string field restricted to `options`."""
  return field(default=default, metadata={'options': options})


@dataclass(frozen=True)
class ScheduleConfig:
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
  init: float = 1.0
  final: float = 1.0
  begin: int = 0
  length: int = 0
  boundaries: tuple[int, ...] = ()
  values: tuple[float, ...] = ()
