"""Checkpoints of a run: asynchronous, atomic, checked before they are read.

Orbax writes and restores the arrays. This wrapper adds what a run needs:

  <step>/state   the train state, restored through an abstract target, so onto
                 any mesh
  <step>/data    the data iterator's state, JSON, valid for any number of hosts
  <step>/meta    step, seconds so far, name of the recipe, JSON
  <step>/digest.json   size and CRC-32 of every file above

The digest is written just before Orbax renames the finished folder into
place. Without it a truncated file costs pages of tracebacks from Orbax's
threads, and a flipped bit in an array is restored as if nothing were wrong.

A field of the state that is () is not written, so that a state which gained
such a field (a controller, where none is used) still reads older files.

A checkpoint that cannot be read is set aside (`<step>.corrupt`) once an
earlier one was restored; nothing is deleted. Folders have to be on a POSIX
file system, local or shared.
"""

import contextlib
import json
import pathlib
import shutil
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from psa_jax.config import RunError, json_text

DIGEST = 'digest.json'
_TEMPORARY = '.orbax-checkpoint-tmp'
_DISK_ERRORS = (
  'No space left on device',
  'Disk quota exceeded',
  'File too large',
  'Read-only file system',
  'Permission denied',
  'Input/output error',
)


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
    self._saving = -1
    _silence_orbax()
    try:
      self._manager = self._open(keep)
    except OSError as e:
      raise RunError(
        f'cannot use the checkpoint folder {self.path}: '
        f'{e.strerror or e}; choose another --workdir'
      ) from e

  def _open(self, keep: int) -> ocp.CheckpointManager:
    if self._read_only:
      options = ocp.CheckpointManagerOptions(read_only=True, create=False)
      return ocp.CheckpointManager(self.path, options=options)
    self.path.mkdir(parents=True, exist_ok=True)
    if jax.process_index() == 0:
      for folder in self.path.glob(f'*{_TEMPORARY}'):
        step = folder.name.removesuffix(_TEMPORARY)
        self._say(f'removing the half-written checkpoint of step {step}')
        shutil.rmtree(folder)
    options = ocp.CheckpointManagerOptions(
      preservation_policy=checkpoint_managers.LatestN(keep),
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
    return sorted(int(name) for name in names if name.isdecimal())

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
    self._check_space(step, state)
    self._saving = step
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
    """Returns once everything is on disk.

    Raises:
      RunError: the last save could not be written.
    """
    try:
      self._manager.wait_until_finished()
    except Exception as e:
      raise self._failure(self._saving, _reason(e)) from e

  def poll(self) -> None:
    """Raises what `wait` would, if that is known by now; never waits."""
    if jax.process_count() == 1 and not self._manager.is_saving_in_progress():
      self.wait()

  def close(self) -> None:
    """Lets a save under way finish; for the way out of a failing run."""
    with contextlib.suppress(Exception):
      self._manager.close()

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
      reason = _agree(self._damage(step))
      if reason is None:
        try:
          restored = self._restore(step, abstract)
        except Exception as e:
          reason = _reason(e)
        else:
          self._set_aside(list(broken))
          return restored
      broken[step] = reason
      self._say(f'cannot read the checkpoint of step {step}: {reason}')
    if broken:
      raise RunError(
        f'no checkpoint in {self.path} can be read (steps '
        f'{", ".join(str(step) for step in broken)}; newest: '
        f'{next(iter(broken.values()))}); nothing was deleted, move the '
        'folder away to start again'
      )
    return None

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
    reason = _agree(self._damage(steps[-1]))
    if reason is None:
      try:
        return _arrays(self.path / str(steps[-1]) / 'state', read=True)
      except Exception as e:
        reason = _reason(e)
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
        (folder / DIGEST).write_text(json.dumps(_digest(folder)))
        return

  def _damage(self, step: int) -> str | None:
    """What is wrong with the files of a checkpoint, in a few words."""
    folder = self.path / str(step)
    try:
      expected = json_text.read_object(folder / DIGEST)
      digest = _digest(folder)
    except FileNotFoundError:
      return f'{DIGEST} is missing'
    except (OSError, ValueError) as e:
      return f'{type(e).__name__} while checking its files'
    for name, (size, checksum) in expected.items():
      if name not in digest:
        return f'{name} is missing'
      if digest[name][0] != size:
        return f'{name} has {digest[name][0]} bytes, not {size}'
      if digest[name][1] != checksum:
        return f'{name} was altered'
    return None

  def _set_aside(self, steps: list[int]) -> None:
    """Frees the numbers of broken checkpoints, which will come again."""
    if self._read_only or not steps:
      return
    for step in steps if jax.process_index() == 0 else ():
      target, copies = self.path / f'{step}.corrupt', 1
      while target.exists():
        target, copies = self.path / f'{step}.corrupt{copies}', copies + 1
      try:
        (self.path / str(step)).rename(target)
      except OSError as e:
        raise RunError(f'cannot rename to {target}: {e.strerror}') from e
      self._say(f'the damaged checkpoint is kept as {target.name}')
    self._manager.reload()

  def _check_space(self, step: int, state: Any) -> None:
    # Refused here, a save that cannot fit costs one line; refused by the file
    # system, every writer thread of Orbax reports for itself.
    need = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    try:
      free = shutil.disk_usage(self.path).free
    except OSError as e:
      raise self._failure(step, str(e.strerror)) from e
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


def _digest(folder: pathlib.Path) -> dict[str, tuple[int, int]]:
  """Size and CRC-32 of every file in the folder's items.

  Files beside the items are Orbax's own notes, written last of all.
  """
  digest = {}
  for path in sorted(folder.rglob('*')):
    if path.is_file() and path.parent != folder:
      size, checksum = 0, 0
      with path.open('rb') as f:
        while block := f.read(1 << 20):
          size, checksum = size + len(block), zlib.crc32(block, checksum)
      digest[path.relative_to(folder).as_posix()] = (size, checksum)
  return digest


def _agree(damage: str | None) -> str | None:
  """Process 0's answer on every process, which must restore the same step."""
  if jax.process_count() == 1:
    return damage
  broken = multihost_utils.broadcast_one_to_all(np.bool_(damage is not None))
  return (damage or 'process 0 found it damaged') if broken else None


def _reason(error: BaseException) -> str:
  text = str(error)
  for phrase in _DISK_ERRORS:
    if phrase in text:
      return phrase.lower()
  lines = text.strip().splitlines() or ['']
  return f'{type(error).__name__}: {lines[0][:160]}'


def _size(count: int) -> str:
  return f'{count / 2**20:,.1f} MiB'


def _silence_orbax() -> None:
  """Drops the log of Orbax, once: its errors are raised as one line here."""
  logger = logging.get_absl_logger()
  if _not_orbax not in logger.filters:
    logger.addFilter(_not_orbax)


def _not_orbax(record: Any) -> bool:
  return '/orbax/' not in record.pathname
