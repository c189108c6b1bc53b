"""Where the numbers of a run go: metrics.jsonl, and a view for TensorBoard.

`metrics.jsonl` is the source of truth: tables, plots and tests read it. One
JSON object a line, of a `kind` (train, eval, final), with the `step` it
belongs to. A resumed run drops the rows after the step it restored, so the
file ends up as if nothing had happened.

TensorBoard event files are written by tensorboardX, hparams among them. Its
own `add_hparams` opens a second file of the same name, which overwrites the
run's scalars; the three summaries are written by hand instead.
"""

import json
import math
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import tensorboardX
from absl import logging

from psa_jax import config as config_lib
from psa_jax.config import Config, json_text

METRICS = 'metrics.jsonl'
TENSORBOARD = 'tensorboard'
_FLUSH_SECONDS = 10


class MetricsFile:
  """`metrics.jsonl` of one run, open for appending."""

  def __init__(self, path: str | pathlib.Path, *, step: int):
    """Cuts off what a run that goes on from `step` will write again.

    That is every later row, the evaluation at `step` itself (a checkpoint is
    saved before it), and a half-written line.

    Args:
      path: the file; it is made where it does not exist.
      step: the step that the run goes on from.
    """
    path, size = pathlib.Path(path), 0
    path.touch()
    self.rows = []
    for row, end in _read(path):
      if (row['step'], row['kind'] != 'train') > (step, False):
        break
      self.rows.append(row)
      size = end
    os.truncate(path, size)  # one system call: never half done
    self._file = path.open('a', encoding='utf-8')

  def write(self, row: Mapping[str, Any]) -> None:
    """Appends a row, NaN as null; it survives the death of the process."""
    row = {
      name: None
      if isinstance(value, float) and not math.isfinite(value)
      else value
      for name, value in row.items()
    }
    self.rows.append(row)
    self._file.write(json.dumps(row, allow_nan=False) + '\n')
    self._file.flush()

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
    self._writer.file_writer.add_summary(experiment)
    self._writer.file_writer.add_summary(start)
    self._said = False

  def write(self, row: Mapping[str, Any]) -> None:
    """Adds the numbers of a row under `<kind>[_<mechanism>]/<name>`."""
    if not self._alive():
      return
    words = [row['kind'], row.get('mechanism')]
    prefix = '_'.join(word for word in words if word)
    for name, value in row.items():
      if isinstance(value, (int, float)) and name != 'step':
        self._writer.add_scalar(f'{prefix}/{name}', value, row['step'])

  def close(self) -> None:
    """Marks the run as ended and closes the file."""
    if not self._alive():
      return
    self._writer.file_writer.add_summary(self._end)
    self._writer.close()

  def _alive(self) -> bool:
    # tensorboardX writes from a thread and does not watch it: once that died
    # (a full disk), its queue fills up and the next write waits for ever.
    alive = self._writer.file_writer.event_writer._worker.is_alive()
    if not alive and not self._said:
      self._said = True
      logging.warning(
        'TensorBoard events cannot be written to %s any more (is the disk '
        'full?); metrics.jsonl goes on',
        self._writer.logdir,
      )
    return alive


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
  ):
    """Opens the writers.

    Args:
      config: the run.
      folder: its work directory.
      step: the step that the run goes on from.
      quality: the metric that TensorBoard's hparams table shows.
      mechanisms: whose; those that the run is judged with.
    """
    self.rows: list[dict[str, Any]] = []
    self._writers: list[MetricsFile | TensorBoard] = []
    if jax.process_index():
      return
    metrics = MetricsFile(folder / METRICS, step=step)
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


def read_rows(path: str | pathlib.Path) -> list[dict[str, Any]]:
  """The rows of a metrics file, up to the first line that is not whole."""
  return [row for row, _ in _read(pathlib.Path(path))]


def _read(path: pathlib.Path) -> Iterator[tuple[dict[str, Any], int]]:
  """Rows, each with the place in the file where it ends."""
  end = 0
  for line in path.read_bytes().splitlines(keepends=True):
    try:
      row = json_text.parse(line)
    except ValueError:
      return
    known = isinstance(row, dict) and {'kind', 'step'} <= row.keys()
    if not known or not line.endswith(b'\n'):
      return
    end += len(line)
    yield row, end
