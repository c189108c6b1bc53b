"""What a user sees of a run: a progress bar on a terminal, lines elsewhere.

Once the terminal is gone (SIGHUP) a run speaks to nobody; it saves first.
"""

import errno
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import rich.console
import rich.progress
import rich.table
import rich.text

from psa_jax import command_line, tasks

Table = Sequence[tuple[str, str]]


@runtime_checkable
class Console(Protocol):
  """Where a run speaks; `open_console` picks one."""

  def say(self, line: str) -> None:
    """Shows one line."""

  def show(self, row: Mapping[str, Any], *, eta: float | None = None) -> None:
    """Shows a metrics row; `eta` is in seconds."""

  def table(self, title: str, rows: Table) -> None:
    """Shows names and values."""

  def close(self) -> None:
    """Ends the progress bar."""


def open_console(total_steps: int) -> Console:
  """A progress bar where standard output is a terminal, else plain lines."""
  return (_Terminal if sys.stdout.isatty() else _Lines)(total_steps)


def _unless_gone(method: Callable[..., None]) -> Callable[..., None]:
  """A method that shows something, where there still is a terminal."""

  @functools.wraps(method)
  def show(*args, **kwargs):
    try:
      method(*args, **kwargs)
    except OSError as e:
      if e.errno != errno.EIO:
        raise
      command_line.drop_output()

  return show


class Silence:
  """The console of every process but the first."""

  def say(self, line):
    """Shows nothing."""

  def show(self, row, *, eta=None):
    """Shows nothing."""

  def table(self, title, rows):
    """Shows nothing."""

  def close(self):
    """Does nothing."""


class _Lines:
  def __init__(self, total_steps):
    self._total = total_steps

  @_unless_gone
  def say(self, line):
    print(line, flush=True)

  def show(self, row, *, eta=None):
    head = f'step {row["step"]}/{self._total}'
    if row['kind'] != 'train':
      head = f'{row["kind"]} at {head}'
    self.say('  '.join([head, *_fields(row, eta)]))

  def table(self, title, rows):
    width = max(len(name) for name, _ in rows)
    lines = [f'  {name:<{width}}  {value}' for name, value in rows]
    self.say('\n'.join(['', title, *lines, '']))

  def close(self):
    pass


class _Terminal:
  def __init__(self, total_steps):
    self._console = rich.console.Console(highlight=False)
    self._bar = rich.progress.Progress(
      rich.progress.BarColumn(bar_width=10),
      rich.progress.MofNCompleteColumn(),
      # Wraps in a narrow window, where the ETA would be cut off.
      rich.progress.TextColumn(
        '{task.description}',
        markup=False,
        table_column=rich.table.Column(ratio=1, overflow='fold'),
      ),
      console=self._console,
      expand=True,
    )
    self._task = self._bar.add_task('', total=total_steps)

  @_unless_gone
  def say(self, line):
    self._console.print(line, markup=False)

  @_unless_gone
  def show(self, row, *, eta=None):
    text = '  '.join(_fields(row, eta))
    if row['kind'] == 'train':
      self._bar.start()
      self._bar.update(self._task, completed=row['step'], description=text)
    else:
      self.say(f'{row["kind"]} at step {row["step"]}  {text}')

  @_unless_gone
  def table(self, title, rows):
    table = rich.table.Table(
      '', rich.table.Column(justify='right'), show_header=False
    )
    for row in rows:
      table.add_row(*map(rich.text.Text, row))
    self.say(title)
    self._console.print(table)

  @_unless_gone
  def close(self):
    self._bar.stop()


def _fields(row: Mapping[str, Any], eta: float | None) -> list[str]:
  """The numbers of a row that are worth a glance, where it has them."""
  fields = []
  if 'mechanism' in row:
    fields.append(f'{row["mechanism"]} attention')
  if row['kind'] == 'train':
    fields.append(f'stage {row["stage"] + 1}')
  fields.append(f'{row["seq_len"]:,} tokens')
  for name, label, form in (
    ('loss', 'loss', '.3f'),
    *(
      (name, metric.short or metric.label, metric.short_form or metric.form)
      for name, metric in tasks.metrics().items()
    ),
    ('density', 'density', '.1%'),
    ('gamma', 'gamma', '.2f'),
    ('bits', 'bits', '.3g'),
    ('tokens_per_second', 'tok/s', ',.0f'),
  ):
    if row.get(name) is not None:
      fields.append(f'{label} {row[name]:{form}}')
  if eta is not None:
    fields.append(f'eta {clock(eta)}')
  return fields


def clock(seconds: float) -> str:
  """Seconds as h:mm:ss, or m:ss below an hour."""
  minutes, rest = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  if hours:
    return f'{hours}:{minutes:02}:{rest:02}'
  return f'{minutes}:{rest:02}'
