"""The user's own files."""

import os

import pytest

from psa_jax.config import ConfigError, DataConfig
from psa_jax.data import sources
from tests.data.sources.test_packaged import content_hash


def write(folder, **texts):
  for name, content in texts.items():
    (folder / f'{name}.txt').write_bytes(content)
  return f'files:{folder}/*.txt'


def load_files(pattern):
  config = DataConfig(source=pattern)
  return sources.load(config, sources.DOCUMENTS)


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
  copies = load_files(f'files:{tmp_path}/moved/*')
  assert copies.manifest['sha256'] == first.manifest['sha256']
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
