"""The command line of every experiment: `python -m experiments.NAME`.

  (nothing)         measures, adds rows to results.jsonl, renews the page
  --regenerate      renews tables and pictures from the rows; runs nothing
  --quick           a small run that prints its tables and records nothing
  --set KEY=VALUE   changes one setting; may be repeated

A mistake costs one line and the exit code 2.
"""

import argparse
import json
import pathlib
import tempfile
from collections.abc import Sequence

from experiments.bench import settings as settings_lib
from experiments.bench.experiment import Experiment
from experiments.bench.rows import ROOT
from psa_jax import command_line
from psa_jax.config import ConfigError, paths


def main(experiment: Experiment, argv: Sequence[str] | None = None) -> int:
  """Does what the flags say; returns the exit code."""
  return command_line.run(lambda: _run(experiment, argv))


def _run(experiment, argv) -> int:
  flags = parser(experiment).parse_args(argv)
  start = experiment.quick if flags.quick else experiment.settings
  settings = settings_lib.apply(start, flags.set)
  if flags.child is not None:
    print(json.dumps(_child(experiment)(settings, flags.child)), flush=True)
    return 0
  if flags.regenerate:
    if flags.set:
      raise ConfigError('--regenerate takes no --set: it runs nothing')
    experiment.write_pages()
    return 0
  if flags.quick:
    return _quick(experiment, settings)
  return _whole(experiment, settings)


def child_command(name: str, settings, words: str) -> list[str]:
  """A command, without the interpreter, that answers by `Experiment.child`."""
  flags = settings_lib.words(settings)
  return ['-m', f'experiments.{name}', f'--child={words}', *flags]


def parser(experiment: Experiment) -> command_line.Parser:
  """Of its flags; `--help` lists its settings."""
  fields = settings_lib.known(experiment.settings)
  listed = '\n'.join(
    f'  {name}={settings_lib.text(getattr(experiment.settings, name))}\n'
    f'      {field.metadata["help"]}'
    for name, field in fields.items()
  )
  if hasattr(experiment.settings, 'changes'):
    listed += '\n  any key of the recipes, for instance train.steps=20'
  made = command_line.Parser(
    prog=f'python -m experiments.{experiment.name}',
    description=experiment.about,
    epilog=f'settings:\n{listed}',
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  modes = made.add_mutually_exclusive_group()
  modes.add_argument(
    '--regenerate', action='store_true', help='renew the page, run nothing'
  )
  modes.add_argument(
    '--quick', action='store_true', help='a small run that records nothing'
  )
  modes.add_argument('--child', help=argparse.SUPPRESS)
  made.add_argument(
    '--set', action='append', default=[], metavar='KEY=VALUE', help='see below'
  )
  return made


def _child(experiment):
  if experiment.child is None:
    raise ConfigError(f'{experiment.name} starts no processes of its own')
  return experiment.child


def _quick(experiment, settings) -> int:
  """Rows go to a file that is thrown away."""
  with tempfile.TemporaryDirectory() as folder:
    book = experiment.book(settings, pathlib.Path(folder) / 'results.jsonl')
    code = experiment.run(settings, book)
    _show(experiment, book)
  return code or 0


def _whole(experiment, settings) -> int:
  """Rows are kept, and the page renewed, even if the run breaks off."""
  changes = getattr(settings, 'changes', ())
  if changes and not settings.results:
    key, value = changes[0]
    raise ConfigError(
      f'--set {key}={value} changes a recipe, and the page is of the recipes '
      'as they are: add --set results=FILE'
    )
  path = experiment.results
  if settings.results:
    path = ROOT / paths.expanded(settings.results, '--set results')
  if path.is_dir() or not path.parent.is_dir():
    raise ConfigError(
      f'--set results={settings.results}: name a file in a folder that exists'
    )
  book = experiment.book(settings, path)
  try:
    return experiment.run(settings, book) or 0
  finally:
    if book.rows:
      _show(experiment, book)
      if path == experiment.results:
        experiment.write_pages()


def _show(experiment, book) -> None:
  shown = experiment.shown(book.all())
  if shown:
    for name, text in experiment.sections(shown).items():
      print(f'{name}\n\n{text}\n')
