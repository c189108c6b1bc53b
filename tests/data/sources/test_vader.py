"""The archive of `vader3`."""

import io
import tarfile

import pytest

from psa_jax.config import ConfigError, DataConfig
from psa_jax.data import sources


def write_archive(path, rows=60):
  """An archive in an archive, as the package's source distribution."""
  inner = io.BytesIO()
  with tarfile.open(fileobj=inner, mode='w:gz') as archive:
    for name in ('movieReviewSnippets', 'tweets', 'amazonReviewSnippets',
                 'nytEditorialSnippets'):  # fmt: skip
      lines = [f'{i}_{i % 3}\t{i % 9 - 4}.0\tso {i} \xb4' for i in range(rows)]
      content = '\n'.join(lines).encode('latin-1')
      member = tarfile.TarInfo(f'hutto_ICWSM_2014/{name}_GroundTruth.txt')
      member.size = len(content)
      archive.addfile(member, io.BytesIO(content))
  path.parent.mkdir(parents=True, exist_ok=True)
  with tarfile.open(path, 'w:gz') as archive:
    member = tarfile.TarInfo('v/additional_resources/hutto_ICWSM_2014.tar.gz')
    member.size = len(inner.getvalue())
    archive.addfile(member, io.BytesIO(inner.getvalue()))


def load(folder):
  config = DataConfig(source='vader3', data_dir=str(folder))
  return sources.load(config, sources.LABELLED)


def test_sentiment_from_the_prepared_archive(tmp_path):
  with pytest.raises(ConfigError, match='prepare --name=vader3 --data_dir='):
    load(tmp_path)
  write_archive(tmp_path / 'vader3' / 'vaderSentiment-3.3.2.tar.gz')
  data = load(tmp_path)
  every = [e for s in ('train', 'validation', 'test')
           for e in data.examples.split(s)]  # fmt: skip
  assert len(every) == 240 and data.classes[0] == 'negative'
  assert [e.label for e in every if e.text.startswith(b'so 3 ')] == [0] * 4
  assert [e.label for e in every if e.text.startswith(b'so 4 ')] == [1] * 4
  path = tmp_path / 'vader3' / 'vaderSentiment-3.3.2.tar.gz'
  path.write_bytes(b'no archive')
  with pytest.raises(ConfigError, match='delete it and prepare'):
    load(tmp_path)
