"""How a program of this project ends: one line for what is no bug.

`launch.py`, the experiments, `python -m psa_jax.report` and `python -m
psa_jax.data.prepare` run inside `run`. Exit codes: 2 the command was refused
and nothing ran, 1 it could not go on, 130 Ctrl-C. Only a bug of ours has a
traceback.
"""

import argparse
import contextlib
import errno
import io
import os
import re
import sys
from collections.abc import Callable
from typing import NoReturn

from psa_jax.config import errors
from psa_jax.config.errors import ConfigError, RunError

# A full, read-only or forbidden place on disk is not a bug.
_DISK = (
  errno.EACCES,
  errno.EISDIR,
  errno.ELOOP,
  errno.ENAMETOOLONG,
  errno.ENOTDIR,
  errno.EPERM,
  errno.ENOSPC,
  errno.EDQUOT,
  errno.EROFS,
  errno.EFBIG,
  errno.EIO,
)
_NO_MEMORY = re.compile(r'RESOURCE_EXHAUSTED:? *(.*)')
_NO_BACKEND = 'Unable to initialize backend'


def run(body: Callable[[], int | None]) -> int:
  """Runs a program; returns its exit code.

  Args:
    body: the program; what it returns is the exit code, None is 0.

  Raises:
    Exception: a bug.
  """
  try:
    _check_streams()
    code = body() or 0
    sys.stdout.flush()  # what fails at the exit of Python has no line
    return code
  except KeyboardInterrupt:
    return _say('interrupted', 130)
  except Exception as e:
    found = explained(e)
    if found is None:
      raise
    return _say(*found)


def explained(error: Exception) -> tuple[str, int] | None:
  """The line that an error ends a program with, and the exit code.

  None for a bug.
  """
  text = str(error)
  memory = _NO_MEMORY.search(text)
  match error:
    case ConfigError():
      return text, 2
    case RunError():
      return text, 1
    case BrokenPipeError():
      drop_output()
      return (
        'standard output was closed by its reader (a pipe into head?); what '
        'was saved stays; write to a file instead: > log.txt'
      ), 1
    case OSError() if error.errno in _DISK:
      return text, 1
    case RuntimeError() if text.startswith(_NO_BACKEND):
      name = os.environ.get('JAX_PLATFORMS', '')
      return (
        f'JAX_PLATFORMS={errors.shown(name)[1:-1]} cannot be used here: '
        f'{errors.cut(text)}; unset it, or set it to cpu'
      ), 2
  if memory or isinstance(error, MemoryError):
    why = errors.cut((memory[1] if memory else text) or 'of the host')
    return (
      f'out of memory: {why}; lower config.train.batch_size, '
      'config.train.seq_len or config.eval.seq_len, raise '
      'config.optim.accumulate, or set config.model.remat=full; what was saved '
      'stays'
    ), 1
  return None


class Parser(argparse.ArgumentParser):
  """Says a mistake in one line; to be used inside `run`."""

  def error(self, message: str) -> NoReturn:
    """Refuses the command."""
    raise ConfigError(f'{self.prog}: {message}; --help lists the flags')


def _say(text: str, code: int) -> int:
  print(f'error: {errors.line(text)}', file=sys.stderr, flush=True)
  return code


def _check_streams() -> None:
  """Refuses a closed standard output, and lets the others print all text.

  Python has None for a stream that was closed. The next file to be opened
  would take its number, and what a library prints there would land in the
  file.
  """
  if sys.stderr is None:
    sys.stderr = _to_nowhere(2)
  if sys.stdout is None:
    sys.stdout = _to_nowhere(1)
    raise ConfigError(
      'standard output is closed; write it to a file or away: > /dev/null'
    )
  for stream in (sys.stdout, sys.stderr):
    # A name of bytes that are no UTF-8, or a terminal that has no arrow.
    if isinstance(stream, io.TextIOWrapper):
      stream.reconfigure(errors='backslashreplace')


def drop_output() -> None:
  """Lets later lines go nowhere, and what is flushed at the exit."""
  nowhere = os.open(os.devnull, os.O_WRONLY)
  with contextlib.suppress(OSError):  # a stream without a file
    os.dup2(nowhere, sys.stdout.fileno())
  os.close(nowhere)


def _to_nowhere(number: int):
  """A stream for a closed file descriptor, which it takes."""
  nowhere = os.open(os.devnull, os.O_WRONLY)
  if nowhere != number:
    os.dup2(nowhere, number)
    os.close(nowhere)
  return open(number, 'w', closefd=False)
