"""Prepares a data set ahead of a run: `python -m psa_jax.data.prepare`.

  python -m psa_jax.data.prepare --name=sotu
  python -m psa_jax.data.prepare --name=ag_news_subset --data_dir=~/data
  python -m psa_jax.data.prepare --name=vader3
  python -m psa_jax.data.prepare --name=ddtp_en_fr

`sotu` and `stdlib` are prepared by the first run that names them anyway;
`fetch` has the sets that pip and apt bring. Any other name is a TFDS set, which
is downloaded and written as array_record.
Some of these (pg19, lm1b, ...) use TensorFlow in their own code; the command
then says how to prepare them once where TensorFlow is installed.
"""

import argparse
import contextlib
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from psa_jax.config import ConfigError, DataConfig, RunError
from psa_jax.data import fetch, folder, packaged, prepared


def prepare(name: str, data_dir: str = '') -> str:
  """Prepares one set; returns what it holds and how to use it.

  Raises:
    ConfigError: no set of that name.
    RunError: it cannot be downloaded or written, or needs TensorFlow.
  """
  config = DataConfig(source=name, data_dir=data_dir)
  if name in packaged.PACKAGES:
    source = packaged.source(name, config)
    counts = f'train {len(source.train)}, validation {len(source.validation)}'
    version = source.manifest['version']
    return f'{name} {version}: {counts}\nuse: --config.data.source={name}'
  root = folder.data_dir(config)
  if fetch.known(name):
    return fetch.prepare(name, root)
  builder = prepared.find_builder(name, root)
  if not Path(builder.data_path).exists():
    _download(name, builder, root)
  return _describe(name, builder)


def _download(name: str, builder: Any, root: Path) -> None:
  try:
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS's own advice
      builder.download_and_prepare(file_format='array_record')
  except Exception as e:  # the set's own code: anything
    if prepared.misses_tensorflow(e):
      raise RunError(prepared.tensorflow_once(name, root)) from e
    reason = ' '.join(str(e).split())[:300] or type(e).__name__
    raise RunError(
      f'tfds:{name} could not be prepared in {root}: {reason}'
    ) from e


def _describe(name: str, builder: Any) -> str:
  counts = [f'{k} {v.num_examples}' for k, v in builder.info.splits.items()]
  features = builder.info.features.items()
  keys = sorted(k for k, feature in features if prepared.is_text(feature))
  key = 'text' if 'text' in keys else '|'.join(keys)
  return (
    f'{name} {builder.version} in {builder.data_path}: {", ".join(counts)}\n'
    f'use: --config.data.source=tfds:{name} --config.data.text_key={key}'
  )


def main(arguments: Sequence[str] | None = None) -> int:
  """The command; returns its exit code."""
  parser = argparse.ArgumentParser(
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
    help=f'default: ${folder.ENVIRONMENT}, else ~/.cache/psa_jax',
  )
  options = parser.parse_args(arguments)
  try:
    print(prepare(options.name, options.data_dir))
  except (ConfigError, RunError) as e:
    print(f'error: {e}', file=sys.stderr)
    return 2 if isinstance(e, ConfigError) else 1
  return 0


if __name__ == '__main__':
  sys.exit(main())
