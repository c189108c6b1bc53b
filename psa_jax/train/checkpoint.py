"""Checkpoints of a run: asynchronous, atomic, checked before they are read.

Orbax writes and restores the arrays. This wrapper adds what a run needs:

  <step>/state   the train state, restored through an abstract target, so onto
                 any mesh
  <step>/data    the data iterator's state, JSON, valid for any number of hosts
  <step>/meta    step, seconds so far, name of the recipe, JSON
  <step>/digest.json   size and CRC-32 of every file above

The digest is written just before Orbax renames the finished folder into
place (`digest.py`).

How many stay: the newest `keep`, and the newest that is known to be good: the
update that began from it had a loss like those before (`judge`). A state that
diverges so never takes the place of the last good one.

A field of the state that is () is not written, so that a state which gained
such a field (a controller, where none is used) still reads older files.

A damaged checkpoint is set aside (`<step>.corrupt`) once an earlier one was
restored; one that this process may not read, or a disk that fails, is an error
and changes nothing. Nothing else is deleted. Folders have to be on a POSIX file
system, local or shared.
"""

import contextlib
import pathlib
import shutil
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils

from psa_jax.config import ConfigError, RunError
from psa_jax.config.errors import StalledError
from psa_jax.train import digest, workdir

STALL_SECONDS = 300.0  # without a byte written, a save is given up
_LOOK_SECONDS = 5.0
_TEMPORARY = '.orbax-checkpoint-tmp'
_DISK_ERRORS = (
  'No space left on device',
  'Disk quota exceeded',
  'File too large',
  'Read-only file system',
  'Permission denied',
  'Input/output error',
)
_DISK_REASONS = tuple(phrase.lower() for phrase in _DISK_ERRORS)


class _Broken(Exception):
  """A checkpoint is not what was written; the text says why."""


class Restored(NamedTuple):
  """A checkpoint that was read: `state` is on its devices."""

  step: int
  state: Any
  data: dict[str, Any]
  meta: dict[str, Any]


