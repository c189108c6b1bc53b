"""Results as tables and pictures: what README pages are generated from.

`python -m psa_jax.report WORKDIR --plot=FILE.png` draws a run's loss, density,
gamma and step time from its `metrics.jsonl`.

Not done: LaTeX tables, and tables over a sweep.
"""

import datetime
import itertools
import os
import pathlib
import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from typing import Any

from absl import logging

from psa_jax import command_line
from psa_jax.config import ConfigError, json_text, paths


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
  # Only a picture of a run needs what writes one.
  from psa_jax.train import metrics

  if not path.exists():
    raise ConfigError(f'there is no {path}; give the work directory of a run')
  return metrics.read_rows(path)


def plot_run(workdir: pathlib.Path, target: pathlib.Path) -> None:
  """Draws the quality, density and gamma, and seconds over the steps.

  Args:
    workdir: of the run.
    target: the picture; its ending says the format.

  Raises:
    ConfigError: there is nothing to draw, a file of the run is damaged, or the
      picture cannot be written.
  """
  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import pyplot as plt

  rows = read_rows(workdir / 'metrics.jsonl')
  train = [row for row in rows if row['kind'] == 'train']
  if not train:
    raise ConfigError(f'{workdir / "metrics.jsonl"} has no row of a step yet')
  final = {r['mechanism']: r for r in rows if r['kind'] == 'final'}
  result = _result(workdir)
  if train[-1]['step'] < result.get('step', 0):
    logging.warning(
      '%s ends at step %d, and the run at %d: rows between them are lost',
      *(workdir / 'metrics.jsonl', train[-1]['step'], result['step']),
    )
  figure, axes = plt.subplots(
    3, 1, figsize=(9.5, 8), sharex=True, layout='constrained'
  )
  steps = [row['step'] for row in train]
  _draw_quality(axes[0], steps, train, final, result)
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
  try:
    figure.savefig(target, dpi=120)
  except (OSError, ValueError) as e:  # no such folder, no such format
    raise ConfigError(f'--plot={target}: {e}') from e
  finally:
    plt.close(figure)


def _result(workdir: pathlib.Path) -> dict[str, Any]:
  """What the run ended with; {} while it has not."""
  path = workdir / 'result.json'
  try:
    return json_text.unsealed(json_text.read(path))
  except FileNotFoundError:
    return {}
  except ValueError as e:
    raise ConfigError(
      f"cannot read {path}: {e}; the same command as the run's writes it again"
    ) from e


def _draw_quality(axis, steps, train, final, result):
  quality = result.get('quality')
  names = (quality, 'accuracy', 'bits_per_byte', 'loss')
  metric = next(name for name in names if name in train[0])
  axis.plot(steps, [r[metric] for r in train], label='train')
  # Baselines are of the metric that the run is judged by, and of no other.
  baselines = result.get('baselines', {}) if metric == quality else {}
  styles = itertools.cycle((':', '--', '-.'))
  for style, (name, value) in zip(styles, baselines.items(), strict=False):
    label = f'{name}: {value:.3f}'
    axis.axhline(value, color='grey', linestyle=style, label=label)
  for marker, (name, row) in zip('ox+', final.items(), strict=False):
    if metric in row:
      axis.plot(
        [steps[-1]],
        [row[metric]],
        marker,
        label=f'validation, {name}: {row[metric]:.3f}',
      )
  axis.set(ylabel=metric.replace('_', ' '))
  _legend(axis)


def _legend(axis):
  """Beside the axes, where it hides nothing."""
  axis.legend(loc='upper left', bbox_to_anchor=(1.01, 1), fontsize=8)


def _draw_schedules(axis, steps, train):
  for name in ('density', 'gamma', 'retained_mass'):
    if name in train[0]:
      axis.plot(steps, [row[name] for row in train], label=name)
  axis.set(ylabel='share', ylim=(-0.02, 1.02))
  if axis.lines:
    _legend(axis)


def _stage_starts(train):
  stages = set()
  for row in train:
    if row['stage'] not in stages:
      stages.add(row['stage'])
      yield row['step'], row


def _mark_stages(axis, train):
  for step, _ in _stage_starts(train):
    axis.axvline(step, color='black', linewidth=0.5)


def main(argv: Sequence[str] | None = None) -> int:
  """The command line; see the module docstring."""
  return command_line.run(lambda: _run(argv))


def _run(argv: Sequence[str] | None) -> None:
  parser = command_line.Parser(
    prog='python -m psa_jax.report',
    description="Draws a run's quality, budget and step time.",
    allow_abbrev=False,
  )
  parser.add_argument('workdir', help='work directory of the run')
  parser.add_argument(
    '--plot', required=True, help='picture to write (PNG, SVG, PDF)'
  )
  options = parser.parse_args(argv)
  workdir = paths.expanded(options.workdir, 'the work directory')
  target = paths.expanded(options.plot, '--plot')
  plot_run(pathlib.Path(workdir), pathlib.Path(target))


if __name__ == '__main__':
  sys.exit(main())
