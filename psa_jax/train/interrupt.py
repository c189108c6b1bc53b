"""Signals: stop at the next step boundary, with everything saved.

SIGTERM, Ctrl-C and SIGHUP (the terminal is gone) all do; a SIGHUP that is
ignored, as under nohup, stays ignored.

A Python signal handler runs only when the main thread is between two
bytecodes, so not while it waits for a step of ten seconds. Here the signal's
number arrives through a pipe (`signal.set_wakeup_fd`, written by the C
handler at once) at a thread of its own: the first one sets a flag that the
loop reads at every boundary, a second Ctrl-C ends the process there and then.

With several processes JAX's preemption service catches SIGTERM on any of them
and names a step at which all of them stop.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import multihost_utils

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_ABORTED = 130


class Stopped(Exception):
  """A signal asked the run to stop."""


class Interrupt:
  """A context in which the signals only make `check` raise.

  Outside the main thread, where Python cannot catch signals, and with several
  processes it changes nothing.
  """

  def __init__(
    self,
    say: Callable[[str], None] = print,
    *,
    before_abort: Callable[[], None] = lambda: None,
  ):
    """Changes nothing yet.

    Args:
      say: shows one line to the user; called from a thread.
      before_abort: called on the second Ctrl-C, to leave the terminal as it
        was; also from that thread.
    """
    self._say, self._before_abort = say, before_abort
    self._signal: int | None = None
    self._handlers: dict[int, Any] = {}

  def check(self) -> None:
    """Raises `Stopped` if this process was asked to stop."""
    if self._signal is not None:
      raise Stopped

  def check_step(self, step: int) -> None:
    """Raises `Stopped` at the same step on every process.

    Args:
      step: updates made so far.
    """
    self.check()
    if jax.process_count() > 1:
      if multihost_utils.reached_preemption_sync_point(step):
        raise Stopped

  def __enter__(self) -> 'Interrupt':
    main = threading.current_thread() is threading.main_thread()
    if not main or jax.process_count() > 1:
      return self
    self._reader, self._writer = os.pipe()
    os.set_blocking(self._writer, False)
    self._old_fd = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
    for number in SIGNALS:
      ignored = signal.getsignal(number) == signal.SIG_IGN
      if number == signal.SIGHUP and ignored:
        continue
      # Without a handler a signal would do what it does by default.
      self._handlers[number] = signal.signal(number, lambda *_: None)
    self._thread = threading.Thread(target=self._watch, daemon=True)
    self._thread.start()
    return self

  def __exit__(self, *_) -> None:
    if not self._handlers:
      return
    for number, handler in self._handlers.items():
      signal.signal(number, handler)
    signal.set_wakeup_fd(self._old_fd)
    os.close(self._writer)
    self._thread.join()
    os.close(self._reader)
    self._handlers = {}

  def _watch(self) -> None:
    while number := os.read(self._reader, 1):
      self._receive(number[0])

  def _receive(self, number: int) -> None:
    if number not in SIGNALS:
      return
    if self._signal is None:
      self._signal = number
      name = signal.Signals(number).name
      with contextlib.suppress(OSError):  # after SIGHUP nobody may listen
        self._say(f'{name}: saving after this step; Ctrl-C again to abort')
    elif number == signal.SIGINT:
      self._before_abort()
      os._exit(_ABORTED)
