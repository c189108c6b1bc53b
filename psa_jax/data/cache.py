"""Folders of the data cache: each one is either complete or absent.

A folder is built under a temporary name beside its place, flushed to disk and
renamed there, so a killed process leaves nothing that looks finished and two
processes that prepare the same folder at once cannot mix their files. What a
rename cannot rule out (a disk fault, a file edited by hand) is found by the
`load` function of the folder's owner, which raises `Damaged`; the folder is
then built again.

Not done: locking. Two processes may do the same work; the first to finish
wins and the other uses its result.
"""

import errno
import os
import secrets
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from absl import logging

from psa_jax.config import DataConfig, RunError, paths

T = TypeVar('T')

ENVIRONMENT = 'PSA_JAX_DATA_DIR'
_STALE_SECONDS = 24 * 3600  # a temporary folder this old has lost its owner


class Damaged(Exception):
  """A cached folder is not what it should be; the text says why."""


def data_dir(config: DataConfig) -> Path:
  """Root of the cache: the config's, else the environment's, else ~/.cache.

  Raises:
    ConfigError: it is no path, or there is no home.
  """
  key = 'data.data_dir' if config.data_dir else f'${ENVIRONMENT}'
  chosen = config.data_dir or os.environ.get(ENVIRONMENT)
  if not chosen:
    key, chosen = f'data.data_dir or ${ENVIRONMENT}', '~/.cache/psa_jax'
  return Path(paths.expanded(chosen, key)).absolute()


def cached(
  target: Path,
  *,
  build: Callable[[Path], None],
  load: Callable[[Path], T],
) -> T:
  """Returns `load(target)`, building `target` first if absent or damaged.

  Args:
    target: the folder.
    build: fills an existing empty folder.
    load: reads a finished folder; raises `Damaged` if it cannot be trusted.

  Raises:
    RunError: the cache cannot be read or written.
  """
  try:
    if target.exists():
      try:
        return load(target)
      except Damaged as e:
        logging.warning('Rebuilding %s: %s', target, e)
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(target.parent)
    draft = _temporary(target)
    draft.mkdir()
    try:
      build(draft)
      _flush(draft)
      _publish(draft, target, load)
    finally:
      shutil.rmtree(draft, ignore_errors=True)
  except OSError as e:
    raise RunError(
      f'cannot use the data cache {target.parent}: {e.strerror or e}; set '
      f'data.data_dir or ${ENVIRONMENT} to a writable folder with enough room'
    ) from e
  return load(target)


def _temporary(target: Path) -> Path:
  name = f'.tmp-{target.name}-{os.getpid()}-{secrets.token_hex(4)}'
  return target.with_name(name)


def _publish(draft: Path, target: Path, load: Callable[[Path], T]) -> None:
  """Renames `draft` to `target` unless a good `target` is there already."""
  while True:
    try:
      os.rename(draft, target)
      return
    except OSError as e:
      if e.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
        raise
    try:
      load(target)
      return
    except Damaged:
      aside = _temporary(target)
      try:
        os.rename(target, aside)
      except FileNotFoundError:
        continue  # another process has just moved it
      _remove(aside)


def _remove(path: Path) -> None:
  if path.is_dir():
    shutil.rmtree(path, ignore_errors=True)
  else:
    path.unlink(missing_ok=True)


def _remove_stale(parent: Path) -> None:
  for path in parent.glob('.tmp-*'):
    try:
      if time.time() - path.stat().st_mtime > _STALE_SECONDS:
        _remove(path)
    except FileNotFoundError:
      pass  # its owner finished meanwhile


def _flush(folder: Path) -> None:
  """Files first, then the folders that name them, so a crash loses neither."""
  for path in [*sorted(folder.rglob('*'), reverse=True), folder]:
    handle = os.open(path, os.O_RDONLY)
    try:
      os.fsync(handle)
    finally:
      os.close(handle)
