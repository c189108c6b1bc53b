"""Pictures in memory: how they are split, what is refused."""

import dataclasses

import numpy as np
import pytest

from psa_jax.config import ConfigError
from psa_jax.data.images import sets


def arrays(per_class=10, classes=3):
  rng = np.random.default_rng(0)
  labels = np.repeat(np.arange(classes), per_class)
  pixels = rng.integers(0, 256, (len(labels), 4, 4, 1)).astype(np.uint8)
  return pixels, labels


def test_splits_are_disjoint_complete_and_the_same_every_time():
  pixels, labels = arrays()
  pixels[:, 0, 0, 0] = np.arange(len(labels))  # a name for each
  images, again = (
    sets.from_arrays(pixels, labels, manifest={}) for _ in range(2)
  )
  names = []
  for split in ('train', 'validation', 'test'):
    one, two = getattr(images, split), getattr(again, split)
    np.testing.assert_array_equal(one.pixels, two.pixels)
    names += [*one.pixels[:, 0, 0, 0]]
    np.testing.assert_array_equal(one.labels, labels[one.pixels[:, 0, 0, 0]])
  assert sorted(names) == list(range(len(labels)))
  counts = [np.bincount(x.labels) for x in (images.validation, images.test)]
  np.testing.assert_array_equal(counts, [[1] * 3, [2] * 3])


def test_the_majority_is_that_of_training():
  pixels, labels = arrays()
  keep = np.concatenate([np.arange(30), np.full(60, 29)])  # class 2 is large
  images = sets.from_arrays(pixels[keep], labels[keep], manifest={})
  share = (images.test.labels == 2).mean()
  assert share > 0.6 and images.baselines('test') == {'majority': share}


def test_rows():
  pictures = sets.Pictures(*arrays())
  rows = sets.ArrayRows(pictures)
  assert len(rows) == 30
  row = rows[11]
  np.testing.assert_array_equal(row['images'], pictures.pixels[11])
  assert row['labels'] == 1 and row['weights'].tolist() == [1.0]
  with pytest.raises(IndexError):
    rows[30]


def test_bad_labels_are_refused():
  pixels, labels = arrays()
  with pytest.raises(ConfigError, match='must be 0, 1, 2'):
    sets.from_arrays(pixels, labels - 1, manifest={})
  with pytest.raises(ConfigError, match='must be 0, 1, 2'):
    sets.from_arrays(pixels[:0], labels[:0], manifest={})
  with pytest.raises(ConfigError, match='class 1 has 2 pictures, too few'):
    sets.from_arrays(pixels[:12], labels[:12], manifest={})


def test_the_set_is_immutable():
  images = sets.from_arrays(*arrays(), manifest={})
  with pytest.raises(dataclasses.FrozenInstanceError):
    images.classes = ()
