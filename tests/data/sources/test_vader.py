"""The archive of `vader3`."""

import hashlib
import io
import tarfile

import pytest

from psa_jax.config import ConfigError, DataConfig
from psa_jax.data import sources
from psa_jax.data.sources import vader


def write_archive(path, rows=60, newline='\n', odd=''):
  """An archive in an archive, as the package's source distribution.

  Returns:
    Its sha256.
  """
  inner = io.BytesIO()
  with tarfile.open(fileobj=inner, mode='w:gz') as archive:
    for name in ('movieReviewSnippets', 'tweets', 'amazonReviewSnippets',
                 'nytEditorialSnippets'):  # fmt: skip
      lines = [
        f'{i}_{i % 3}\t{i % 9 - 4}.0\tso {i} {odd} \xb4' for i in range(rows)
      ]
      content = newline.join(lines).encode('latin-1')
      member = tarfile.TarInfo(f'hutto_ICWSM_2014/{name}_GroundTruth.txt')
      member.size = len(content)
      archive.addfile(member, io.BytesIO(content))
  path.parent.mkdir(parents=True, exist_ok=True)
  with tarfile.open(path, 'w:gz') as archive:
    member = tarfile.TarInfo('v/additional_resources/hutto_ICWSM_2014.tar.gz')
    member.size = len(inner.getvalue())
    archive.addfile(member, io.BytesIO(inner.getvalue()))
    program = b'raise SystemExit("this code was run")'
    member = tarfile.TarInfo('v/setup.py')
    member.size = len(program)
    archive.addfile(member, io.BytesIO(program))
  return hashlib.sha256(path.read_bytes()).hexdigest()


def load(folder):
  config = DataConfig(source='vader3', data_dir=str(folder))
  return sources.load(config, sources.LABELLED)


def test_sentiment_from_the_prepared_archive(tmp_path, monkeypatch):
  with pytest.raises(ConfigError, match='prepare --name=vader3 --data_dir='):
    load(tmp_path)
  path = tmp_path / 'vader3' / 'vaderSentiment-3.3.2.tar.gz'
  digest = write_archive(path)
  with pytest.raises(ConfigError, match=f'its sha256 is {digest}'):
    load(tmp_path)  # an archive, but not the one that is meant
  monkeypatch.setattr(vader, 'SHA256', digest)
  data = load(tmp_path)
  every = [e for s in ('train', 'validation', 'test')
           for e in data.examples.split(s)]  # fmt: skip
  assert len(every) == 240 and data.classes[0] == 'negative'
  assert [e.label for e in every if e.text.startswith(b'so 3 ')] == [0] * 4
  assert [e.label for e in every if e.text.startswith(b'so 4 ')] == [1] * 4
  path.write_bytes(b'no archive')
  digest = hashlib.sha256(b'no archive').hexdigest()
  monkeypatch.setattr(vader, 'SHA256', digest)
  with pytest.raises(ConfigError, match='delete it and prepare'):
    load(tmp_path)


def test_only_a_new_line_ends_a_sentence(tmp_path, monkeypatch):
  path = tmp_path / 'vader3' / 'vaderSentiment-3.3.2.tar.gz'
  for newline in ('\n', '\r\n'):
    digest = write_archive(path, newline=newline, odd='\r\f\x85')
    monkeypatch.setattr(vader, 'SHA256', digest)
    texts = [example.text for example in load(tmp_path).examples.train]
    assert all(text.endswith(b'\r\f\x85 \xb4') for text in texts)
  monkeypatch.setattr(vader, 'SHA256', write_archive(path, newline='\nx\n'))
  with pytest.raises(ConfigError, match='not the archive'):
    load(tmp_path)
