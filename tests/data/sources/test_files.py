"""The user's own files."""

import bz2
import gzip
import io
import lzma
import os
import tarfile
import zipfile

import pytest

from psa_jax.config import ConfigError, DataConfig
from psa_jax.data import sources
from psa_jax.data.sources import compressed, matching
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
    f'files:{tmp_path}/broken': "cannot read '.*broken': No such file",
    f'files:{tmp_path}/*.txt': r'all matching files \(1\) are empty',
    f'files:{tmp_path}/one.txt1': 'the only file holds 1 bytes',
  }
  for pattern, message in cases.items():
    with pytest.raises(ConfigError, match=message) as e:
      list(load_files(pattern).train)
    assert '\n' not in str(e.value)


def test_links_to_a_file_are_one_document(tmp_path):
  """Else what is held out is in training as well."""
  folder = tmp_path / 'set'
  folder.mkdir()
  pattern = write(folder, **{f'n{i:02}': b'%d' % i for i in range(21)})
  plain = load_files(pattern)
  for i in range(21):
    (folder / f'a{i:02}.txt').symlink_to(f'n{i:02}.txt')
    os.link(folder / f'n{i:02}.txt', folder / f'z{i:02}.txt')
  linked = load_files(pattern)
  assert linked.manifest == plain.manifest
  assert not set(linked.train) & set(linked.validation)


def test_loops_of_links_end(tmp_path):
  folder = tmp_path / 'set'
  (folder / 'deep').mkdir(parents=True)
  write(folder, a=b'alpha', b=b'beta')
  write(folder / 'deep', c=b'gamma')
  pattern = f'files:{folder}/**/*.txt'
  plain = load_files(pattern)
  for name in ('1', '2', 'z3'):
    (folder / name).symlink_to('.')
    (folder / 'deep' / name).symlink_to('..')
  looped = load_files(pattern)
  assert looped.manifest == plain.manifest
  assert list(looped.validation) == [b'alpha']
  assert list(looped.train) == [b'beta', b'gamma']
  assert len(matching.files(f'{folder}/**')) == 3


def test_links_to_elsewhere_are_followed(tmp_path):
  for name in ('set', 'store', 'store/more'):
    (tmp_path / name).mkdir()
  write(tmp_path / 'store', a=b'1', b=b'2')
  write(tmp_path / 'store' / 'more', c=b'3')
  (tmp_path / 'set' / 'x').symlink_to(tmp_path / 'store')
  (tmp_path / 'set' / 'y.txt').symlink_to(tmp_path / 'store' / 'b.txt')
  (tmp_path / 'set' / 'gone').symlink_to(tmp_path / 'nowhere')
  found = matching.files(f'{tmp_path}/set/**/*.txt')
  names = [os.path.relpath(file.path, tmp_path / 'set') for file in found]
  assert names == ['x/a.txt', 'x/b.txt', 'x/more/c.txt']
  # One folder, but another place in the pattern.
  assert len(matching.files(f'{tmp_path}/**/set/x/*.txt')) == 2


def test_names_that_look_like_patterns(tmp_path):
  for name in ('[ab]', 'a', 'a*b', '.hidden'):
    (tmp_path / name).mkdir()
    write(tmp_path / name, **{'1': name.encode(), '2': b'x'})
  for name in ('[ab]', 'a*b', '.hidden'):
    source = load_files(f'files:{tmp_path}/{name}/*.txt')
    assert list(source.validation) == [name.encode()]
  assert len(matching.files(f'{tmp_path}/*/*.txt')) == 6
  assert len(matching.files(f'{tmp_path}/**/1.txt')) == 3
  with pytest.raises(ConfigError, match=r'no file; \[ begins a set of letters'):
    load_files(f'files:{tmp_path}/[c]/*.txt')


