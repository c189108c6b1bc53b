"""`vader3`: sentences with the sentiment that people gave them.

23,703 sentences from film reviews, tweets, product reviews and editorials with
the mean rating of twenty people (Hutto and Gilbert, ICWSM 2014): negative up to
-0.5, positive from 0.5, else neutral. They are in the source distribution of
vaderSentiment, which `python -m psa_jax.data.prepare --name=vader3` fetches
from the package index; the sentences belong to others, so they are not passed
on here. The archive is known by its hash, and nothing in it is run or unpacked
to disk.
"""

import hashlib
import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

from psa_jax.config import ConfigError, DataConfig
from psa_jax.data import cache
from psa_jax.data.examples.labelled import Labelled, LabelledSet, from_pairs
from psa_jax.data.sources import fetch, package_index
from psa_jax.data.sources.registry import LABELLED, Source, register

PROJECT, VERSION = 'vaderSentiment', '3.3.2'
PACKAGE = f'{PROJECT}=={VERSION}'
FILE = f'{PROJECT}-{VERSION}.tar.gz'
SHA256 = '5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9'
CLASSES = ('negative', 'neutral', 'positive')
# What reading an archive that is another one raises.
_DAMAGE = (tarfile.TarError, StopIteration, KeyError, ValueError)
_RATED = ('movieReview', 'tweets', 'amazonReview', 'nytEditorial')


def load(config: DataConfig) -> LabelledSet:
  """The sentences.

  Raises:
    ConfigError: they were not fetched, or are something else.
  """
  path = cache.data_dir(config) / 'vader3' / FILE
  try:
    content = path.read_bytes()
  except OSError as e:
    option = f' --data_dir={config.data_dir}' if config.data_dir else ''
    raise ConfigError(
      f'data.source vader3: there is no {path}; fetch it once: python -m '
      f'psa_jax.data.prepare --name=vader3{option}'
    ) from e
  digest = hashlib.sha256(content).hexdigest()
  if digest != SHA256:
    raise ConfigError(
      f'{path} is not the archive of {PACKAGE} (its sha256 is {digest}); '
      'delete it and prepare vader3 again'
    )
  manifest = {'source': 'vader3', 'package': PACKAGE, 'sha256': digest}
  return from_pairs(_sentences(content, path), CLASSES, manifest)


def prepare(config: DataConfig) -> str:
  """Fetches the archive; see `fetch.into_cache`."""
  return fetch.into_cache(config, _download, kind=LABELLED)


def _download(folder: Path) -> None:
  package_index.download('vader3', PROJECT, FILE, sha256=SHA256, folder=folder)


def _sentences(archive: bytes, path: Path) -> Iterator[tuple[str, Labelled]]:
  """Sentences by source and number; an archive in an archive."""
  try:
    with tarfile.open(fileobj=io.BytesIO(archive)) as outer:
      inner = next(
        member for member in outer if member.name.endswith('2014.tar.gz')
      )
      content = outer.extractfile(inner)
      assert content is not None
      with tarfile.open(fileobj=io.BytesIO(content.read())) as rated:
        for name in _RATED:
          yield from _rated(rated, name)
  except (*_DAMAGE, OSError, EOFError) as e:
    raise ConfigError(
      f'{path} is not the archive of {PACKAGE} ({e}); delete it and prepare '
      'vader3 again'
    ) from e


def _rated(archive: tarfile.TarFile, name: str):
  stem = name if name == 'tweets' else f'{name}Snippets'
  names = [
    n for n in archive.getnames() if n.endswith(f'{stem}_GroundTruth.txt')
  ]
  content = archive.extractfile(names[0] if names else stem)
  assert content is not None
  for line in content.read().split(b'\n'):
    if not line:
      continue
    number, rating, text = line.split(b'\t', 2)
    if not text.strip():
      continue
    mean = float(rating)
    label = 0 if mean <= -0.5 else 2 if mean >= 0.5 else 1
    # Snippets of one review have its number: 12_3 is of review 12.
    group = number.partition(b'_')[0].decode()
    yield f'{name} {group}', Labelled(text.strip(), label)


register(
  Source(
    'vader3',
    yields={LABELLED: load},
    prepare=prepare,
    lock=f'sha256 {SHA256}',
  )
)
