"""Labelled texts, tagged words and translations of prepared TFDS sets."""

import pytest
import tensorflow_datasets as tfds

from psa_jax.config import ConfigError, DataConfig
from psa_jax.data import sources
from psa_jax.data.sources import LABELLED, PAIRS, TAGGED


def load(kind, name, folder, **keys):
  config = DataConfig(source=name, data_dir=str(folder), **keys)
  return sources.load(config, kind)


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
  data = load(LABELLED, 'tfds:small', prepared)
  assert data.classes == ('bad', 'good')
  assert data.examples.train[0] == (b'text 1', 1)  # 0 and 20 are held out
  assert [e.text for e in data.examples.validation] == [b'text 0', b'text 20']
  assert data.manifest['train'] == 38
  with pytest.raises(ConfigError, match='has no test split'):
    data.examples.split('test')
  with pytest.raises(ConfigError, match='train: record 30 has label -1'):
    list(data.examples.train)
  keys = dict(words_key='tokens', label_key='ner')
  words = load(TAGGED, 'tfds:small', prepared, **keys)
  assert words.tags == ('O', 'B-x', 'I-x')
  assert words.examples.train[0] == (('a', 'b1'), (0, 1))
  keys = dict(source_key='text', target_key='de')
  pairs = load(PAIRS, 'tfds:small', prepared, **keys)
  assert pairs.examples.train[0] == (b'text 1', b'Text 1')


def test_a_test_split_with_secret_labels_is_none(prepared):
  examples = load(LABELLED, 'tfds:secret', prepared).examples
  assert examples.test is None and len(examples.validation) == 4
  words = 'has no public labels in its test split; set eval.split'
  with pytest.raises(ConfigError, match=words):
    examples.split('test')
  # Its translations are there to be judged.
  keys = dict(source_key='text', target_key='de')
  pairs = load(PAIRS, 'tfds:secret', prepared, **keys)
  assert len(pairs.examples.split('test')) == 5


@pytest.mark.parametrize(
  ('kind', 'keys', 'words'),
  [
    (
      LABELLED,
      {'text_key': 'words'},
      "no feature 'words', only .*text",
    ),
    (LABELLED, {'label_key': 'text'}, "'text' is no label"),
    (
      TAGGED,
      {'words_key': 'tokens', 'label_key': 'text'},
      'is no label',
    ),
    (PAIRS, {'source_key': 'en'}, "no feature 'en'"),
  ],
)
def test_wrong_keys_are_named(prepared, kind, keys, words):
  for name in ('tfds:small', 'tfds:secret'):  # the second has a test split
    with pytest.raises(ConfigError, match=words):
      load(kind, name, prepared, **keys)


@pytest.mark.parametrize(
  ('name', 'kind', 'keys'),
  [
    ('glue/sst2', LABELLED, {'text_key': 'sentence'}),
    ('imdb_reviews', LABELLED, {}),
    ('wmt14_translate/de-en', PAIRS,
     {'source_key': 'en', 'target_key': 'de'}),
  ],
)  # fmt: skip
def test_the_papers_sets_from_mock_data(tmp_path, name, kind, keys):
  with tfds.testing.mock_data(num_examples=30):
    data = load(kind, f'tfds:{name}', tmp_path, **keys)
    first = data.examples.train[0]
  assert all(part != b'' for part in first)


def test_conll2003_from_mock_data(tmp_path):
  keys = dict(words_key='tokens', label_key='ner')
  with tfds.testing.mock_data(num_examples=30):
    data = load(TAGGED, 'tfds:conll2003', tmp_path, **keys)
    assert data.tags[:3] == ('O', 'B-PER', 'I-PER')
    # The mock draws the lengths of words and tags apart, which no set does.
    with pytest.raises(ConfigError, match='train: record 0 has .* words and'):
      data.examples.train[0]