def test_names_that_are_not_utf8(tmp_path):
  for i, name in enumerate((b'a\xff', b'b\n', b'c \xed\xa0\x80')):
    with open(os.fsencode(tmp_path) + b'/' + name + b'.txt', 'wb') as f:
      f.write(b'%d' % i)
  assert list(load_files(f'files:{tmp_path}/*.txt').train) == [b'1', b'2']
  for name in ('a\udcff*', 'a\0b', '~nosuchuser/*.txt'):
    with pytest.raises(ConfigError, match='source: ') as e:
      load_files(f'files:{name}')
    assert '\n' not in str(e.value) and str(e.value).isascii()


def test_what_is_no_file_is_refused(tmp_path):
  os.mkfifo(tmp_path / 'pipe.txt')
  with pytest.raises(ConfigError, match="pipe.txt' is neither a file nor a f"):
    load_files(f'files:{tmp_path}/*.txt')


@pytest.mark.parametrize(
  ('suffix', 'compress'),
  [('.gz', gzip.compress), ('.bz2', bz2.compress), ('.xz', lzma.compress)],
)
def test_compressed_files_are_read_as_their_text(tmp_path, suffix, compress):
  texts = {f'{i}': b'%d' % i * 1000 for i in range(12)}
  plain = load_files(write(tmp_path, **texts)).manifest
  for name, text in texts.items():
    (tmp_path / f'{name}.txt').write_bytes(compress(text))  # no suffix says so
  (tmp_path / '5.txt').write_bytes(compress(b'5' * 600) + compress(b'5' * 400))
  (tmp_path / f'empty.txt{suffix}').write_bytes(compress(b''))
  assert load_files(f'files:{tmp_path}/*.txt*').manifest == {
    **plain,
    'source': f'files:{tmp_path}/*.txt*',
  }
  single = tmp_path / f'one{suffix}'
  single.write_bytes(compress(b'0123456789'))
  assert list(load_files(f'files:{single}').validation) == [b'9']


def archive(kind):
  made = io.BytesIO()
  if kind == 'zip':
    with zipfile.ZipFile(made, 'w') as z:
      z.writestr('a', 'text')
  else:
    with tarfile.open(fileobj=made, mode='w') as t:
      t.addfile(tarfile.TarInfo('a'))
  return made.getvalue()


def test_what_is_not_decompressed_is_refused_by_name(tmp_path, monkeypatch):
  broken = gzip.compress(os.urandom(5000))
  cases = {
    'a.txt': (archive('zip'), r"a.txt' is a zip file, .* unpack it \(unzip\)"),
    'b': (b'\x28\xb5\x2f\xfd....', 'zstd file, which is not read'),
    'c.tgz': (gzip.compress(archive('tar')), 'is a tar archive'),
    'd.tar': (archive('tar'), 'is a tar archive'),
    'e.gz': (gzip.compress(gzip.compress(b'x')), 'a gzip file in a gzip file'),
    'f.gz': (b'plain text', 'is no gzip file, as its name says'),
    'g.gz': (broken[:3000], 'cannot be decompressed: Compressed file ended'),
    'h.gz': (broken[:3000] + b'?' * 3000, 'cannot be decompressed: '),
  }
  for name, (content, message) in cases.items():
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
      load_files(f'files:{tmp_path / name}')
  monkeypatch.setattr(compressed, 'LARGEST', 10**6)
  bomb = tmp_path / 'bomb.txt'
  bomb.write_bytes(gzip.compress(bytes(10**6 + 1)))
  with pytest.raises(ConfigError, match='to more than 1,000,000 bytes; unpack'):
    load_files(f'files:{bomb}')


def test_a_text_may_begin_like_a_format(tmp_path):
  pattern = write(tmp_path, a=b'BZh9 is text', b=b'PK is too', c=b'\x1f\x8b')
  assert len(load_files(pattern).train) == 2


def test_a_file_without_characters_is_cut_at_its_tenth(tmp_path):
  """Continuation bytes only: there is no character to cut at."""
  source = load_files(write(tmp_path, only=b'\x80' * 100))
  assert [len(part[0]) for part in source.splits] == [90, 10]
