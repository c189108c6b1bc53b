"""Where the numbers of a run go: metrics.jsonl, and a view for TensorBoard.

`metrics.jsonl` is the source of truth: tables, plots and tests read it. One
JSON object a line, of a `kind` (train, eval, final), with the `step` it
belongs to. A resumed run drops the rows after the step it restored, so the
file ends up as if nothing had happened. A line that is not a row, because a
byte of it changed, is left out; the file as it was is kept beside it.

TensorBoard event files are written by tensorboardX, hparams among them. Its
own `add_hparams` opens a second file of the same name, which overwrites the
run's scalars; the three summaries are written by hand instead.
"""

import json
import math
import os
import pathlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import tensorboardX
from absl import logging

from psa_jax import config as config_lib
from psa_jax.config import Config, RunError, json_text
from psa_jax.train import workdir

METRICS = 'metrics.jsonl'
TENSORBOARD = 'tensorboard'
_FLUSH_SECONDS = 10
_KINDS = ('train', 'eval', 'final')
_WORDS = ('kind', 'mechanism')
_SHOWN = 5


class MetricsFile:
  """`metrics.jsonl` of one run, open for appending."""

  def __init__(
    self,
    path: str | pathlib.Path,
    *,
    step: int,
    say: Callable[[str], None] = logging.warning,
  ):
    """Takes out what a run that goes on from `step` will write again.

    That is every later row, the evaluation at `step` itself (a checkpoint is
    saved before it), and a half-written last line.

    Args:
      path: the file; it is made where it does not exist.
      step: the step that the run goes on from.
      say: told of lines that are no rows.

    Raises:
      RunError: the file cannot be read or written.
    """
    self._path = pathlib.Path(path)
    try:
      self._path.touch()
      lines, damaged = _read(self._path)
      if damaged:
        self._keep_damaged(damaged, say)
      kept = [
        (row, line)
        for row, line in lines
        if (row['step'], row['kind'] != 'train') <= (step, False)
      ]
      self.rows = [row for row, _ in kept]
      self._replace(b''.join(line for _, line in kept))
      self._file = self._path.open('ab', buffering=0)
    except OSError as e:
      raise self._error(e) from e

  def _keep_damaged(self, damaged, say) -> None:
    kept = workdir.free_name(self._path, 'corrupt')
    shutil.copyfile(self._path, kept)
    say(
      f'{self._path}: {_lines(damaged)}, and left out; the file as it was is '
      f'kept as {kept.name}'
    )

  def _replace(self, content: bytes) -> None:
    """Leaves `content` in the file, in one system call: never half of it."""
    if self._path.read_bytes().startswith(content):
      os.truncate(self._path, len(content))
    else:
      workdir.write_bytes(self._path, content)

  def _error(self, error: OSError) -> RunError:
    return RunError(f'cannot write {self._path}: {error.strerror}')

  def write(self, row: Mapping[str, Any]) -> None:
    """Appends a row, NaN as null; it survives the death of the process."""
    row = {
      name: None
      if isinstance(value, float) and not math.isfinite(value)
      else value
      for name, value in row.items()
    }
    self.rows.append(row)
    line = (json.dumps(row, allow_nan=False) + '\n').encode()
    try:
      while line:  # a full disk takes a part first
        line = line[self._file.write(line) :]
    except OSError as e:
      raise self._error(e) from e

  def close(self) -> None:
    """Closes the file."""
    self._file.close()


class TensorBoard:
  """Event files of one run: every row as scalars, and the configuration."""

  def __init__(
    self,
    folder: str | pathlib.Path,
    hparams: Mapping[str, Any],
    *,
    metrics: Sequence[str],
    step: int,
  ):
    """Opens a new event file; older ones stay.

    Args:
      folder: where the event files lie.
      hparams: what is special about the run, dotted names to values.
      metrics: tags of the scalars that the hparams table shows.
      step: the step that the run goes on from; what older files hold beyond
        it is hidden.
    """
    self._writer = tensorboardX.SummaryWriter(
      str(folder),
      purge_step=step + 1 if step else None,
      flush_secs=_FLUSH_SECONDS,
    )
    simple = {
      name: value if isinstance(value, (bool, int, float)) else str(value)
      for name, value in hparams.items()
    }
    experiment, start, self._end = tensorboardX.summary.hparams(
      simple, dict.fromkeys(metrics, 0.0)
    )
    self._said = False
    self._guard(self._writer.file_writer.event_writer._ev_writer)
    self._writer.file_writer.add_summary(experiment)
    self._writer.file_writer.add_summary(start)

  def write(self, row: Mapping[str, Any]) -> None:
    """Adds the numbers of a row under `<kind>[_<mechanism>]/<name>`."""
    words = [row['kind'], row.get('mechanism')]
    prefix = '_'.join(word for word in words if word)
    for name, value in row.items():
      if isinstance(value, (int, float)) and name != 'step':
        self._writer.add_scalar(f'{prefix}/{name}', value, row['step'])

  def close(self) -> None:
    """Marks the run as ended and closes the file."""
    self._writer.file_writer.add_summary(self._end)
    self._writer.close()

  def _guard(self, events: Any) -> None:
    """Keeps a disk that is full from tensorboardX's thread.

    It writes from a thread that nobody watches: one that died of an error
    leaves its traceback, and a queue that fills up until a write waits for
    ever.
    """

    def guarded(call: Callable[..., Any]) -> Callable[..., Any]:
      def call_or_say(*args):
        try:
          return call(*args)
        except OSError as e:
          if not self._said:
            self._said = True
            logging.warning(
              'TensorBoard events cannot be written to %s any more: %s; '
              'metrics.jsonl goes on',
              self._writer.logdir,
              e.strerror,
            )

      return call_or_say

    for name in ('write_event', 'flush', 'close'):
      setattr(events, name, guarded(getattr(events, name)))