class Checkpoints:
  """The checkpoints of one run; at most one save is under way."""

  def __init__(
    self,
    directory: str | pathlib.Path,
    *,
    keep: int = 1,
    read_only: bool = False,
    say: Callable[[str], None] = print,
  ):
    """Opens the folder and clears away what a killed save left behind.

    Args:
      directory: holds one folder a checkpoint.
      keep: how many of the newest stay.
      read_only: never write, not even the folder.
      say: shows one line to the user.

    Raises:
      RunError: the folder cannot be made or read.
    """
    self.path = pathlib.Path(directory).resolve()
    self._read_only, self._say = read_only, say
    self._keep, self._saving = keep, -1
    self._unfinished = self._stalled = self._crowded = False
    _silence_orbax()
    try:
      self._manager = self._open()
      # Of what an earlier process left, the oldest was good enough to stay.
      self._good = min(self.steps(), default=None)
    except OSError as e:
      raise RunError(
        f'cannot use the checkpoint folder {self.path}: '
        f'{e.strerror or e}; choose another --workdir'
      ) from e

  def _open(self) -> ocp.CheckpointManager:
    if self._read_only:
      options = ocp.CheckpointManagerOptions(read_only=True, create=False)
      return ocp.CheckpointManager(self.path, options=options)
    self.path.mkdir(parents=True, exist_ok=True)
    if jax.process_index() == 0:
      for folder in self.path.glob(f'*{_TEMPORARY}*'):
        step = folder.name.partition(_TEMPORARY)[0]
        self._say(f'removing the half-written checkpoint of step {step}')
        shutil.rmtree(folder)
    options = ocp.CheckpointManagerOptions(
      async_options=ocp.options.AsyncOptions(
        post_finalization_callback=self._seal
      ),
    )
    return ocp.CheckpointManager(self.path, options=options)

  def steps(self) -> list[int]:
    """Steps that have a finished checkpoint, oldest first."""
    if not self.path.is_dir():
      return []
    names = [entry.name for entry in self.path.iterdir() if entry.is_dir()]
    # 007 is none of ours, and would be read as 7.
    return sorted(int(n) for n in names if n.isdecimal() and n == str(int(n)))

  def save(
    self,
    step: int,
    state: Any,
    data_state: Mapping[str, Any],
    meta: Mapping[str, Any],
  ) -> None:
    """Copies the state off the devices and writes it in the background.

    The caller may donate or change `state` as soon as this returns.

    Raises:
      RunError: this save, or the one before it, cannot be written. What was
        saved earlier is untouched.
    """
    self.wait()
    self._check_disk(step, state)
    self._saving, self._unfinished, self._crowded = step, True, True
    args = ocp.args.Composite(
      state=ocp.args.StandardSave(_fields(state)),
      data=ocp.args.JsonSave(dict(data_state)),
      meta=ocp.args.JsonSave({**meta, 'step': step}),
    )
    try:
      # The run says when to save, whatever Orbax's own intervals are.
      self._manager.save(step, args=args, force=True)
    except Exception as e:
      raise self._failure(step, _reason(e)) from e

  def wait(self) -> None:
    """Returns once everything is on disk, and lets old checkpoints go.

    Raises:
      RunError: the last save could not be written.
    """
    try:
      self._finish_save()
    except StalledError:
      raise
    except Exception as e:
      raise self._failure(self._saving, _reason(e)) from e
    self._remove_old()

  def poll(self) -> None:
    """Raises what `wait` would, if that is known by now; never waits."""
    if jax.process_count() == 1 and not self._manager.is_saving_in_progress():
      self.wait()

  def close(self) -> None:
    """Lets a save under way finish; for the way out of a failing run."""
    if not self._stalled:
      with contextlib.suppress(Exception):
        self._finish_save()
        self._manager.close()

  def judge(self, step: int, *, good: bool) -> None:
    """Says what the first update from a checkpoint found.

    Args:
      step: of the checkpoint.
      good: its loss was like those before; older ones may go.
    """
    if good:
      self._good = step
    self._crowded = True

  def last_good(self) -> int | None:
    """The step of the newest checkpoint that was judged good."""
    return self._good if self._good in self.steps() else None

  def set_aside(self, steps: Sequence[int], why: str) -> None:
    """Frees the numbers of checkpoints: `<step>` becomes `<step>.<why>`.

    Every process calls it. Steps without a checkpoint are passed over.

    Raises:
      RunError: a folder cannot be renamed.
    """
    if self._read_only:
      return
    found = self.steps() if jax.process_index() == 0 else ()
    for step in (step for step in steps if step in found):
      target = workdir.set_aside(self.path / str(step), why)
      kind = 'damaged ' if why == 'corrupt' else ''
      self._say(f'the {kind}checkpoint of step {step} is kept as {target.name}')
    _meet('set aside')
    self._manager.reload()

  def _remove_old(self) -> None:
    """Keeps the newest ones, and the last that is known to be good."""
    if self._read_only or not self._crowded:
      return
    self._crowded = False
    steps = self.steps() if jax.process_index() == 0 else []
    for step in steps[: -self._keep]:
      if step != self._good:
        shutil.rmtree(self.path / str(step), ignore_errors=True)

  def _finish_save(self) -> None:
    """Waits for Orbax's threads, as long as they get something done.

    They wait for each other, so one that dies (the folder turned read-only
    under it) can leave the others waiting for ever.
    """
    if not self._unfinished:
      return

    def finish():
      with contextlib.suppress(BaseException):  # raised again below
        self._manager.wait_until_finished()

    waiting = threading.Thread(target=finish, daemon=True)
    waiting.start()
    written, seconds = None, 0.0
    waiting.join(_LOOK_SECONDS)
    while waiting.is_alive():
      before, written = written, _written(self.path)
      seconds = seconds + _LOOK_SECONDS if written == before else 0.0
      if seconds >= STALL_SECONDS:
        self._stalled = True
        raise StalledError(
          f'cannot save the checkpoint of step {self._saving}: nothing was '
          f'written to {self.path} for {STALL_SECONDS:.0f} seconds; what was '
          'saved before stays'
        )
      waiting.join(_LOOK_SECONDS)
    self._unfinished = False
    self._manager.wait_until_finished()

  def restore_latest(self, abstract: Any) -> Restored | None:
    """Restores the newest checkpoint that is whole.

    Args:
      abstract: shape, dtype and sharding of every array of the state.

    Returns:
      None where there is no checkpoint at all.

    Raises:
      RunError: there are checkpoints, but none that can be read.
    """
    broken: dict[int, str] = {}
    for step in reversed(self.steps()):
      try:
        restored = self._restore_whole(step, abstract)
      except _Broken as e:
        broken[step] = str(e)
        self._say(f'cannot read the checkpoint of step {step}: {e}')
      else:
        self.set_aside(list(broken), 'corrupt')
        return restored
    if broken:
      raise RunError(
        f'no checkpoint in {self.path} can be read (steps '
        f'{", ".join(str(step) for step in broken)}; newest: '
        f'{next(iter(broken.values()))}); nothing was deleted, move the '
        'folder away to start again'
      )
    return None

  def restore(self, step: int, abstract: Any) -> Restored:
    """Restores the checkpoint of one step.

    Args:
      step: which.
      abstract: as for `restore_latest`.

    Raises:
      ConfigError: there is none.
      RunError: it cannot be read.
    """
    steps = self.steps()
    if step not in steps:
      there = ', '.join(str(s) for s in steps) or 'none'
      raise ConfigError(
        f'--resume_from={step}: there is no checkpoint of that step in '
        f'{self.path}; there: {there}; 0 begins again'
      )
    try:
      return self._restore_whole(step, abstract)
    except _Broken as e:
      raise RunError(
        f'cannot read the checkpoint of step {step} in {self.path}: {e}'
      ) from e

  def _restore_whole(self, step: int, abstract: Any) -> Restored:
    """Restores a checkpoint, or raises `_Broken` with the reason."""
    self._check_files(step)
    try:
      return self._restore(step, abstract)
    except Exception as e:
      reason = _reason(e)
    if reason in _DISK_REASONS:
      raise self._unreadable(step, reason)
    raise _Broken(reason)

  def _check_files(self, step: int) -> None:
    """Compares the files with their digest; process 0 does, for all.

    Raises:
      _Broken: they are not what was written.
      RunError: they cannot be read, which says nothing about them.
    """
    damage = refusal = None
    if jax.process_index() == 0:
      try:
        damage = digest.damage(self.path / str(step))
      except OSError as e:
        refusal = f'{e.filename or "a file"}: {e.strerror or e}'
    if jax.process_count() > 1:
      found = 2 if refusal else int(damage is not None)
      found = multihost_utils.broadcast_one_to_all(np.int32(found))
      if found == 1:
        damage = damage or 'process 0 found it damaged'
      elif found == 2:
        refusal = refusal or 'process 0 cannot read it'
    if refusal:
      raise self._unreadable(step, refusal)
    if damage is not None:
      raise _Broken(damage)

  def _unreadable(self, step: int, reason: str) -> RunError:
    return RunError(
      f'cannot read the checkpoint of step {step} in {self.path}: {reason}; '
      'nothing was changed, mend its permissions or its disk'
    )

  def _restore(self, step: int, abstract: Any) -> Restored:
    fields = _fields(abstract)
    args = ocp.args.Composite(
      state=ocp.args.StandardRestore(fields),
      data=ocp.args.JsonRestore(),
      meta=ocp.args.JsonRestore(),
    )
    try:
      saved = self._manager.restore(step, args=args)
    except ValueError as e:
      self._compare_fields(step, fields, e)
      raise
    state = saved.state
    if hasattr(abstract, '_replace'):
      state = abstract._replace(**state)
    return Restored(step, state, saved.data, saved.meta)

  def _compare_fields(self, step: int, fields: Any, error: Exception) -> None:
    """Raises in fewer words where a state has other fields than the file."""
    saved = set(_arrays(self.path / str(step) / 'state', read=False))
    for name in sorted(saved ^ set(fields)):
      here = 'in it, but not' if name in saved else 'missing from it, but'
      raise ValueError(
        f'{name} is {here} in the state of this configuration (did '
        f'train.{name} change?)'
      ) from error

  def read_arrays(self) -> dict[str, Any] | None:
    """The newest whole checkpoint's state as nested dicts of numpy arrays.

    For another run to begin with: nothing need be known of its shapes, its
    devices or its fields. None where there is no checkpoint.

    Raises:
      RunError: the newest one is damaged.
    """
    steps = self.steps()
    if not steps:
      return None
    try:
      self._check_files(steps[-1])
      return _arrays(self.path / str(steps[-1]) / 'state', read=True)
    except RunError:
      raise
    except Exception as e:
      reason = str(e) if isinstance(e, _Broken) else _reason(e)
    raise RunError(
      f'cannot read the checkpoint of step {steps[-1]} in {self.path}: {reason}'
    )

  def _seal(self) -> None:
    """Writes the digest of the folder that is about to become final."""
    if jax.process_index():
      return
    for name in (f'{self._saving}{_TEMPORARY}', str(self._saving)):
      folder = self.path / name
      if folder.is_dir():
        digest.write(folder)
        return

  def _check_disk(self, step: int, state: Any) -> None:
    # Refused here, a save that cannot be made costs one line; refused by the
    # file system, every writer thread of Orbax reports for itself, or waits.
    need = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    try:
      tempfile.TemporaryFile(dir=self.path).close()
      free = shutil.disk_usage(self.path).free
    except OSError as e:
      raise self._failure(step, str(e.strerror).lower()) from e
    if free < need:
      raise self._failure(
        step, f'it takes {_size(need)}, the disk has {_size(free)} left'
      )

  def _failure(self, step: int, reason: str) -> RunError:
    shutil.rmtree(self.path / f'{step}{_TEMPORARY}', ignore_errors=True)
    with contextlib.suppress(Exception):
      self._manager.reload()  # it has struck off those it meant to replace
    good = [s for s in self.steps() if s != step]
    last = f'the last good one is step {good[-1]}' if good else 'there is none'
    return RunError(
      f'cannot save the checkpoint of step {step}: {reason}; {last}, in '
      f'{self.path}'
    )


