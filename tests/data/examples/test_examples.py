"""Labelled texts, tagged words and translations, and their rows."""

import io
import re
import tarfile

import numpy as np
import pytest
import tensorflow_datasets as tfds
from psa_jax.data.tokenizer import ByteTokenizer

from psa_jax.config import ConfigError, DataConfig
from psa_jax.data import examples, labelled, parallel, rows, tagged, verses


def source(name, tmp_path=None, **keys):
  return DataConfig(source=name, data_dir=str(tmp_path or ''), **keys)


def test_verses_have_their_numbers_and_genres():
  found = verses.read('asv')
  assert len(found) == 31_086 and min(found) == 1001001
  assert found[1001001].startswith('In the beginning God created')
  assert verses.GENRES[verses.genre(44001001)] == 'history'  # Acts
  assert [verses.genre(book * 10**6) for book in range(1, 67)].count(6) == 1
  chapters = verses.chapters(found)
  assert len(set(chapters.values())) == 1189 and chapters[1002001] == 1


def test_genres_in_three_splits_without_a_chapter_in_two():
  found = labelled.load(source('verse_genre'))
  splits = found.examples
  sizes = [len(x) for x in (splits.train, splits.validation, splits.test)]
  assert sum(sizes) == 31_086 and found.classes == verses.GENRES
  assert sizes == [found.manifest[n] for n in ('train', 'validation', 'test')]
  assert min(sizes[1:]) > 0.09 * 31_086
  texts = [{e.text for e in part} for part in (splits.train, splits.validation)]
  # What is in both is said in two chapters (2 Kings 19 is Isaiah 37).
  assert len(texts[0] & texts[1]) < 0.01 * len(texts[1])


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


def vader(path, rows=60):
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


def test_sentiment_from_the_prepared_archive(tmp_path):
  with pytest.raises(ConfigError, match='prepare --name=vader3 --data_dir='):
    labelled.load(source('vader3', tmp_path))
  vader(tmp_path / 'vader3' / 'vaderSentiment-3.3.2.tar.gz')
  found = labelled.load(source('vader3', tmp_path))
  every = [e for s in ('train', 'validation', 'test')
           for e in found.examples.split(s)]  # fmt: skip
  assert len(every) == 240 and found.classes[0] == 'negative'
  assert [e.label for e in every if e.text.startswith(b'so 3 ')] == [0] * 4
  assert [e.label for e in every if e.text.startswith(b'so 4 ')] == [1] * 4
  path = tmp_path / 'vader3' / 'vaderSentiment-3.3.2.tar.gz'
  path.write_bytes(b'no archive')
  with pytest.raises(ConfigError, match='delete it and prepare'):
    labelled.load(source('vader3', tmp_path))


CODE = '''
import os.path as p, sys
from . import a
from .b.c import d
async def f(x, *args, y: int = 3, **kw) -> str:
  """Prose."""
  return os.path.join("ü", x).strip().z
class Q(f):
  v = lambda w: w
'''


def test_tags_of_a_program_are_those_of_its_syntax_tree():
  found = list(tagged.python_sentences(CODE))
  spans = [
    (word, tagged.TAGS[tag])
    for words, tags in found
    for word, tag in zip(words, tags, strict=True)
    if tag
  ]
  assert spans == [
    ('os', 'B-import'), ('.', 'I-import'), ('path', 'I-import'),
    ('sys', 'B-import'), ('a', 'B-import'), ('b', 'B-import'),
    ('.', 'I-import'), ('c', 'I-import'), ('d', 'B-import'),
    ('f', 'B-func'), ('x', 'B-param'), ('args', 'B-param'), ('y', 'B-param'),
    ('kw', 'B-param'), ('.', 'B-attr'), ('path', 'I-attr'), ('.', 'I-attr'),
    ('join', 'I-attr'), ('.', 'B-attr'), ('strip', 'I-attr'), ('.', 'B-attr'),
    ('z', 'I-attr'), ('Q', 'B-class'), ('w', 'B-param'),
  ]  # fmt: skip
  assert found[4].words == ("'...'",)  # of a string only that it is one


def test_passages_join_lines_and_cut_long_ones_between_spans():
  lines = [tagged.Tagged(('a', 'b'), (0, 1))] * 3
  joined = list(tagged.passages(lines, most=6))
  assert [p.words for p in joined] == [
    ('a', 'b', '\n', 'a', 'b'),
    ('a', 'b'),
  ]
  attr = tagged.TAGS.index('B-attr')
  long = tagged.Tagged(tuple('abcdefg'), (0, 0, attr, attr + 1, attr + 1, 0, 0))
  cut = list(tagged.passages([long], most=4))
  assert [''.join(p.words) for p in cut] == ['abcde', 'fg']


def test_the_library_is_tagged():
  found = tagged.load(source('stdlib_tags'))
  tags = np.concatenate([e.tags for e in found.examples.validation])
  seen = np.bincount(tags, minlength=len(tagged.TAGS))
  assert seen[0] > seen[1:].sum() / 2 > 0 and (seen[1::2] > 10).all()


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


