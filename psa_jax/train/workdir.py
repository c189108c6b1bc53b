"""The record that every run keeps of itself in its work directory.

  config.json         the resolved configuration
  command.txt         each start: time, what changed, the exact command
  environment.json    commit, Python, platform, packages of the last start
  data_manifest.json  what identifies the training data

`check` refuses a directory that cannot be used, or that holds a run with
another configuration; it takes milliseconds and needs no JAX, so the command
line calls it first. `record` checks again, then writes the four files. Metrics
and checkpoints in the same directory belong to `train`.
"""

import contextlib
import datetime
import json
import os
import pathlib
import platform
import secrets
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

from psa_jax import config as config_lib
from psa_jax.config import Config, ConfigError, RunError, json_text

CONFIG = 'config.json'
COMMAND = 'command.txt'
ENVIRONMENT = 'environment.json'
MANIFEST = 'data_manifest.json'
EXPORTED = 'model.safetensors'  # in the folder of an exported model

_MEND = 'take another --workdir, or pass --allow_config_change'


def check(
  workdir: str | os.PathLike,
  config: Config,
  *,
  allow_config_change: bool = False,
  must_exist: bool = False,
) -> bool:
  """Creates the directory and refuses what could not be run in it.

  Args:
    workdir: the directory of one run.
    config: the configuration that is asked for.
    allow_config_change: go on with keys that a resumed run should not change.
    must_exist: there has to be a run already, which is only read
      (evaluation).

  Returns:
    Whether the directory holds a run that would be resumed.

  Raises:
    ConfigError: the directory is a file, cannot be written, holds no run
      although `must_exist`, or a run with another configuration.
  """
  path = pathlib.Path(workdir)
  if must_exist and not (path / CONFIG).exists():
    raise ConfigError(f'no run in {path}: there is no {CONFIG}; train first')
  if not must_exist:  # an evaluation writes nothing
    if os.path.exists(path / EXPORTED):
      raise ConfigError(
        f'{path} holds an exported model, which is read and not trained; '
        'evaluate it with --mode=eval, or choose another --workdir'
      )
    _make_writable(path)
  changes = _config_changes(path, config)
  if changes is None:
    return False
  if changes.other and not allow_config_change:
    listed = _describe(changes.other, prefix='config.')
    raise ConfigError(
      f'{path} holds a run with another configuration: {listed}; {_MEND}'
    )
  return True


def record(
  workdir: str | os.PathLike,
  config: Config,
  *,
  manifest: Mapping[str, Any],
  devices: Sequence[str] = (),
  command: Sequence[str] | None = None,
  allow_config_change: bool = False,
) -> bool:
  """Checks the directory and the data, then writes the record of this start.

  Args:
    workdir: the directory of one run.
    config: the resolved configuration.
    manifest: JSON-able; only what identifies the data, because any difference
      to the manifest of the run's first start is refused.
    devices: names of the accelerators, for `environment.json`.
    command: the command's words; the default is this process's own.
    allow_config_change: go on with another configuration or other data.

  Returns:
    Whether the directory held a run before.

  Raises:
    ConfigError: as `check`, or the data is not what the run began with.
    RunError: a file of the record cannot be read or written.
  """
  path = pathlib.Path(workdir)
  resumed = check(path, config, allow_config_change=allow_config_change)
  check_data(path, manifest, allow_config_change=allow_config_change)
  changes = _config_changes(path, config)
  environment = describe_environment(devices)
  _append_command(path, command or sys.orig_argv, changes, environment)
  write_json(path / CONFIG, config_lib.to_dict(config))
  write_json(path / ENVIRONMENT, environment)
  write_json(path / MANIFEST, manifest)
  return resumed


def check_data(
  workdir: str | os.PathLike,
  manifest: Mapping[str, Any],
  *,
  allow_config_change: bool = False,
) -> None:
  """Refuses data that is not what the run in the directory began with.

  Args:
    workdir: the directory of one run.
    manifest: see `record`.
    allow_config_change: go on with other data.

  Raises:
    ConfigError: the data differs, naming where.
  """
  path = pathlib.Path(workdir)
  saved = _read_json(path / MANIFEST)
  if saved is None or allow_config_change:
    return
  old = config_lib.flatten(saved)
  new = config_lib.flatten(json.loads(json.dumps(manifest)))
  changed = {
    key: (old.get(key), new.get(key))
    for key in sorted(old.keys() | new.keys())
    if old.get(key) != new.get(key)
  }
  if changed:
    raise ConfigError(
      f'the data is not what the run in {path} began with: '
      f'{_describe(changed)}; {_MEND}'
    )


def describe_environment(devices: Sequence[str] = ()) -> dict[str, Any]:
  """What a result depends on besides the configuration and the data."""
  packages = {
    d.metadata['Name']: d.version
    for d in metadata.distributions()
    if d.metadata['Name']
  }
  now = datetime.datetime.now(datetime.UTC)
  return {
    'time': now.isoformat(timespec='seconds'),
    'git': _git_state(),
    'python': platform.python_version(),
    'platform': platform.platform(),
    'cpu_count': os.cpu_count(),
    'devices': list(devices),
    'packages': dict(sorted(packages.items(), key=lambda p: p[0].lower())),
  }