def _fields(state: Any) -> Any:
  """A named tuple as a dict, without the fields that are ()."""
  if not hasattr(state, '_asdict'):
    return state
  fields = state._asdict()
  return {n: x for n, x in fields.items() if not isinstance(x, tuple) or x}


def _arrays(folder: pathlib.Path, *, read: bool) -> dict[str, Any]:
  """A saved tree: what is known of its arrays, or the arrays in numpy."""
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
    tree = reader.metadata(folder).item_metadata.tree
    if not read:
      return tree
    kind = ocp.RestoreArgs(restore_type=np.ndarray)
    kinds = jax.tree.map(lambda _: kind, tree)
    args = ocp.args.PyTreeRestore(restore_args=kinds)
    return reader.restore(folder, args=args)


def _written(folder: pathlib.Path) -> list[tuple[str, int]]:
  """Names and sizes of what the saves under way have written so far."""
  found = []
  with contextlib.suppress(OSError):  # renamed meanwhile
    for path in sorted(folder.glob(f'*{_TEMPORARY}*/**/*')):
      found.append((path.name, path.stat().st_size))
  return found


def _meet(what: str) -> None:
  """Waits for the other processes, where there are any."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(what)


def _reason(error: BaseException) -> str:
  text = str(error)
  for phrase in _DISK_ERRORS:
    if phrase in text:
      return phrase.lower()
  first = text.strip().split('\n')[0]
  return f'{type(error).__name__}: {first[:160]}'


def _size(count: int) -> str:
  return f'{count / 2**20:,.1f} MiB'


def _silence_orbax() -> None:
  """Drops the log of Orbax, once: its errors are raised as one line here."""
  logger = logging.get_absl_logger()
  if _not_orbax not in logger.filters:
    logger.addFilter(_not_orbax)


def _not_orbax(record: Any) -> bool:
  return '/orbax/' not in record.pathname
