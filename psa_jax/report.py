"""Results as tables and pictures: what README pages are generated from.

`python -m psa_jax.report WORKDIR --plot=FILE.png` draws a run's loss, density,
gamma and step time from its `metrics.jsonl`.

Not done: LaTeX tables, and tables over a sweep.
"""

import datetime
import json
import os
import pathlib
import platform
import subprocess
from collections.abc import Sequence
from importlib import metadata
from typing import Any

from absl import app, flags

from psa_jax.config import ConfigError, paths

_PLOT = flags.DEFINE_string('plot', None, 'Picture to write (PNG, SVG, PDF).')


def markdown(rows: Sequence[Sequence[str]]) -> str:
  """A Markdown table; the first row is the header."""
  header, *body = rows
  lines = [header, ['---'] * len(header), *body]
  return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def provenance(
  root: pathlib.Path, sources: Sequence[str] = ('psa_jax',)
) -> dict[str, str]:
  """Date, commit, versions and machine of a measurement, for its rows.

  Args:
    root: of the repository.
    sources: what the measurement depends on, as git paths; the commit gets a
      `+` where they differ from it.
  """
  return {
    'date': datetime.date.today().isoformat(),
    'commit': _commit(root, sources),
    'jax': metadata.version('jax'),
    'jaxlib': metadata.version('jaxlib'),
    'python': platform.python_version(),
    'machine': f'{os.cpu_count()} cores, {_cpu_name()}',
  }


def _commit(root, sources) -> str:
  short = _git(root, 'rev-parse', '--short', 'HEAD')
  changed = _git(root, 'status', '--porcelain', '--', *sources)
  return (short or 'unknown') + ('+' if short and changed else '')


def _git(root, *words) -> str:
  try:
    done = subprocess.run(
      ['git', *words], cwd=root, capture_output=True, text=True, check=False
    )
  except FileNotFoundError:  # a machine without git
    return ''
  return done.stdout.strip()


def _cpu_name() -> str:
  """The processor's model, where Linux tells."""
  try:
    text = pathlib.Path('/proc/cpuinfo').read_text()
  except OSError:
    return platform.machine()
  names = [s for s in text.split('\n') if s.startswith('model name')]
  return names[0].split(':')[1].strip() if names else platform.machine()


def replace_section(path: pathlib.Path, name: str, text: str) -> None:
  """Puts `text` between the markers `<!-- name -->` and `<!-- /name -->`.

  Raises:
    ConfigError: the file lacks a marker.
  """
  begin, end = f'<!-- {name} -->', f'<!-- /{name} -->'
  page = path.read_text('utf-8')
  if page.count(begin) != 1 or page.count(end) != 1:
    raise ConfigError(f'{path} needs one line {begin} and one line {end}')
  before, rest = page.split(begin)
  after = rest.split(end)[1]
  path.write_text(f'{before}{begin}\n{text}\n{end}{after}', 'utf-8')


def read_rows(path: pathlib.Path) -> list[dict[str, Any]]:
  """The rows of a `metrics.jsonl`.

  Raises:
    ConfigError: there is none.
  """
  if not path.exists():
    raise ConfigError(f'there is no {path}; give the work directory of a run')
  lines = path.read_text('utf-8').split('\n')
  return [json.loads(line) for line in lines if line]


def plot_run(workdir: pathlib.Path, target: pathlib.Path) -> None:
  """Draws the quality, density and gamma, and seconds over the steps."""
  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import pyplot as plt

  rows = read_rows(workdir / 'metrics.jsonl')
  train = [row for row in rows if row['kind'] == 'train']
  final = {r['mechanism']: r for r in rows if r['kind'] == 'final'}
  result = workdir / 'result.json'
  baselines = {}
  if result.exists():
    baselines = json.loads(result.read_text('utf-8'))['baselines']
  figure, axes = plt.subplots(3, 1, figsize=(8, 8), sharex=True)
  steps = [row['step'] for row in train]
  _draw_quality(axes[0], steps, train, final, baselines)
  _draw_schedules(axes[1], steps, train)
  axes[2].plot(steps, [r['seconds_per_step'] for r in train], color='C3')
  axes[2].set(ylabel='seconds per step', xlabel='optimiser step', yscale='log')
  for axis in axes:
    axis.grid(alpha=0.3)
    _mark_stages(axis, train)
  for number, (step, row) in enumerate(_stage_starts(train)):
    axes[0].annotate(
      f'{row["seq_len"]:,} tokens',
      (step, 1.02 + 0.07 * (number % 2)),
      xycoords=('data', 'axes fraction'),
      fontsize=8,
    )
  figure.tight_layout()
  figure.savefig(target, dpi=120)
  plt.close(figure)


def _draw_quality(axis, steps, train, final, baselines):
  metric = 'accuracy' if 'accuracy' in train[0] else 'bits_per_byte'
  axis.plot(steps, [r[metric] for r in train], label='train')
  for name, value in baselines.items():
    axis.axhline(value, color='grey', linestyle=':')
    middle = steps[len(steps) // 2]
    axis.annotate(f'{name} {value:.2f}', (middle, value + 0.05), fontsize=8)
  for marker, (name, row) in zip('ox+', final.items(), strict=False):
    axis.plot(
      [steps[-1]],
      [row[metric]],
      marker,
      label=f'validation, {name}: {row[metric]:.3f}',
    )
  axis.set(ylabel=metric.replace('_', ' '))
  axis.legend()


def _draw_schedules(axis, steps, train):
  for name in ('density', 'gamma', 'retained_mass'):
    if name in train[0]:
      axis.plot(steps, [row[name] for row in train], label=name)
  axis.set(ylabel='share', ylim=(-0.02, 1.02))
  axis.legend()


def _stage_starts(train):
  stages = set()
  for row in train:
    if row['stage'] not in stages:
      stages.add(row['stage'])
      yield row['step'], row


def _mark_stages(axis, train):
  for step, _ in _stage_starts(train):
    axis.axvline(step, color='black', linewidth=0.5)


def main(argv: Sequence[str]) -> None:
  """The command line; see the module docstring."""
  if len(argv) != 2 or not _PLOT.value:
    raise app.UsageError('give one work directory and --plot=FILE')
  try:
    workdir = paths.expanded(argv[1], 'the work directory')
    target = paths.expanded(_PLOT.value, '--plot')
    plot_run(pathlib.Path(workdir), pathlib.Path(target))
  except ConfigError as error:
    raise app.UsageError(str(error)) from error


if __name__ == '__main__':
  app.run(main)
