"""Sets of pictures with a label each, and their rows.

`ImageSet` holds a set of pictures of one size in memory; `PreparedImages` reads
pictures of any size one at a time.

The splits of an `ImageSet` are drawn once, by a fixed seed and class by class,
so every run and seed is judged on the same pictures: of each class a fifth is
the test split, a tenth validation, the rest training. The test split is for
the last number of a study; `eval.split` says which one a run looks at.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int32, UInt8

from psa_jax.config import ConfigError
from psa_jax.data.examples.splits import Examples
from psa_jax.data.images import augment

_SEED = 2405  # of the splits
_TEST, _VALIDATION = 0.2, 0.1  # shares of a class
_MOMENTS = 500  # pictures of a prepared set that these are taken from


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

  def normalize(self, pixels: UInt8[Any, 'B S S C']) -> Float[Any, 'B S S C']:
    """Pixels as f32 numbers around 0."""
    return _normalize(pixels, self.moments)

  def rows(
    self, split: str, shape: tuple[int, int, int], *, crop: str, train: bool
  ) -> 'ArrayRows':
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
    size = pictures.pixels.shape[1:]
    if size != shape:
      raise ConfigError(
        f'the pictures of {self.manifest["source"]} are {size[0]} x '
        f'{size[1]} with {size[2]} channels; set model.image.size and '
        f'channels to that, not {shape[0]} and {shape[2]}'
      )
    return ArrayRows(pictures)

  def baselines(self, split: str) -> dict[str, float]:
    """Accuracy of always saying the most frequent training label."""
    counts = np.bincount(self.train.labels, minlength=len(self.classes))
    hits = getattr(self, split).labels == counts.argmax()
    return {'majority': float(hits.mean())}


class ArrayRows(Sequence[dict[str, np.ndarray]]):
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
    members = rng.permutation(np.flatnonzero(labels == label))
    test = max(1, round(_TEST * len(members)))
    held_out = test + max(1, round(_VALIDATION * len(members)))
    if held_out >= len(members):
      raise ConfigError(
        f'class {label} has {len(members)} pictures, too few for a training, a '
        'validation and a test split'
      )
    pieces = members[held_out:], members[test:held_out], members[:test]
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


class Picture(NamedTuple):
  """Pixels uint8 [h, w, C], a label, and where it is from."""

  pixels: np.ndarray
  label: int
  where: str


class PictureRows(Sequence):
  """Random access to a split; what is not cropped has the model's size."""

  def __init__(self, pictures: Any, shape: tuple[int, int, int], how: str):
    """Of pictures, the model's shape, and `none`, `centre` or `raw`."""
    self._pictures, self._shape, self._how = pictures, shape, how

  def __len__(self) -> int:
    return len(self._pictures)

  def __getitem__(self, i):
    picture = self._pictures[int(i)]
    pixels = picture.pixels
    if pixels.shape[-1] != self._shape[-1]:
      raise ConfigError(
        f'{picture.where} has {pixels.shape[-1]} channels; set '
        f'model.image.channels to that, not {self._shape[-1]}'
      )
    if self._how == 'centre':
      whole = augment.to_pillow(pixels)
      pixels = augment.to_array(augment.centre(whole, size=self._shape[0]))
    elif self._how == 'none' and pixels.shape != self._shape:
      raise ConfigError(
        f'{picture.where} is {pixels.shape[0]} x {pixels.shape[1]} and '
        f'model.image.size is {self._shape[0]}; set '
        'data.augment.crop=resized for pictures of other sizes'
      )
    return {
      'images': pixels,
      'labels': np.int32(picture.label),
      'weights': np.ones(1, np.float32),
    }


class PreparedImages(NamedTuple):
  """A set that `ImageSet` would be too large for; same methods."""

  examples: Examples
  classes: tuple[str, ...]
  moments: tuple[np.ndarray, np.ndarray]

  @property
  def manifest(self) -> dict:
    """What it is; plain JSON values."""
    return self.examples.manifest

  def rows(
    self, split: str, shape: tuple[int, int, int], *, crop: str, train: bool
  ) -> PictureRows:
    """The pictures of a split; `crop` as in `data.augment`."""
    how = 'none'
    if crop == 'resized':
      how = 'raw' if train else 'centre'
    return PictureRows(self.examples.split(split), shape, how)

  def normalize(self, pixels: UInt8[Any, 'B S S C']) -> Float[Any, 'B S S C']:
    """Pixels as f32 numbers around 0."""
    return _normalize(pixels, self.moments)

  def baselines(self, split: str) -> dict[str, float]:
    """Accuracy of guessing; counting all labels would read all pictures."""
    del split
    return {'chance': 1 / len(self.classes)}


def moments(pictures: Any) -> tuple[np.ndarray, np.ndarray]:
  """Mean and standard deviation of each channel, of the first pictures."""
  count, total, square = 0, 0.0, 0.0
  for i in range(min(_MOMENTS, len(pictures))):
    pixels = pictures[i].pixels.astype(np.float64)
    pixels = pixels.reshape(-1, pixels.shape[-1])
    count, total = count + len(pixels), total + pixels.sum(0)
    square = square + (pixels**2).sum(0)
  mean = np.asarray(total) / count
  spread = np.sqrt(np.maximum(np.asarray(square) / count - mean**2, 0))
  return mean, np.where(spread > 0, spread, 1)


def _normalize(pixels, moments):
  # NumPy's constants: importing this module must not import JAX.
  mean, spread = (np.asarray(x, np.float32)[None, None, None] for x in moments)
  return (pixels.astype(np.float32) - mean) / spread
