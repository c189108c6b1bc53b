"""Schedules: how much, as a pure function of the optimiser step.

A schedule maps the int32 optimiser step (traced inside jit) to a traced f32
scalar, so a value that changes every step costs no recompilation. One
vocabulary serves attention keep ratios and mass targets, quantisation bits,
polynomial mixing and the PRepBN gamma.

With u = (step - begin) / length clipped to [0, 1], the curves from `init` to
`final` are

  linear       init + (final - init) u
  cosine       final + (init - final) (1 + cos(pi u)) / 2
  exponential  init (final / init)^u
  cubic        final + (init - final) (1 - u)^3       (Zhu & Gupta 2017,
               arXiv 1710.01878, equation 1)

Both ends are exact: `init` up to `begin`, `final` from `begin + length` on,
and in between the value never leaves the interval. `length` 0 is a jump that
takes `final` from `begin` on. `constant`, `linear`, `cosine`, `exponential`,
`cubic` and `piecewise` describe a schedule as the mechanisms take it, and
`make(schedule)(step)` reads it. Linear and cubic are optax's polynomial
schedule; optax reads a length of 0 as "stay at init", which is why the jump is
made here.

Not done here: values that change a shape (those are stages of the recipe,
each compiled once) and the adaptive controller, which needs state in the
train state (`train/controller.py`).
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from psa_jax.config import ConfigError, ScheduleConfig
from psa_jax.types import Scalar

Schedule = Callable[[Scalar], jax.Array]


def _linear(cfg: ScheduleConfig):
  return optax.polynomial_schedule(
    cfg.init, cfg.final, 1, cfg.length, cfg.begin
  )


def _cubic(cfg: ScheduleConfig):
  return optax.polynomial_schedule(
    cfg.init, cfg.final, 3, cfg.length, cfg.begin
  )


def _cosine(cfg: ScheduleConfig):
  def value(step):
    half_turn = jnp.pi * _progress(step, cfg.begin, cfg.length)
    weight = 0.5 * (1 + jnp.cos(half_turn))
    return cfg.final + (cfg.init - cfg.final) * weight

  return value


def _exponential(cfg: ScheduleConfig):
  def value(step):
    progress = _progress(step, cfg.begin, cfg.length)
    return cfg.init * jnp.power(cfg.final / cfg.init, progress)

  return value


CURVES = {
  'linear': _linear,
  'cosine': _cosine,
  'exponential': _exponential,
  'cubic': _cubic,
}


def constant(value: float | int) -> ScheduleConfig:
  """`value` at every step."""
  return ScheduleConfig(init=float(value))


def linear(
  init: float | int, final: float | int, *, length: int, begin: int = 0
) -> ScheduleConfig:
  """From `init` at step `begin` to `final`, `length` steps later."""
  return _curve('linear', init, final, begin, length)


def cosine(
  init: float | int, final: float | int, *, length: int, begin: int = 0
) -> ScheduleConfig:
  """Half a cosine from `init` at step `begin` to `final`."""
  return _curve('cosine', init, final, begin, length)


def exponential(
  init: float | int, final: float | int, *, length: int, begin: int = 0
) -> ScheduleConfig:
  """By the same factor at every step; both ends are above 0."""
  return _curve('exponential', init, final, begin, length)


def cubic(
  init: float | int, final: float | int, *, length: int, begin: int = 0
) -> ScheduleConfig:
  """Fast at first and slow towards `final` (Zhu & Gupta 2017)."""
  return _curve('cubic', init, final, begin, length)


def piecewise(
  values: Sequence[float | int], boundaries: Sequence[int]
) -> ScheduleConfig:
  """`values[i]` from step `boundaries[i - 1]` to before `boundaries[i]`."""
  return ScheduleConfig(
    'piecewise',
    boundaries=tuple(int(step) for step in boundaries),
    values=tuple(float(value) for value in values),
  )


def _curve(kind, init, final, begin, length):
  return ScheduleConfig(
    kind, float(init), float(final), int(begin), int(length)
  )


def make(cfg: ScheduleConfig) -> Schedule:
  """Returns the schedule that `cfg` describes.

  Args:
    cfg: kind, values and steps.

  Returns:
    A pure function of the optimiser step (Python int or traced int32) that
    returns an f32 scalar.
  """
  if cfg.kind == 'constant':
    return lambda step: jnp.float32(cfg.init)
  if cfg.kind == 'piecewise':
    return _piecewise(cfg)
  if cfg.length == 0:
    return lambda step: jnp.where(
      jnp.asarray(step) < cfg.begin,
      jnp.float32(cfg.init),
      jnp.float32(cfg.final),
    )
  return _between(cfg, CURVES[cfg.kind](cfg))


def upper_bound(cfg: ScheduleConfig) -> float:
  """Returns the largest value that `make(cfg)` takes at any step >= 0.

  Static buffers (the width of a block list) are sized by it. The value is
  that of the f32 the schedule returns, which may exceed the decimal number
  in the recipe by a rounding error.
  """
  if cfg.kind == 'constant':
    values = (cfg.init,)
  elif cfg.kind == 'piecewise':
    values = cfg.values
  elif cfg.begin == 0 and cfg.length == 0:
    values = (cfg.final,)
  else:
    values = (cfg.init, cfg.final)
  return float(np.float32(max(values)))


def last_value(cfg: ScheduleConfig) -> float:
  """Returns the value that `make(cfg)` keeps in the end."""
  if cfg.kind == 'piecewise':
    return cfg.values[-1]
  return cfg.init if cfg.kind == 'constant' else cfg.final


def join(schedules: Sequence[Schedule], boundaries: Sequence[int]) -> Schedule:
  """Returns `schedules[i]` from step `boundaries[i - 1]` on.

  Every member counts its own steps: it is called with the steps since its
  boundary (`optax.join_schedules`).

  Raises:
    ConfigError: boundaries that do not fit the schedules or do not increase.
  """
  if len(boundaries) != len(schedules) - 1:
    raise ConfigError(
      f'joining {len(schedules)} schedules takes {len(schedules) - 1} '
      f'boundaries, got {len(boundaries)}'
    )
  _check_increasing('boundaries', boundaries)
  joined = optax.join_schedules(schedules, boundaries)
  return lambda step: jnp.asarray(joined(jnp.asarray(step)), jnp.float32)


def prepbn_gamma(
  step: Scalar, *, warmup_steps: int, decay_steps: int
) -> Float[Array, '']:
  """Weight of the base norm in PRepBN (SLAB, arXiv 2405.11582, section 3.2).

  1 through the warm-up, then `max(0, (T - (step - warmup_steps)) / T)` with
  T = `decay_steps`: still 1 at step `warmup_steps`, 0 from step
  `warmup_steps + decay_steps` on. `decay_steps` 0 is a jump to 0 after
  `warmup_steps` steps of pure base norm.

  Args:
    step: optimiser updates already applied; never a count of forward calls,
      which accumulation and rematerialisation would inflate.
    warmup_steps: steps of pure base norm first.
    decay_steps: T, steps of the decay.

  Returns:
    f32 scalar in [0, 1].

  Raises:
    ConfigError: a negative number of steps.
  """
  if warmup_steps < 0 or decay_steps < 0:
    raise ConfigError(
      'norm.warmup_steps and norm.decay_steps must be 0 or more, got '
      f'{warmup_steps} and {decay_steps}'
    )
  since = jnp.asarray(step) - warmup_steps
  if decay_steps == 0:
    return jnp.where(since < 0, jnp.float32(1), jnp.float32(0))
  remaining = jnp.clip(decay_steps - since, 0, decay_steps)
  gamma = remaining.astype(jnp.float32) / jnp.float32(decay_steps)
  return jnp.where(remaining == decay_steps, jnp.float32(1), gamma)


def _check_increasing(key: str, steps: Sequence[int]) -> None:
  if any(b <= a for a, b in zip((0, *steps), steps, strict=False)):
    raise ConfigError(f'{key} must be above 0 and increase, got {tuple(steps)}')


def _progress(step: Scalar, begin: int, length: int) -> jax.Array:
  # Subtracted as integers: f32 cannot count single steps beyond 2^24.
  since = jnp.clip(jnp.asarray(step) - begin, 0, length)
  return since.astype(jnp.float32) / length


def _between(cfg: ScheduleConfig, curve: Schedule) -> Schedule:
  """Makes both ends of `curve` exact and keeps it between them."""
  low, high = min(cfg.init, cfg.final), max(cfg.init, cfg.final)

  def value(step):
    step = jnp.asarray(step)
    inside = jnp.clip(jnp.asarray(curve(step), jnp.float32), low, high)
    after = jnp.where(step >= cfg.begin + cfg.length, cfg.final, inside)
    return jnp.where(step <= cfg.begin, jnp.float32(cfg.init), after)

  return value


def _piecewise(cfg: ScheduleConfig) -> Schedule:
  boundaries = np.asarray(cfg.boundaries, np.int32)
  values = np.asarray(cfg.values, np.float32)

  def value(step):
    passed = jnp.sum(jnp.asarray(step) >= boundaries)
    return jnp.asarray(values)[passed]

  return value
