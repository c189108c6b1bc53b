"""The machine that a kernel is built for, and which implementation runs there.

An implementation named by the user runs or is refused with the reason; `auto`
takes the first that can run and says once why a better one was passed over.

Programs can be built for a machine that is absent: inside

    with platform.target('tpu', kind='v5e'): jitted.lower(...)

the choice is made for that machine, and `interpret` sends Pallas kernels to
its simulator on this CPU. The choice is part of the trace: enter `target`
outside `jit`, and trace anew for another one.
"""

import contextlib
import contextvars
import logging
from collections.abc import Callable, Generator, Mapping
from typing import Any, NamedTuple

import jax

from psa_jax.config import ConfigError

log = logging.getLogger(__name__)


class Target(NamedTuple):
  """The machine that a program is traced for.

  Attributes:
    platform: `cpu`, `gpu` or `tpu`.
    kind: what its maker calls it (`v5e`, `NVIDIA H100 80GB HBM3`); '' if
      unknown.
    capability: of an NVIDIA GPU, 10 * major + minor (90 for Hopper); else 0.
    interpret: handed to `pallas_call`; true values simulate the kernel here.
  """

  platform: str
  kind: str = ''
  capability: int = 0
  interpret: Any = False


class Implementation(NamedTuple):
  """One way to run an op.

  Attributes:
    run: takes the op's checked arguments.
    refusal: takes the target and the same arguments; why it cannot run
      there, or None.
    automatic: whether `auto` may take it.
    slower: takes the same; whether `auto` passes it over for a later one,
      without a word.
    platform: what it was written for; '' for any.
  """

  run: Callable[..., Any]
  refusal: Callable[..., str | None] = lambda *args, **kwargs: None
  automatic: bool = True
  platform: str = ''
  slower: Callable[..., bool] = lambda *args, **kwargs: False


_TARGET: contextvars.ContextVar[Target | None] = contextvars.ContextVar(
  'target', default=None
)
_SAID: set[str] = set()


def current() -> Target:
  """The target set by `target`, else this process's default device."""
  chosen = _TARGET.get()
  if chosen is not None:
    return chosen
  device = jax.devices()[0]
  if device.platform not in ('gpu', 'cuda'):
    return Target(device.platform, device.device_kind)
  major, _, minor = str(getattr(device, 'compute_capability', '0.0')).partition(
    '.'
  )
  return Target('gpu', device.device_kind, 10 * int(major) + int(minor or 0))


@contextlib.contextmanager
def target(
  platform: str, *, kind: str = '', capability: int = 0, interpret: Any = False
) -> Generator[Target]:
  """Traces inside the block choose and build kernels for this machine.

  Args:
    platform: `cpu`, `gpu` or `tpu`.
    kind: see `Target`.
    capability: see `Target`.
    interpret: True, or the parameters of a Pallas simulator.
  """
  made = Target(platform, kind, capability, interpret)
  token = _TARGET.set(made)
  try:
    yield made
  finally:
    _TARGET.reset(token)


def pick(
  name: str, known: Mapping[str, Implementation], *args: Any, **kwargs: Any
) -> Callable[..., Any]:
  """The function of the implementation `name` for these arguments.

  Args:
    name: a key of `known`, or `auto` for the first automatic one that can
      run.
    known: best first.
    *args: of the op, handed to each `refusal`.
    **kwargs: likewise.

  Raises:
    ConfigError: an unknown name, or a named one that cannot run here.
  """
  where = current()
  if name != 'auto':
    if name not in known:
      raise ConfigError(
        f'unknown implementation {name!r}; choose from {["auto", *known]}'
      )
    reason = known[name].refusal(where, *args, **kwargs)
    if reason:
      raise ConfigError(
        f'implementation {name!r} cannot run here: {reason}; use '
        "'xla' or 'auto'"
      )
    return known[name].run
  passed = []
  for candidate, implementation in known.items():
    if not implementation.automatic or implementation.slower(
      where, *args, **kwargs
    ):
      continue
    reason = implementation.refusal(where, *args, **kwargs)
    if reason is None:
      _say_once(candidate, passed)
      return implementation.run
    if implementation.platform == where.platform:
      passed.append((candidate, reason))
  raise ConfigError(f'no implementation can run on {where.platform}: {passed}')


def _say_once(taken: str, passed: list[tuple[str, str]]) -> None:
  """Names what an accelerator's own kernel was refused for, once a reason."""
  for name, reason in passed:
    line = f'{name} was passed over for {taken}: {reason}'
    if line not in _SAID:
      _SAID.add(line)
      log.warning(line)
