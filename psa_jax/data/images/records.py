"""Pictures of any size from a prepared TFDS set, read one at a time.

The features are `image` and `data.label_key`. Mean and standard deviation of
the channels are those of the first 500 training pictures.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from psa_jax.config import ConfigError, DataConfig
from psa_jax.data import augment, examples, labelled

IMAGE = 'image'
_MOMENTS = 500


class Picture(NamedTuple):
  """Pixels uint8 [h, w, C], a label, and where it is from."""

  pixels: np.ndarray
  label: int
  where: str


class Rows(Sequence):
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
  """A set that `data.images.ImageSet` would be too large for; same methods."""

  examples: examples.Examples
  classes: tuple[str, ...]
  moments: tuple[np.ndarray, np.ndarray]

  @property
  def manifest(self) -> dict:
    """What it is; plain JSON values."""
    return self.examples.manifest

  def rows(
    self, split: str, shape: tuple[int, int, int], *, crop: str, train: bool
  ) -> Rows:
    """The pictures of a split; `crop` as in `data.augment`."""
    how = 'none'
    if crop == 'resized':
      how = 'raw' if train else 'centre'
    return Rows(self.examples.split(split), shape, how)

  def normalize(self, pixels: UInt8[Array, 'B S S C']) -> Float[Array, '...']:
    """Pixels as f32 numbers around 0."""
    mean, spread = (jnp.asarray(x, jnp.float32) for x in self.moments)
    mean, spread = mean[None, None, None], spread[None, None, None]
    return (pixels.astype(jnp.float32) - mean) / spread

  def baselines(self, split: str) -> dict[str, float]:
    """Accuracy of guessing; counting all labels would read all pictures."""
    del split
    return {'chance': 1 / len(self.classes)}


def load(name: str, config: DataConfig) -> PreparedImages:
  """The pictures of `data.source=tfds:<name>`.

  Raises:
    ConfigError: no such set, not prepared, or without pictures and labels.
  """

  def example(where: str, i: int, record: Any) -> Picture:
    label = int(record[config.label_key])
    labelled.check(labelled.Labelled(b'', label), len(classes), where, i)
    pixels = np.asarray(record[IMAGE], np.uint8)
    return Picture(pixels, label, f'{where}: picture {i}')

  keys = (IMAGE, config.label_key)
  splits, features = examples.from_tfds(
    name, config, keys, example, label_key=config.label_key
  )
  classes = tuple(
    labelled.class_names(name, features[config.label_key], config)
  )
  return PreparedImages(splits, classes, _moments(splits.train))


def _moments(pictures: Any) -> tuple[np.ndarray, np.ndarray]:
  """Mean and standard deviation of each channel, of what comes first."""
  count, total, square = 0, 0.0, 0.0
  for i in range(min(_MOMENTS, len(pictures))):
    pixels = pictures[i].pixels.astype(np.float64)
    pixels = pixels.reshape(-1, pixels.shape[-1])
    count, total = count + len(pixels), total + pixels.sum(0)
    square = square + (pixels**2).sum(0)
  mean = np.asarray(total) / count
  spread = np.sqrt(np.maximum(np.asarray(square) / count - mean**2, 0))
  return mean, np.where(spread > 0, spread, 1)