def test_verses_pair_up():
  found = parallel.load(source('asv_bbe'))
  splits = found.examples
  count = sum(len(splits.split(s)) for s in ('train', 'validation', 'test'))
  assert count == 31_023
  pair = splits.validation[0]  # chapter 0 is Genesis 1
  assert pair.source.startswith(b'In the beginning God created')
  assert pair.target.startswith(b'At the first God made')


@pytest.mark.parametrize('edition', verses.EDITIONS)
def test_verses_are_cut_between_words(edition):
  found = verses.read(edition)
  inside = [v for v in found.values() if v[:1].islower()]
  assert len(inside) < 0.2 * len(found)  # a sentence may go on in a verse
  marks = '.,;:!?()'
  broken = {v.split()[0].strip(marks) for v in inside} - {
    w.strip(marks) for v in found.values() for w in v.split()[1:]
  }
  assert len(broken) < 20
  assert not any('\\' in v for v in found.values())


def test_both_editions_say_the_same_to_the_end():
  old, basic = verses.read('asv'), verses.read('bbe')
  assert basic[66022021].startswith('The grace of the Lord Jesus')
  assert basic[24039009].startswith('Then Nebuzaradan')
  names = re.compile(r'(?<=[a-z,] )[A-Z][a-z]{4,}')
  both = [n for n in old if n in basic]

  def shared(numbers, others):
    found = [
      np.mean([name in basic[m] for name in there])
      for n, m in zip(numbers, others, strict=True)
      if (there := set(names.findall(old[n])))
    ]
    return np.mean(found)

  for i in range(0, len(both), 5000):
    part = both[i : i + 5000]
    # A drift of one verse would already be seen in names that come once.
    assert shared(part, part) > 1.5 * shared(part, part[3:] + part[:3])


def test_descriptions_from_the_prepared_file(tmp_path):
  with pytest.raises(
    ConfigError, match='prepare --name=ddtp_en_fr --data_dir='
  ):
    parallel.load(source('ddtp_en_fr', tmp_path))
  path = tmp_path / 'ddtp_en_fr' / parallel.PAIRS_FILE
  path.parent.mkdir()
  path.write_text(''.join(f'p{i}\tthe {i}\tle {i}\n' for i in range(99)))
  found = parallel.load(source('ddtp_en_fr', tmp_path))
  assert found.manifest['train'] + found.manifest['test'] < 99
  assert found.examples.train[0].target.startswith(b'le')
  path.write_text('p\tno translation\n')
  with pytest.raises(
    ConfigError, match='line 1 has 2 fields.*prepare it again'
  ):
    parallel.load(source('ddtp_en_fr', tmp_path))


def test_an_empty_translation_is_named():
  pairs = [(0, parallel.Pair(b'a', b''))]
  with pytest.raises(ConfigError, match='the text of record 0 is empty'):
    parallel.from_pairs(pairs, {'source': 'made up'})


@pytest.mark.parametrize('module', [labelled, tagged, parallel])
def test_unknown_sources_are_named(module):
  with pytest.raises(ConfigError, match="data.source 'sotu' has no"):
    module.load(source('sotu'))


class Small(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """Twenty-five records of all three kinds, in one split."""

  VERSION = tfds.core.Version('1.0.0')
  bad = False

  def _info(self):
    text = tfds.features.Text()
    tag = tfds.features.ClassLabel(names=['O', 'B-x', 'I-x'])
    return tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.FeaturesDict(
        {
          'text': text,
          'label': tfds.features.ClassLabel(names=['bad', 'good']),
          'tokens': tfds.features.Sequence(text),
          'ner': tfds.features.Sequence(tag),
          'de': text,
        }
      ),  # fmt: skip
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager):
    del dl_manager
    return {'train': self._generate_examples(40)}

  def _generate_examples(self, count):
    for i in range(count):
      yield (
        i,
        {
          'text': f'text {i}',
          'label': -1 if i == 30 else i % 2,
          'tokens': ['a', f'b{i}'],
          'ner': [0, 1],
          'de': f'Text {i}',
        },
      )


class Secret(Small, skip_registration=True):
  """The labels of its test split are not public, as in GLUE."""

  def _split_generators(self, dl_manager):
    del dl_manager
    return {
      'train': self._generate_examples(30),
      'validation': self._generate_examples(4),
      'test': ((i, {**x, 'label': -1}) for i, x in self._generate_examples(5)),
    }


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
  tfds.disable_progress_bar()
  root = tmp_path_factory.mktemp('tfds')
  for kind in (Small, Secret):
    kind(data_dir=root, file_format='array_record').download_and_prepare()
  return root


def test_prepared_sets_of_all_three_kinds(prepared):
  found = labelled.load(source('tfds:small', prepared))
  assert found.classes == ('bad', 'good')
  assert found.examples.train[0] == (b'text 1', 1)  # 0 and 20 are held out
  assert [e.text for e in found.examples.validation] == [b'text 0', b'text 20']
  assert found.manifest['train'] == 38
  with pytest.raises(ConfigError, match='has no test split'):
    found.examples.split('test')
  with pytest.raises(ConfigError, match='train: record 30 has label -1'):
    list(found.examples.train)
  keys = dict(words_key='tokens', label_key='ner')
  words = tagged.load(source('tfds:small', prepared, **keys))
  assert words.tags == ('O', 'B-x', 'I-x')
  assert words.examples.train[0] == (('a', 'b1'), (0, 1))
  keys = dict(source_key='text', target_key='de')
  pairs = parallel.load(source('tfds:small', prepared, **keys))
  assert pairs.examples.train[0] == (b'text 1', b'Text 1')


