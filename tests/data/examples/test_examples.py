"""Labelled texts, tagged words and translations, and their rows."""

import numpy as np
import pytest

from psa_jax.config import ConfigError
from psa_jax.data.examples import labelled, pairs, splits, tagged
from psa_jax.data.text.tokenizer import ByteTokenizer


@pytest.mark.parametrize(
  ('pair', 'words'),
  [
    (labelled.Labelled(b'text', 3), 'record 20 has label 3.* 0 to 1'),
    (labelled.Labelled(b'text', -1), 'record 20 has label -1'),
    (labelled.Labelled(b' \n', 1), 'the text of record 20 is empty'),
  ],
)
def test_bad_labelled_records_are_named(pair, words):
  good = [(i, labelled.Labelled(b'a', i % 2)) for i in range(20)]
  with pytest.raises(ConfigError, match=words):
    labelled.from_pairs([*good, (20, pair)], ('a', 'b'), {'source': 'made up'})


def test_a_set_with_an_empty_split_is_refused():
  few = [(1, labelled.Labelled(b'a', 0))]
  with pytest.raises(ConfigError, match='the validation split is empty'):
    labelled.from_pairs(few, ('a',), {'source': 'made up'})


@pytest.mark.parametrize(
  ('sentence', 'words'),
  [
    (tagged.Tagged((), ()), 'empty word or no word'),
    (tagged.Tagged(('a', ''), (0, 0)), 'empty word'),
    (tagged.Tagged(('a', 'b'), (0,)), '2 words and 1 tags'),
    (tagged.Tagged(('a',), (7,)), 'tag 7, but there are 3'),
  ],
)
def test_bad_tagged_records_are_named(sentence, words):
  with pytest.raises(ConfigError, match=f'record 0 has .*{words}'):
    tagged.from_sentences(
      [(0, sentence)], ('O', 'B-x', 'I-x'), {'source': 'made up'}
    )


def test_tags_that_are_no_iob2_are_refused():
  with pytest.raises(ConfigError, match="'person' is no IOB2 tag"):
    tagged.check_names(('O', 'person'), 'made up')


def test_an_empty_translation_is_named():
  examples = [(0, pairs.Pair(b'a', b''))]
  with pytest.raises(ConfigError, match='the text of record 0 is empty'):
    pairs.from_pairs(examples, {'source': 'made up'})


def test_rows_of_texts():
  bytes_ = ByteTokenizer()
  row = labelled.LabelledRows([labelled.Labelled(b'abcdef', 2)], bytes_, 4)[0]
  assert row['inputs'].tolist() == [97, 98, 99, 100]
  row = labelled.LabelledRows([labelled.Labelled(b'ab', 2)], bytes_, 4)[0]
  assert row['inputs'].tolist() == [97, 98, 0, 0]
  assert row['segment_ids'].tolist() == [1, 1, 0, 0]
  assert row['labels'] == 2 and row['weights'].tolist() == [1]
  with pytest.raises(IndexError, match='example 1 of 1'):
    labelled.LabelledRows([labelled.Labelled(b'ab', 2)], bytes_, 4)[1]


def test_rows_of_words_judge_first_pieces_of_whole_words():
  sentence = tagged.Tagged(('a', 'bc', 'def'), (0, 1, 2))
  row = tagged.TaggedRows([sentence], ByteTokenizer(), 8)[0]
  assert bytes(row['inputs'].astype(np.uint8)) == b' a bc\0\0\0'
  assert row['first'].tolist()[:2] == [0, 2]
  assert row['tags'].tolist() == [0, 1] + [0] * 6
  assert row['weights'].sum() == 2 == row['weights'][:2].sum()


def test_rows_of_pairs_begin_and_end_with_a_separator():
  row = pairs.PairRows([pairs.Pair(b'ab', b'cdefgh')], ByteTokenizer(), 5)[0]
  assert row['source'].tolist() == [97, 98, 0, 0, 0]
  assert row['source_ids'].tolist() == [1, 1, 0, 0, 0]
  assert row['inputs'].tolist() == [0, *b'cdef']
  assert row['targets'].tolist() == [*b'cdefg']  # cut: no end
  assert row['weights'].tolist() == [1] * 5
  row = pairs.PairRows([pairs.Pair(b'ab', b'c')], ByteTokenizer(), 5)[0]
  assert row['targets'].tolist() == [99, 0, 0, 0, 0]
  assert row['weights'].tolist() == [1, 1, 0, 0, 0]


def test_groups_stay_together():
  examples = [(f'group {i // 3}', i) for i in range(300)]
  train, validation, test, manifest = splits.by_group(examples, {'source': 'x'})
  parts = [{i // 3 for i in part} for part in (train, validation, test)]
  assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])
  assert manifest['train'] == len(train) > 200
