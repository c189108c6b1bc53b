"""Which optimiser step the schedules of library calls are read at."""

import contextlib
import contextvars
import dataclasses
from collections.abc import Generator
from typing import NamedTuple

import jax.numpy as jnp
from jax.core import Tracer

from psa_jax.config import AttentionConfig, ConfigError, ScheduleConfig
from psa_jax.types import Scalar


class _Scope(NamedTuple):
  step: Scalar
  inside_jit: bool


_SCOPE: contextvars.ContextVar[_Scope | None] = contextvars.ContextVar(
  'psa_jax.at_step', default=None
)


@contextlib.contextmanager
def at_step(step: Scalar) -> Generator[None]:
  """Schedules of calls inside the block are read at `step`.

  For models whose layers do not hand a step on. Enter it inside the function
  that is compiled, with the step as one of its arguments:

      @jax.jit
      def train_step(params, step, batch):
        with psa_jax.at_step(step):
          ...

  Args:
    step: optimiser step, traced or not.
  """
  token = _SCOPE.set(_Scope(step, inside_jit()))
  try:
    yield
  finally:
    _SCOPE.reset(token)


def current(
  config: AttentionConfig, section: str, step: Scalar | None
) -> Scalar:
  """The step that a call is made at.

  Args:
    config: of the call.
    section: the mechanism's settings in it.
    step: what the caller said; None means that of `at_step`.

  Raises:
    ConfigError: see `scoped`.
  """
  if step is not None:
    return step
  name = moving(getattr(config, section)) or moving(config.softmax)
  return scoped(f'{name} is a schedule that moves') if name else 0


def scoped(why: str) -> Scalar:
  """The step of the enclosing `at_step`.

  Args:
    why: what asks for it, for messages.

  Raises:
    ConfigError: there is none, or a compiled program would keep it for ever.
  """
  scope = _SCOPE.get()
  if scope is None:
    raise ConfigError(
      f'{why}, but no step is known; pass step=, or wrap the call in '
      '`with psa_jax.at_step(step):`'
    )
  constant = not isinstance(scope.step, Tracer)
  if constant and not scope.inside_jit and inside_jit():
    raise ConfigError(
      f'{why}, but at_step was entered outside jit with step={scope.step}, '
      'which the compiled program would keep for ever; enter it inside, with '
      'the step as an argument of the function'
    )
  return scope.step


def moving(settings: object) -> str | None:
  """The first field that is a schedule with more than one value, or None."""
  if not dataclasses.is_dataclass(settings):
    return None
  for field in dataclasses.fields(settings):
    value = getattr(settings, field.name)
    if isinstance(value, ScheduleConfig) and _moves(value):
      return field.name
  return None


def _moves(schedule: ScheduleConfig) -> bool:
  if schedule.kind == 'piecewise':
    return len(set(schedule.values)) > 1
  jump = schedule.begin + schedule.length == 0  # takes `final` from step 0 on
  return not (
    schedule.kind == 'constant' or jump or schedule.init == schedule.final
  )


def inside_jit() -> bool:
  """Whether what is computed now becomes part of a program."""
  # An array made under jit (or scan) is traced; under grad alone it is not.
  return isinstance(jnp.zeros(()), Tracer)
