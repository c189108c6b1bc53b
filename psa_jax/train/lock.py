"""One writer at a time in a work directory, or any number of readers.

The lock is the kernel's, a byte range of the file `lock` (fcntl): it goes with
its process however that ends, kill -9 included, and holds over NFS for every
host that mounts the folder. What the file says, a line a holder, is only for
the message to whoever comes second. The file stays; an old one means nothing.

Who may be in one folder at once:

  train     alone
  eval      with other eval and export, which also only read the checkpoints
  export    the same, and alone in the folder `export` that it writes

With several processes the first one takes the lock for all.
"""

import contextlib
import datetime
import errno
import fcntl
import json
import os
import pathlib
import socket
import time
from collections.abc import Callable, Generator
from typing import Any

from absl import logging

from psa_jax.config import ConfigError, RunError

LOCK = 'lock'
_PATIENCE = 1.0  # seconds; a holder that is just going needs no refusal
_REFUSED = (errno.EACCES, errno.EAGAIN)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)

# The kernel sees one holder in a process: it would grant this process a second
# lock, and drop the first with it.
_mine: dict[pathlib.Path, bool] = {}


@contextlib.contextmanager
def hold(
  folder: str | os.PathLike,
  mode: str,
  *,
  alone: bool,
  say: Callable[[str], None] = logging.warning,
) -> Generator[None]:
  """A context in which nobody else writes in the folder.

  Args:
    folder: an existing folder.
    mode: what the holder does, for the message to others.
    alone: nobody reads in it either.
    say: told if the file system has no locks.

  Raises:
    ConfigError: somebody else is there; the text says who and since when.
    RunError: the lock's file cannot be opened.
  """
  path = pathlib.Path(folder).resolve() / LOCK
  if path in _mine:
    if alone or _mine[path]:
      raise ConfigError(_refusal(path.parent, [_me(mode)]))
    yield  # one reader in another
    return
  handle = _open(path, alone=alone)
  if handle is None:
    yield
    return
  _mine[path] = alone
  try:
    _take(handle, path, mode, alone, say)
    yield
  finally:
    del _mine[path]
    os.close(handle)


def _open(path: pathlib.Path, *, alone: bool) -> int | None:
  """The lock's file; None where a reader may not write and nobody did."""
  try:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
  except OSError as e:
    if alone or e.errno not in _READ_ONLY:
      raise RunError(f'cannot open {path}: {e.strerror}') from e
  with contextlib.suppress(OSError):
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
  return None


def _take(handle, path, mode, alone, say) -> None:
  """Locks the open file, or raises."""
  began = time.monotonic()
  try:
    # A reader that finds nobody empties the list of readers first.
    while not (taken := _try(handle, fcntl.LOCK_EX)):
      if not alone and _try(handle, fcntl.LOCK_SH):
        break
      if time.monotonic() - began > _PATIENCE:
        raise ConfigError(_refusal(path.parent, _holders(path, handle)))
      time.sleep(0.05)
    _write(handle, mode, anew=taken)
    if not alone:
      fcntl.lockf(handle, fcntl.LOCK_SH)
  except OSError as e:
    if e.errno not in _NO_LOCKS:
      raise RunError(f'cannot lock {path}: {e.strerror}') from e
    say(
      f'the file system of {path} has no locks ({e.strerror}); see to it that '
      'nothing else runs in this work directory'
    )


def _try(handle: int, kind: int) -> bool:
  """Whether the lock was free. A file that cannot be written is never ours."""
  try:
    fcntl.lockf(handle, kind | fcntl.LOCK_NB)
  except OSError as e:
    if e.errno in (*_REFUSED, errno.EBADF):
      return False
    raise
  return True


def _write(handle: int, mode: str, *, anew: bool) -> None:
  # The lock holds without it: neither a full disk nor a reader that may not
  # write ends a run.
  with contextlib.suppress(OSError):
    if anew:
      os.ftruncate(handle, 0)
    os.lseek(handle, 0, os.SEEK_END)
    os.write(handle, (json.dumps(_me(mode)) + '\n').encode())


def _me(mode: str) -> dict[str, Any]:
  now = datetime.datetime.now(datetime.UTC)
  return {
    'mode': mode,
    'host': socket.gethostname(),
    'pid': os.getpid(),
    'time': now.isoformat(timespec='seconds'),
  }


def _holders(path: pathlib.Path, handle: int) -> list[dict[str, Any]]:
  """Who the file names; without those of this host that are gone."""
  found = []
  # Through the open handle: closing another one would let go of its locks.
  for line in os.pread(handle, 1 << 16, 0).split(b'\n'):
    with contextlib.suppress(ValueError, RecursionError):
      holder = json.loads(line)
      if isinstance(holder, dict) and _alive(holder):
        found.append(holder)
  return found


def _alive(holder: dict[str, Any]) -> bool:
  if holder.get('host') != socket.gethostname():
    return True
  try:
    os.kill(int(holder['pid']), 0)
  except (ProcessLookupError, KeyError, TypeError, ValueError, OverflowError):
    return False
  except PermissionError:
    pass
  return True


def _refusal(folder: pathlib.Path, holders: list[dict[str, Any]]) -> str:
  listed = '; '.join(
    f'--mode={holder.get("mode")} on host {holder.get("host")}, process '
    f'{holder.get("pid")}, since {holder.get("time")}'
    for holder in holders
  )
  return (
    f'{folder} is in use ({listed or "by a process that left no name"}); wait '
    'for it, stop it, or take another --workdir'
  )