class Log:
  """Every writer of a run behind one call; only process 0 writes."""

  def __init__(
    self,
    config: Config,
    folder: pathlib.Path,
    *,
    step: int,
    quality: str = 'bits_per_byte',
    mechanisms: Sequence[str] = (),
    say: Callable[[str], None] = logging.warning,
  ):
    """Opens the writers.

    Args:
      config: the run.
      folder: its work directory.
      step: the step that the run goes on from.
      quality: the metric that TensorBoard's hparams table shows.
      mechanisms: whose; those that the run is judged with.
      say: shows one line to the user.
    """
    self.rows: list[dict[str, Any]] = []
    self._writers: list[MetricsFile | TensorBoard] = []
    if jax.process_index():
      return
    metrics = MetricsFile(folder / METRICS, step=step, say=say)
    self.rows = metrics.rows
    self._writers.append(metrics)
    if config.log.tensorboard:
      self._writers.append(
        TensorBoard(
          folder / TENSORBOARD,
          _hparams(config),
          metrics=[f'final_{name}/{quality}' for name in mechanisms],
          step=step,
        )
      )

  def write(self, row: Mapping[str, Any]) -> None:
    """Writes a row everywhere."""
    for writer in self._writers:
      writer.write(row)

  def close(self) -> None:
    """Closes the writers."""
    for writer in self._writers:
      writer.close()


def _hparams(config: Config) -> dict[str, Any]:
  """The keys that differ from the defaults: a table of all has 242 columns.

  The attention is always there, for it is what arms differ by.
  """
  values, usual = (
    config_lib.flatten(config_lib.to_dict(c)) for c in (config, Config())
  )
  name = 'model.attention.name'
  own = {key: v for key, v in values.items() if v != usual[key]}
  return {name: values[name]} | own


def read_rows(
  path: str | pathlib.Path, say: Callable[[str], None] = logging.warning
) -> list[dict[str, Any]]:
  """The rows of a metrics file; `say` is told of lines that are none."""
  lines, damaged = _read(pathlib.Path(path))
  if damaged:
    say(f'{path}: {_lines(damaged)}, and left out')
  return [row for row, _ in lines]


def _read(
  path: pathlib.Path,
) -> tuple[list[tuple[dict[str, Any], bytes]], dict[int, str]]:
  """Rows with their lines, and what is wrong by the number of a line.

  The last line is no fault where it is half: a process was killed.
  """
  rows, damaged = [], {}
  lines = path.read_bytes().split(b'\n')
  for number, line in enumerate(lines[:-1], 1):
    row = _parse(line)
    if isinstance(row, str):
      damaged[number] = row
    else:
      rows.append((row, line + b'\n'))
  return rows, damaged


def _parse(line: bytes) -> dict[str, Any] | str:
  """The row in a line, or what is wrong with it."""
  try:
    row = json_text.parse(line)
  except ValueError:
    return 'not JSON'
  if not isinstance(row, dict):
    return 'no object'
  if row.get('kind') not in _KINDS:
    return f'kind is none of {", ".join(_KINDS)}'
  if 'step' not in row:
    return 'step is missing'
  for name, value in row.items():
    if name not in ('step', 'stage') and row['kind'] != 'train':
      continue  # an evaluation may hold texts and lists
    if name in ('step', 'stage'):
      if type(value) is not int or not 0 <= value < 2**31:
        return f'{name} is no count'
    elif name not in _WORDS and not _is_number(value):
      return f'{name} is no number'
  return row


def _is_number(value: Any) -> bool:
  return value is None or (
    isinstance(value, int | float) and not isinstance(value, bool)
  )


def _lines(damaged: Mapping[int, str]) -> str:
  """Which lines are damaged and how, the first few."""
  listed = [f'line {number} ({what})' for number, what in damaged.items()]
  more = f' and {len(listed) - _SHOWN} more' if len(listed) > _SHOWN else ''
  verb = 'is' if len(listed) == 1 else 'are'
  return f'{", ".join(listed[:_SHOWN])}{more} {verb} damaged'
