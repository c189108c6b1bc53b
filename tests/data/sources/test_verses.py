"""Verses: numbers, genres, and two editions that say the same."""

import re

import numpy as np
import pytest

from psa_jax.config import DataConfig
from psa_jax.data import sources
from psa_jax.data.sources import verses


def test_verses_have_their_numbers_and_genres():
  edition = verses.read('asv')
  assert len(edition) == 31_086 and min(edition) == 1001001
  assert edition[1001001].startswith('In the beginning God created')
  assert verses.GENRES[verses.genre(44001001)] == 'history'  # Acts
  assert [verses.genre(book * 10**6) for book in range(1, 67)].count(6) == 1
  chapters = verses.chapters(edition)
  assert len(set(chapters.values())) == 1189 and chapters[1002001] == 1


def test_genres_in_three_splits_without_a_chapter_in_two():
  data = sources.load(DataConfig(source='verse_genre'), sources.LABELLED)
  splits = data.examples
  sizes = [len(x) for x in (splits.train, splits.validation, splits.test)]
  assert sum(sizes) == 31_086 and data.classes == verses.GENRES
  assert sizes == [data.manifest[n] for n in ('train', 'validation', 'test')]
  assert min(sizes[1:]) > 0.09 * 31_086
  texts = [{e.text for e in part} for part in (splits.train, splits.validation)]
  # What is in both is said in two chapters (2 Kings 19 is Isaiah 37).
  assert len(texts[0] & texts[1]) < 0.01 * len(texts[1])


def test_verses_pair_up():
  data = sources.load(DataConfig(source='asv_bbe'), sources.PAIRS)
  splits = data.examples
  count = sum(len(splits.split(s)) for s in ('train', 'validation', 'test'))
  assert count == 31_023
  pair = splits.validation[0]  # chapter 0 is Genesis 1
  assert pair.source.startswith(b'In the beginning God created')
  assert pair.target.startswith(b'At the first God made')


@pytest.mark.parametrize('edition', verses.EDITIONS)
def test_verses_are_cut_between_words(edition):
  texts = verses.read(edition)
  inside = [v for v in texts.values() if v[:1].islower()]
  assert len(inside) < 0.2 * len(texts)  # a sentence may go on in a verse
  marks = '.,;:!?()'
  broken = {v.split()[0].strip(marks) for v in inside} - {
    w.strip(marks) for v in texts.values() for w in v.split()[1:]
  }
  assert len(broken) < 20
  assert not any('\\' in v for v in texts.values())


def test_both_editions_say_the_same_to_the_end():
  old, basic = verses.read('asv'), verses.read('bbe')
  assert basic[66022021].startswith('The grace of the Lord Jesus')
  assert basic[24039009].startswith('Then Nebuzaradan')
  names = re.compile(r'(?<=[a-z,] )[A-Z][a-z]{4,}')
  both = [n for n in old if n in basic]

  def shared(numbers, others):
    shares = [
      np.mean([name in basic[m] for name in there])
      for n, m in zip(numbers, others, strict=True)
      if (there := set(names.findall(old[n])))
    ]
    return np.mean(shares)

  for i in range(0, len(both), 5000):
    part = both[i : i + 5000]
    # A drift of one verse would already be seen in names that come once.
    assert shared(part, part) > 1.5 * shared(part, part[3:] + part[:3])
