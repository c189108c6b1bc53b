"""What training does to a picture on the host, by Pillow.

  crop      `none`: pictures have the model's size already. `pad`: a random
            window of the picture with an eighth of black on each side (CIFAR).
            `resized`: a random part of 8 to 100 % of the area and an aspect of
            3/4 to 4/3, brought to size (Inception, arXiv 1409.4842); evaluation
            takes the centre of the picture whose short side is size / 0.875.
  flip      left for right, every other time.
  ops       RandAugment (arXiv 1909.13719): so many of its 14 operations, chosen
            anew for every picture, each at `magnitude` of 10.

Random numbers come from the pipeline: they belong to a place in the stream, so
a run that goes on draws the same ones. Mixing pictures of a batch is done on
the device (`mixing.py`).
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageEnhance, ImageOps

from psa_jax.config import AugmentConfig

_AREA, _ASPECT = (0.08, 1.0), (3 / 4, 4 / 3)
_SHORT = 0.875  # of the short side is the centre that evaluation takes
_TRIES = 10
_GREY = 128  # what comes in from outside of a picture that is turned or moved


class Augment:
  """A row of the pipeline, its picture augmented."""

  def __init__(self, config: AugmentConfig, size: int):
    """For pictures that leave with `size` rows and columns."""
    self._config, self._size = config, size

  def __call__(
    self, row: dict[str, Any], rng: np.random.Generator
  ) -> dict[str, Any]:
    """The row with another picture in `images`."""
    config, picture = self._config, to_pillow(row['images'])
    if config.crop == 'pad':
      picture = padded_crop(picture, rng)
    elif config.crop == 'resized':
      picture = resized_crop(picture, rng, size=self._size)
    if config.flip and rng.random() < 0.5:
      picture = ImageOps.mirror(picture)
    for _ in range(config.ops):
      operation = OPERATIONS[rng.integers(len(OPERATIONS))]
      sign = 1 if rng.random() < 0.5 else -1
      picture = operation(picture, config.magnitude / 10, sign)
    return {**row, 'images': to_array(picture)}


def to_pillow(pixels: UInt8[np.ndarray, 'h w C']) -> Image.Image:
  """Of one or three channels."""
  return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def to_array(picture: Image.Image) -> UInt8[np.ndarray, 'h w C']:
  """The inverse of `to_pillow`."""
  pixels = np.asarray(picture)
  return pixels[..., None] if pixels.ndim == 2 else pixels


def padded_crop(picture: Image.Image, rng) -> Image.Image:
  """A window of the picture's size after padding with black."""
  width, height = picture.size
  pad = max(1, width // 8)
  wide = ImageOps.expand(picture, pad)
  x, y = (int(rng.integers(0, 2 * pad + 1)) for _ in range(2))
  return wide.crop((x, y, x + width, y + height))


def resized_crop(picture: Image.Image, rng, *, size: int) -> Image.Image:
  """A random part of the picture, brought to size."""
  width, height = picture.size
  for _ in range(_TRIES):
    area = width * height * rng.uniform(*_AREA)
    aspect = math.exp(rng.uniform(*map(math.log, _ASPECT)))
    w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    if 0 < w <= width and 0 < h <= height:
      x, y = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
      box = (x, y, x + w, y + h)
      return picture.resize((size, size), Image.Resampling.BICUBIC, box=box)
  return centre(picture, size=size)


def centre(picture: Image.Image, *, size: int) -> Image.Image:
  """What evaluation sees of a picture of any size."""
  width, height = picture.size
  side = min(width, height) * _SHORT
  x, y = (width - side) / 2, (height - side) / 2
  box = (x, y, x + side, y + side)
  return picture.resize((size, size), Image.Resampling.BICUBIC, box=box)


def _affine(picture: Image.Image, *matrix: int | float) -> Image.Image:
  fill = _GREY if picture.mode == 'L' else (_GREY,) * 3
  return picture.transform(
    picture.size,
    Image.Transform.AFFINE,
    matrix,
    Image.Resampling.BICUBIC,
    fillcolor=fill,
  )


def _enhance(kind: Callable[[Image.Image], Any]):
  def change(picture: Image.Image, amount: float, sign: int) -> Image.Image:
    return kind(picture).enhance(1 + sign * 0.9 * amount)

  return change


def _rotate(picture: Image.Image, amount: float, sign: int) -> Image.Image:
  fill = _GREY if picture.mode == 'L' else (_GREY,) * 3
  return picture.rotate(
    sign * 30 * amount, Image.Resampling.BICUBIC, fillcolor=fill
  )


def _posterize(picture: Image.Image, amount: float, sign: int) -> Image.Image:
  del sign
  return ImageOps.posterize(picture, 8 - round(4 * amount))


def _solarize(picture: Image.Image, amount: float, sign: int) -> Image.Image:
  del sign
  return ImageOps.solarize(picture, 256 - round(256 * amount))


# Of a picture, how much (0 to 1) and to which side. The ranges are timm's for
# `rand-m10-inc1`: stronger as the magnitude rises.
OPERATIONS: tuple[Callable[[Image.Image, float, int], Image.Image], ...] = (
  lambda picture, amount, sign: picture,
  lambda picture, amount, sign: ImageOps.autocontrast(picture),
  lambda picture, amount, sign: ImageOps.equalize(picture),
  _rotate,
  _posterize,
  _solarize,
  _enhance(ImageEnhance.Color),
  _enhance(ImageEnhance.Contrast),
  _enhance(ImageEnhance.Brightness),
  _enhance(ImageEnhance.Sharpness),
  lambda p, amount, sign: _affine(p, 1, sign * 0.3 * amount, 0, 0, 1, 0),
  lambda p, amount, sign: _affine(p, 1, 0, 0, sign * 0.3 * amount, 1, 0),
  lambda p, amount, sign: _affine(
    p, 1, 0, sign * 0.45 * amount * p.size[0], 0, 1, 0
  ),
  lambda p, amount, sign: _affine(
    p, 1, 0, 0, 0, 1, sign * 0.45 * amount * p.size[1]
  ),
)
