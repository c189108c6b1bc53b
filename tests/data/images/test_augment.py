"""Augmentation on the host: what each operation does to a picture."""

import numpy as np
import pytest
from PIL import Image

from psa_jax.config import AugmentConfig
from psa_jax.data.images import augment

EVERYTHING = AugmentConfig(
  crop='resized', flip=True, ops=2, magnitude=9.0, mixup=0.8, cutmix=1.0
)


def picture(size=12, seed=0):
  rng = np.random.default_rng(seed)
  smooth = rng.integers(0, 255, (4, 4, 3)).astype(np.uint8)
  return Image.fromarray(smooth).resize((size, size), Image.Resampling.BICUBIC)


@pytest.mark.parametrize('number', range(len(augment.OPERATIONS)))
@pytest.mark.parametrize('channels', [1, 3])
def test_operations_grow_with_the_magnitude(number, channels):
  before = picture() if channels == 3 else picture().convert('L')
  operation = augment.OPERATIONS[number]

  def moved(amount, sign):
    after = operation(before, amount, sign)
    assert after.size == before.size and after.mode == before.mode
    change = np.asarray(after).astype(int) - np.asarray(before)
    return np.abs(change).mean()

  for sign in (1, -1):
    none, some, most = (moved(amount, sign) for amount in (0.0, 0.4, 1.0))
    if number in (1, 2):  # autocontrast and equalize have no magnitude
      assert none == some == most
    elif number == 0 or (number == 6 and channels == 1):  # colour of grey
      assert most == 0
    else:
      assert none < 0.6 and none <= some <= most > 1


def test_augmentation_is_its_random_numbers():
  change = augment.Augment(EVERYTHING, 8)
  row = {'images': np.asarray(picture()), 'labels': np.int32(1)}
  first, again, other = (
    change(row, np.random.default_rng(seed)) for seed in (1, 1, 2)
  )
  assert first['images'].shape == (8, 8, 3) and first['labels'] == 1
  np.testing.assert_array_equal(first['images'], again['images'])
  assert (first['images'] != other['images']).any()


def test_crops():
  rng = np.random.default_rng(0)
  flat = Image.fromarray(np.full((16, 16, 3), 200, np.uint8))
  means = {np.asarray(augment.padded_crop(flat, rng)).mean() for _ in range(20)}
  assert max(means) <= 200 and len(means) > 5
  for _ in range(20):
    crop = np.asarray(augment.resized_crop(flat, rng, size=8))
    assert crop.shape == (8, 8, 3) and (crop == 200).all()
  wide = np.zeros((16, 32, 3), np.uint8)
  wide[:, 9:23] = 255  # the middle 14 of 16 columns and rows
  whole = np.asarray(augment.centre(Image.fromarray(wide), size=14))
  assert (whole == 255).all()