def write_json(path: pathlib.Path, value: Any) -> None:
  """Replaces `path` in one step: a reader never sees half of it.

  Raises:
    RunError: the file cannot be written; the old one is still whole.
  """
  write_bytes(path, (json.dumps(value, indent=2) + '\n').encode())


def draft(path: pathlib.Path) -> pathlib.Path:
  """An empty file beside `path`, to be filled and renamed to it.

  Nobody can guess its name and have a link lie there; its mode is what the
  umask leaves.

  Raises:
    OSError: it cannot be made.
  """
  found = path.with_name(f'.{path.name}.{secrets.token_hex(8)}.tmp')
  found.open('x').close()
  return found


def remove_drafts(folder: pathlib.Path) -> None:
  """Removes what killed processes left; for who has the folder alone."""
  for path in folder.glob('.*.tmp'):
    with contextlib.suppress(OSError):
      path.unlink()


def set_aside(path: pathlib.Path, why: str) -> pathlib.Path:
  """Renames `path` to `path.why`, or `path.why1` and so on; returns the name.

  Raises:
    RunError: it cannot be renamed.
  """
  target = free_name(path, why)
  try:
    path.rename(target)
  except OSError as e:
    raise RunError(f'cannot rename {path} to {target}: {e.strerror}') from e
  return target


def free_name(path: pathlib.Path, why: str) -> pathlib.Path:
  """`path.why`, or `path.why1` and so on where that is taken."""
  target, copies = path.with_name(f'{path.name}.{why}'), 1
  while target.exists():
    target = path.with_name(f'{path.name}.{why}{copies}')
    copies += 1
  return target


def write_bytes(path: pathlib.Path, content: bytes) -> None:
  """As `write_json`, any bytes."""
  temporary = None
  try:
    temporary = draft(path)
    with open(temporary, 'wb') as f:
      f.write(content)
      f.flush()
      os.fsync(f.fileno())
    os.replace(temporary, path)
  except OSError as e:
    if temporary is not None:
      temporary.unlink(missing_ok=True)
    raise RunError(f'cannot write {path}: {e.strerror}') from e


def _read_json(path: pathlib.Path) -> dict[str, Any] | None:
  """The object in `path`, or None where there is no such file."""
  try:
    return json_text.read_object(path)
  except FileNotFoundError:
    return None
  except OSError as e:
    raise RunError(f'cannot read {path}: {e.strerror}') from e
  except ValueError as e:
    raise ConfigError(f'cannot read {path}: {e}; mend or delete it') from e


def _make_writable(path: pathlib.Path) -> None:
  try:
    path.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=path).close()
  except (FileExistsError, NotADirectoryError) as e:
    raise ConfigError(
      f'the work directory {path} is a file or lies under one; '
      'choose another --workdir'
    ) from e
  except OSError as e:
    raise ConfigError(
      f'cannot write to the work directory {path}: {e.strerror}; '
      'choose another --workdir'
    ) from e


def _config_changes(
  path: pathlib.Path, config: Config
) -> config_lib.Changes | None:
  """From the run in `path` to `config`; None where there is no run."""
  saved = _read_json(path / CONFIG)
  if saved is None:
    return None
  return config_lib.diff(config_lib.with_task(saved), config)


def _append_command(
  path: pathlib.Path,
  command: Sequence[str],
  changes: config_lib.Changes | None,
  environment: Mapping[str, Any],
) -> None:
  target = path / COMMAND
  try:
    earlier = target.read_text(encoding='utf-8') if target.exists() else ''
  except OSError as e:
    raise RunError(f'cannot read {target}: {e.strerror}') from e
  note = f'# {environment["time"]}'
  if environment['git']:
    dirty = ' (dirty)' if environment['git']['dirty'] else ''
    note += f' at commit {environment["git"]["commit"]}{dirty}'
  if changes is not None:
    changed = changes.runtime | changes.other
    note += f'; resumed{", " if changed else ""}{_describe(changed)}'
  text = f'{earlier}{note}\n{shlex.join(command)}\n'
  write_bytes(target, text.encode('utf-8'))


def _describe(changed: Mapping[str, tuple[Any, Any]], prefix: str = '') -> str:
  """One clause a key, `key: old -> new`, long values shortened."""

  def short(value):
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + '...'

  return ', '.join(
    f'{prefix}{key}: {short(old)} -> {short(new)}'
    for key, (old, new) in changed.items()
  )


def _git_state() -> dict[str, Any] | None:
  """Commit of this source and whether tracked files differ from it.

  None where the source is not tracked (an installed package may lie inside
  somebody else's repository) or git cannot be asked.
  """
  here = pathlib.Path(__file__).resolve()

  def git(*words: str) -> str:
    return subprocess.run(
      ('git', '--no-optional-locks', '-C', str(here.parent), *words),
      capture_output=True,
      text=True,
      check=True,
      timeout=20,
    ).stdout.strip()

  try:
    git('ls-files', '--error-unmatch', here.name)
    dirty = bool(git('status', '--porcelain', '--untracked-files=no'))
    return {'commit': git('rev-parse', 'HEAD'), 'dirty': dirty}
  except (OSError, subprocess.SubprocessError):
    return None
