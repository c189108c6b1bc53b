"""`ddtp_en_fr`, `ddtp_en_de` and so on: Debian's descriptions, translated.

Descriptions of Debian's packages and their translations by the Debian
Description Translation Project, paragraph by paragraph. `python -m
psa_jax.data.prepare --name=ddtp_en_fr` fetches them by apt on a Debian or
Ubuntu; their licences are the packages', so they are not passed on here.
"""

import functools
import hashlib
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from psa_jax.config import ConfigError, DataConfig, RunError
from psa_jax.data import cache
from psa_jax.data.examples.pairs import Pair, PairSet, from_pairs
from psa_jax.data.sources import fetch
from psa_jax.data.sources.registry import PAIRS, Source, register

PAIRS_FILE = 'pairs.tsv'  # of a prepared set: package, source, target
_NAME = re.compile(r'ddtp_en_([a-z]{2,3}(?:_[A-Z]{2})?)')


def load(config: DataConfig) -> PairSet:
  """The paragraphs of a language.

  Raises:
    ConfigError: they were not fetched, or are something else.
  """
  path = cache.data_dir(config) / config.source / PAIRS_FILE
  try:
    content = path.read_bytes()
  except OSError as e:
    option = f' --data_dir={config.data_dir}' if config.data_dir else ''
    raise ConfigError(
      f'data.source {config.source} is not in {path.parent}; fetch it once, on '
      'a Debian or Ubuntu: python -m psa_jax.data.prepare '
      f'--name={config.source}{option}'
    ) from e
  manifest = {
    'source': config.source,
    'package': 'Debian Description Translation Project',
    'sha256': hashlib.sha256(content).hexdigest(),
  }
  return from_pairs(_lines(content, path), manifest)


def prepare(config: DataConfig) -> str:
  """Fetches a language by apt; see `fetch.into_cache`."""
  build = functools.partial(_download, config.source)
  return fetch.into_cache(config, build, kind=PAIRS)


def _lines(content: bytes, path: Path) -> Iterator[tuple[bytes, Pair]]:
  for i, line in enumerate(content.removesuffix(b'\n').split(b'\n')):
    fields = line.split(b'\t')
    if len(fields) != 3:
      raise ConfigError(
        f'{path}: line {i + 1} has {len(fields)} fields and not 3; prepare it '
        'again'
      )
    yield fields[0], Pair(*fields[1:])


def _download(name: str, path: Path) -> None:
  match = _NAME.fullmatch(name)
  assert match is not None
  language = match[1]
  with tempfile.TemporaryDirectory() as place:
    lists, cache = Path(place, 'lists'), Path(place, 'cache')
    (lists / 'partial').mkdir(parents=True)
    (cache / 'archives' / 'partial').mkdir(parents=True)
    where = (
      f'Acquire::Languages=en,{language}',
      f'Dir::State::lists={lists}',
      f'Dir::Cache={cache}',
    )
    options = [word for option in where for word in ('-o', option)]
    fetch.run(name, ['apt-get', '-q', *options, 'update'])
    texts = {}
    for tongue in ('en', language):
      paths = sorted(lists.glob(f'*_Translation-{tongue}*'))
      if not paths:
        raise RunError(
          f'{name}: the package archive has no descriptions in {tongue!r}; '
          'choose another language'
        )
      command = ['/usr/lib/apt/apt-helper', 'cat-file', *paths]
      texts[tongue] = fetch.run(name, command)
    lines = pairs(texts['en'], texts[language])
    with (path / PAIRS_FILE).open('wb') as f:
      for fields in lines:
        f.write(b'\t'.join(fields) + b'\n')


def pairs(english: bytes, other: bytes) -> Iterator[tuple[bytes, bytes, bytes]]:
  """(package, paragraph, its translation) of two lists of descriptions.

  Descriptions pair by the hash of the English one. Their first lines pair, and
  their paragraphs where both have equally many. What is the same in both is
  left untranslated, and left out; so is what was there before.

  Args:
    english, other: stanzas of apt's `Translation-<language>` files.
  """
  by_digest = {digest: texts for _, digest, texts in _stanzas(other)}
  written = set()
  for package, digest, texts in _stanzas(english):
    translations = by_digest.get(digest, [])
    if len(translations) != len(texts):
      translations, texts = translations[:1], texts[:1]
    for pair in zip(texts, translations, strict=True) if translations else ():
      if all(pair) and pair[0] != pair[1] and pair not in written:
        written.add(pair)
        yield package, *pair


def _stanzas(content: bytes) -> Iterator[tuple[bytes, bytes, list[bytes]]]:
  """(package, hash, [first line, paragraph, ...]) of every description."""
  for stanza in content.split(b'\n\n'):
    package = digest = b''
    paragraphs: list[bytes] = []
    for line in stanza.split(b'\n'):
      if line.startswith(b'Package: '):
        package = line[9:].strip()
      elif line.startswith(b'Description-md5: '):
        digest = line[17:].strip()
      elif line.startswith(b'Description-'):
        paragraphs = [line.partition(b': ')[2], b'']
      elif line.strip() == b'.':
        paragraphs.append(b'')
      elif line.startswith(b' ') and paragraphs:
        paragraphs[-1] += b' ' + line.strip()
    if digest and paragraphs:
      clean = [b' '.join(text.split()) for text in paragraphs]
      yield package, digest, clean


register(
  Source(
    'ddtp_en_<language>',
    yields={PAIRS: load},
    pattern=_NAME.pattern,
    prepare=prepare,
    lock="the signature of the archive that apt is set to, by apt's own keys",
  )
)
