"""Digits of packages: what is read, and what is refused."""

import gzip

import jax.numpy as jnp
import numpy as np
import pytest

from psa_jax.config import ConfigError, DataConfig
from psa_jax.data import sources
from psa_jax.data.sources import digits


def load(source):
  return sources.load(DataConfig(source=source), sources.IMAGES)


@pytest.mark.parametrize(
  ('source', 'size', 'counts'),
  [('mnist5k', 28, (3500, 500, 1000)), ('digits', 8, (1259, 179, 359))],
)
def test_packaged_sets(source, size, counts):
  images = load(source)
  splits = images.train, images.validation, images.test
  got = tuple(len(x.labels) for x in splits)
  assert got == counts
  assert [images.manifest[x] for x in ('train', 'validation', 'test')] == [*got]
  for split in splits:
    assert split.pixels.shape[1:] == (size, size, 1)
    assert split.pixels.dtype == np.uint8 and split.pixels.max() == 255
    assert set(split.labels) == set(range(10))
  every = np.concatenate([x.pixels for x in splits]).reshape(sum(got), -1)
  assert len(np.unique(every, axis=0)) > 0.99 * len(every)
  x = images.normalize(jnp.asarray(images.train.pixels))
  np.testing.assert_allclose([x.mean(), x.std()], [0, 1], atol=1e-3)


def test_labels_belong_to_their_pictures():
  """The nearest mean of a class knows most of the test split."""
  images = load('digits')
  means = np.stack(
    [images.train.pixels[images.train.labels == c].mean(0) for c in range(10)]
  )
  apart = images.test.pixels[:, None].astype(float) - means[None]
  nearest = (apart**2).sum((2, 3, 4)).argmin(1)
  assert (nearest == images.test.labels).mean() > 0.85


def packaged(monkeypatch, tmp_path, text, **changes):
  """`digits` from a file with this text."""
  path = tmp_path / 'digits.csv.gz'
  path.write_bytes(gzip.compress(text.encode()))
  monkeypatch.setattr(digits, '_find', lambda name, package: path)
  package = digits._PACKAGES['digits']._replace(**changes)
  monkeypatch.setitem(digits._PACKAGES, 'digits', package)


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
  packaged(monkeypatch, tmp_path, text)
  with pytest.raises(ConfigError, match=f'digits.csv.gz.*{words}.*reinstall'):
    load('digits')


def test_what_is_missing_is_named(monkeypatch):
  with pytest.raises(ConfigError, match="'sotu' has no images; choose one of"):
    load('sotu')
  other = digits._PACKAGES['digits']._replace(package='no-such-package')
  monkeypatch.setitem(digits._PACKAGES, 'digits', other)
  with pytest.raises(ConfigError, match='pip install no-such-package'):
    load('digits')
  other = other._replace(package='numpy', file='no/such/file')
  monkeypatch.setitem(digits._PACKAGES, 'digits', other)
  with pytest.raises(ConfigError, match='installed without no/such/file'):
    load('digits')