def test_a_test_split_with_secret_labels_is_none(prepared):
  found = labelled.load(source('tfds:secret', prepared)).examples
  assert found.test is None and len(found.validation) == 4
  words = 'has no public labels in its test split; set eval.split'
  with pytest.raises(ConfigError, match=words):
    found.split('test')
  # Its translations are there to be judged.
  keys = dict(source_key='text', target_key='de')
  pairs = parallel.load(source('tfds:secret', prepared, **keys))
  assert len(pairs.examples.split('test')) == 5


@pytest.mark.parametrize(
  ('module', 'keys', 'words'),
  [
    (labelled, {'text_key': 'words'}, "no feature 'words', only .*text"),
    (labelled, {'label_key': 'text'}, "'text' is no label"),
    (tagged, {'words_key': 'tokens', 'label_key': 'text'}, 'is no label'),
    (parallel, {'source_key': 'en'}, "no feature 'en'"),
  ],
)
def test_wrong_keys_are_named(prepared, module, keys, words):
  for name in ('tfds:small', 'tfds:secret'):  # the second has a test split
    with pytest.raises(ConfigError, match=words):
      module.load(source(name, prepared, **keys))


@pytest.mark.parametrize(
  ('name', 'module', 'keys'),
  [
    ('glue/sst2', labelled, {'text_key': 'sentence'}),
    ('imdb_reviews', labelled, {}),
    ('wmt14_translate/de-en', parallel,
     {'source_key': 'en', 'target_key': 'de'}),
  ],
)  # fmt: skip
def test_the_papers_sets_from_mock_data(tmp_path, name, module, keys):
  with tfds.testing.mock_data(num_examples=30):
    found = module.load(source(f'tfds:{name}', tmp_path, **keys))
    first = found.examples.train[0]
  assert all(part != b'' for part in first)


def test_conll2003_from_mock_data(tmp_path):
  keys = dict(words_key='tokens', label_key='ner')
  with tfds.testing.mock_data(num_examples=30):
    found = tagged.load(source('tfds:conll2003', tmp_path, **keys))
    assert found.tags[:3] == ('O', 'B-PER', 'I-PER')
    # The mock draws the lengths of words and tags apart, which no set does.
    with pytest.raises(ConfigError, match='train: record 0 has .* words and'):
      found.examples.train[0]


def test_rows_of_texts():
  bytes_ = ByteTokenizer()
  row = rows.LabelledRows([labelled.Labelled(b'abcdef', 2)], bytes_, 4)[0]
  assert row['inputs'].tolist() == [97, 98, 99, 100]
  row = rows.LabelledRows([labelled.Labelled(b'ab', 2)], bytes_, 4)[0]
  assert row['inputs'].tolist() == [97, 98, 0, 0]
  assert row['segment_ids'].tolist() == [1, 1, 0, 0]
  assert row['labels'] == 2 and row['weights'].tolist() == [1]
  with pytest.raises(IndexError, match='example 1 of 1'):
    rows.LabelledRows([labelled.Labelled(b'ab', 2)], bytes_, 4)[1]


def test_rows_of_words_judge_first_pieces_of_whole_words():
  sentence = tagged.Tagged(('a', 'bc', 'def'), (0, 1, 2))
  row = rows.TaggedRows([sentence], ByteTokenizer(), 8)[0]
  assert bytes(row['inputs'].astype(np.uint8)) == b' a bc\0\0\0'
  assert row['first'].tolist()[:2] == [0, 2]
  assert row['tags'].tolist() == [0, 1] + [0] * 6
  assert row['weights'].sum() == 2 == row['weights'][:2].sum()


def test_rows_of_pairs_begin_and_end_with_a_separator():
  row = rows.PairRows([parallel.Pair(b'ab', b'cdefgh')], ByteTokenizer(), 5)[0]
  assert row['source'].tolist() == [97, 98, 0, 0, 0]
  assert row['source_ids'].tolist() == [1, 1, 0, 0, 0]
  assert row['inputs'].tolist() == [0, *b'cdef']
  assert row['targets'].tolist() == [*b'cdefg']  # cut: no end
  assert row['weights'].tolist() == [1] * 5
  row = rows.PairRows([parallel.Pair(b'ab', b'c')], ByteTokenizer(), 5)[0]
  assert row['targets'].tolist() == [99, 0, 0, 0, 0]
  assert row['weights'].tolist() == [1, 1, 0, 0, 0]


def test_groups_stay_together():
  pairs = [(f'group {i // 3}', i) for i in range(300)]
  train, validation, test, manifest = examples.by_group(pairs, {'source': 'x'})
  parts = [{i // 3 for i in part} for part in (train, validation, test)]
  assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])
  assert manifest['train'] == len(train) > 200
