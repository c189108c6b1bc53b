"""Pictures of packages: what is read, how it is split, what is refused."""

import dataclasses
import gzip

import jax.numpy as jnp
import numpy as np
import pytest

from psa_jax.config import ConfigError, DataConfig
from psa_jax.data import images


@pytest.mark.parametrize(
  ('source', 'size', 'counts'),
  [('mnist5k', 28, (3500, 500, 1000)), ('digits', 8, (1259, 179, 359))],
)
def test_packaged_sets(source, size, counts):
  found = images.load(DataConfig(source=source))
  splits = found.train, found.validation, found.test
  got = tuple(len(x.labels) for x in splits)
  assert got == counts
  assert [found.manifest[x] for x in ('train', 'validation', 'test')] == [*got]
  for split in splits:
    assert split.pixels.shape[1:] == (size, size, 1)
    assert split.pixels.dtype == np.uint8 and split.pixels.max() == 255
    assert set(split.labels) == set(range(10))
  every = np.concatenate([x.pixels for x in splits]).reshape(sum(got), -1)
  assert len(np.unique(every, axis=0)) > 0.99 * len(every)
  x = found.normalize(jnp.asarray(found.train.pixels))
  np.testing.assert_allclose([x.mean(), x.std()], [0, 1], atol=1e-3)


def test_labels_belong_to_their_pictures():
  """The nearest mean of a class knows most of the test split."""
  found = images.load(DataConfig(source='digits'))
  means = np.stack(
    [found.train.pixels[found.train.labels == c].mean(0) for c in range(10)]
  )
  apart = found.test.pixels[:, None].astype(float) - means[None]
  nearest = (apart**2).sum((2, 3, 4)).argmin(1)
  assert (nearest == found.test.labels).mean() > 0.85


def arrays(per_class=10, classes=3):
  rng = np.random.default_rng(0)
  labels = np.repeat(np.arange(classes), per_class)
  pixels = rng.integers(0, 256, (len(labels), 4, 4, 1)).astype(np.uint8)
  return pixels, labels


def test_splits_are_disjoint_complete_and_the_same_every_time():
  pixels, labels = arrays()
  pixels[:, 0, 0, 0] = np.arange(len(labels))  # a name for each
  found, again = (
    images.from_arrays(pixels, labels, manifest={}) for _ in range(2)
  )
  names = []
  for split in ('train', 'validation', 'test'):
    one, two = getattr(found, split), getattr(again, split)
    np.testing.assert_array_equal(one.pixels, two.pixels)
    names += [*one.pixels[:, 0, 0, 0]]
    np.testing.assert_array_equal(one.labels, labels[one.pixels[:, 0, 0, 0]])
  assert sorted(names) == list(range(len(labels)))
  counts = [np.bincount(x.labels) for x in (found.validation, found.test)]
  np.testing.assert_array_equal(counts, [[1] * 3, [2] * 3])


def test_the_majority_is_that_of_training():
  pixels, labels = arrays()
  keep = np.concatenate([np.arange(30), np.full(60, 29)])  # class 2 is large
  found = images.from_arrays(pixels[keep], labels[keep], manifest={})
  share = (found.test.labels == 2).mean()
  assert share > 0.6 and found.baselines('test') == {'majority': share}


def test_rows():
  pictures = images.Pictures(*arrays())
  rows = images.Rows(pictures)
  assert len(rows) == 30
  row = rows[11]
  np.testing.assert_array_equal(row['images'], pictures.pixels[11])
  assert row['labels'] == 1 and row['weights'].tolist() == [1.0]
  with pytest.raises(IndexError):
    rows[30]


def test_bad_labels_are_refused():
  pixels, labels = arrays()
  with pytest.raises(ConfigError, match='must be 0, 1, 2'):
    images.from_arrays(pixels, labels - 1, manifest={})
  with pytest.raises(ConfigError, match='must be 0, 1, 2'):
    images.from_arrays(pixels[:0], labels[:0], manifest={})
  with pytest.raises(ConfigError, match='class 1 has 2 pictures, too few'):
    images.from_arrays(pixels[:12], labels[:12], manifest={})


def packaged(monkeypatch, tmp_path, text, **changes):
  """`digits` from a file with this text."""
  path = tmp_path / 'digits.csv.gz'
  path.write_bytes(gzip.compress(text.encode()))
  monkeypatch.setattr(images, '_find', lambda name, package: path)
  package = images._PACKAGES['digits']._replace(**changes)
  monkeypatch.setitem(images._PACKAGES, 'digits', package)
  return DataConfig(source='digits')


@pytest.mark.parametrize(
  ('text', 'words'),
  [
    ('', 'cannot be read'),
    ('1,2,3\n', 'cannot be read'),
    ('a,b\n', 'cannot be read'),
    (','.join(['99'] * 64 + ['0']) + '\n', 'not between 0 and 16'),
  ],
)
@pytest.mark.filterwarnings('ignore:loadtxt. input contained no data')
def test_a_broken_file_is_named(text, words, monkeypatch, tmp_path):
  config = packaged(monkeypatch, tmp_path, text)
  with pytest.raises(ConfigError, match=f'digits.csv.gz.*{words}.*reinstall'):
    images.load(config)


def test_what_is_missing_is_named(monkeypatch):
  with pytest.raises(ConfigError, match="'sotu' has no pictures; choose from"):
    images.load(DataConfig(source='sotu'))
  other = images._PACKAGES['digits']._replace(package='no-such-package')
  monkeypatch.setitem(images._PACKAGES, 'digits', other)
  with pytest.raises(ConfigError, match='pip install no-such-package'):
    images.load(DataConfig(source='digits'))
  other = other._replace(package='numpy', file='no/such/file')
  monkeypatch.setitem(images._PACKAGES, 'digits', other)
  with pytest.raises(ConfigError, match='installed without no/such/file'):
    images.load(DataConfig(source='digits'))


def test_the_set_is_immutable():
  found = images.from_arrays(*arrays(), manifest={})
  with pytest.raises(dataclasses.FrozenInstanceError):
    found.classes = ()
