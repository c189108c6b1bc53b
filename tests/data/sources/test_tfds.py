"""TFDS sets by name: read if prepared, explained if not, never downloaded."""

import json
import socket
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from psa_jax.config import ConfigError, DataConfig, RunError
from psa_jax.data import sources
from psa_jax.data.sources import tfds_sets
from psa_jax.data.text.corpus import build_corpus


@pytest.fixture(autouse=True)
def offline(monkeypatch):
  def refuse(*_):
    raise AssertionError('a network connection')

  monkeypatch.setattr(socket.socket, 'connect', refuse)
  monkeypatch.setattr(socket, 'getaddrinfo', refuse)


@pytest.fixture(autouse=True)
def no_usual_folder(monkeypatch, tmp_path):
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path / 'usual'))


class Verses(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """A set with the splits and records that a test asks for."""

  VERSION = tfds.core.Version('2.1.0')
  splits: dict[str, list[str]]

  def _info(self):
    features = {'text': tfds.features.Text(), 'title': tfds.features.Text()}
    return tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.FeaturesDict({**features, 'year': np.int64}),
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager):
    return {k: self._generate_examples(v) for k, v in self.splits.items()}

  def _generate_examples(self, texts):
    for i, content in enumerate(texts):
      yield i, {'text': content, 'title': f't{i}', 'year': i}


def prepare(folder, monkeypatch, **splits):
  monkeypatch.setattr(Verses, 'splits', splits, raising=False)
  tfds.disable_progress_bar()
  Verses(data_dir=folder, file_format='array_record').download_and_prepare()


def load(folder, name='verses', **keys):
  source = f'tfds:{name}'
  config = DataConfig(source=source, data_dir=str(folder), **keys)
  return sources.load(config, sources.DOCUMENTS)


def test_a_prepared_set_is_read_from_its_files(tmp_path, monkeypatch):
  prepare(tmp_path, monkeypatch, train=['ä', 'b'], validation=['c'], test=['d'])
  source = load(tmp_path)
  assert list(source.train) == ['ä'.encode(), b'b']
  assert list(source.validation) == [b'c']
  assert source.manifest['version'] == '2.1.0'
  assert source.manifest['held_out'] == 'split validation'
  assert list(load(tmp_path, 'verses:2.1.0', text_key='title').train) == [
    b't0',
    b't1',
  ]


def test_test_split_stands_in_for_validation(tmp_path, monkeypatch):
  prepare(tmp_path, monkeypatch, train=['a'], test=['d'])
  source = load(tmp_path)
  assert list(source.validation) == [b'd']
  assert source.manifest['held_out'] == 'split test'


def test_a_set_with_train_only_says_what_it_holds_out(tmp_path, monkeypatch):
  prepare(tmp_path, monkeypatch, train=[f'{i}' for i in range(12)])
  source = load(tmp_path)
  assert list(source.validation) == [b'0', b'10']
  assert len(source.train) == 10
  assert source.manifest['held_out'] == 'every tenth of train'


def test_the_usual_tfds_folder_is_searched_too(tmp_path, monkeypatch):
  prepare(tmp_path / 'usual', monkeypatch, train=['a'], test=['b'])
  assert list(load(tmp_path / 'elsewhere').train) == [b'a']


def test_corpus_is_packed_again_when_the_set_is(tmp_path, monkeypatch):
  prepare(tmp_path, monkeypatch, train=['abc'], test=['d'])
  config = DataConfig(source='tfds:verses', data_dir=str(tmp_path))
  first = build_corpus(config)
  assert first.manifest['splits']['train']['bytes'] == 3
  for path in (tmp_path / 'verses' / '2.1.0').iterdir():
    path.unlink()
  (tmp_path / 'verses' / '2.1.0').rmdir()
  prepare(tmp_path, monkeypatch, train=['other'], test=['d'])
  second = build_corpus(config)
  assert second.manifest['splits']['train']['bytes'] == 5
  assert first.manifest['sha256'] != second.manifest['sha256']


@pytest.mark.parametrize(
  'splits, keys, message',
  [
    ({'validation': ['x']}, {}, 'no train split, only validation'),
    ({'train': ['x']}, {'text_key': 'txt'}, 'data.text_key to text or title$'),
    (
      {'train': ['x']},
      {'text_key': 'year'},
      "no text feature 'year'; .* text or title$",
    ),
    ({'train': ['', '']}, {}, 'train split holds no text'),
  ],
)
def test_unfit_sets_are_refused(tmp_path, monkeypatch, splits, keys, message):
  prepare(tmp_path, monkeypatch, **splits)
  config = DataConfig(source='tfds:verses', data_dir=str(tmp_path), **keys)
  with pytest.raises(ConfigError, match=message) as e:
    build_corpus(config)
  assert '\n' not in str(e.value)


@pytest.mark.parametrize('harm', ['half', 'flip', 'zero', 'gone'])
def test_damaged_records_are_named(tmp_path, monkeypatch, harm):
  texts = [f'{i} ' * 10_000 for i in range(9)]
  prepare(tmp_path, monkeypatch, train=texts, test=['d'])
  record = next(tmp_path.rglob('*train.array_record*'))
  data = record.read_bytes()
  if harm == 'half':
    record.write_bytes(data[: len(data) // 2])
  if harm == 'flip':
    record.write_bytes(data[:99] + bytes(99) + data[198:])
  if harm == 'zero':
    record.write_bytes(bytes(len(data)))
  if harm == 'gone':
    record.unlink()
  with pytest.raises((RunError, ConfigError), match='prepare it again') as e:
    list(load(tmp_path).train)
  assert str(tmp_path) in str(e.value) and '\n' not in str(e.value)


def test_other_file_formats_say_so(tmp_path, monkeypatch):
  prepare(tmp_path, monkeypatch, train=['x'], test=['d'])
  path = next(tmp_path.rglob('dataset_info.json'))
  path.write_text(path.read_text().replace('"array_record"', '"tfrecord"'))
  with pytest.raises(ConfigError, match='not as readable array_record') as e:
    load(tmp_path)
  assert 'psa_jax.data.prepare --name=verses' in str(e.value)


@pytest.mark.parametrize('name', ['pg19', 'c4/en', 'glue/sst2', 'wiki40b/en'])
def test_unprepared_sets_say_how_to_prepare_them(tmp_path, name):
  with pytest.raises(ConfigError, match='not prepared') as e:
    load(tmp_path, name)
  command = f'python -m psa_jax.data.prepare --name={name}'
  assert f'{command} --data_dir={tmp_path}' in str(e.value)
  assert '\n' not in str(e.value)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  'name',
  [
    'glue/cola',
    'wmt14_translate/de-en',
    'c4/en',
    'wiki40b/en',
    'multi_nli',
    'conll2003',
    'cnn_dailymail',
    'lm1b',
  ],
)
def test_legacy_names_are_known(tmp_path, name):
  builder = tfds_sets.find_builder(name, tmp_path)
  assert builder.name == name.split('/')[0]


@pytest.mark.parametrize(
  'name, message',
  [
    ('nosuchset', 'neither TFDS'),
    ('glue/nosuch', 'nosuch not found'),
    ('pg19:9.9.9', 'cannot be loaded at version 9.9.9'),
    ('huggingface:x/y', 'a name is set, set/config'),
    ('../secret', 'a name is set, set/config'),
  ],
)
def test_unknown_names_are_one_clear_line(tmp_path, name, message):
  with pytest.raises(ConfigError, match=message) as e:
    load(tmp_path, name)
  assert '\n' not in str(e.value)


def test_pg19_from_mock_data(tmp_path):
  """Mocked text is `str`, real text `bytes`: both become bytes."""
  with tfds.testing.mock_data(num_examples=7):
    source = load(tmp_path, 'pg19', text_key='book_text')
    books = list(source.train)
    assert len(books) == 7
    assert all(isinstance(book, bytes) and book for book in books)
    config = DataConfig(
      source='tfds:pg19', text_key='book_text', data_dir=str(tmp_path / 'c')
    )
    corpus = build_corpus(config)
  assert corpus.train.tokens.tobytes() == b''.join(
    b'\0' + book for book in [*books, b'']
  )


def test_pg19_from_mock_data_with_real_metadata(tmp_path):
  path = Path(tmp_path, 'pg19', '0.1.1')
  path.mkdir(parents=True)
  template = '{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}'
  splits = [
    {'name': split, 'shardLengths': ['5'], 'filepathTemplate': template}
    for split in ('train', 'validation', 'test')
  ]
  info = {'name': 'pg19', 'version': '0.1.1', 'splits': splits}
  info['fileFormat'] = 'array_record'
  (path / 'dataset_info.json').write_text(json.dumps(info))
  features = tfds.features.FeaturesDict({'book_text': tfds.features.Text()})
  features.save_config(path)
  with tfds.testing.mock_data(num_examples=5, data_dir=str(tmp_path)):
    source = load('/nowhere', 'pg19', text_key='book_text')
    assert len(list(source.train)) == len(list(source.validation)) == 5
  assert source.manifest['held_out'] == 'split validation'


@pytest.mark.parametrize('key', ['pythonClassName', 'python_class_name'])
def test_files_do_not_choose_which_code_runs(tmp_path, monkeypatch, key):
  """TFDS would import the module that a feature's class is said to be in."""
  prepare(tmp_path, monkeypatch, train=['a'], test=['b'])
  path = tmp_path / 'verses' / '2.1.0' / 'features.json'
  features = json.loads(path.read_text())
  title = features['featuresDict']['features']['title']
  del title['pythonClassName']
  title[key] = 'chosen_by_the_data.Text'
  path.write_text(json.dumps(features))
  (tmp_path / 'chosen_by_the_data.py').write_text('raise SystemExit("run")')
  monkeypatch.syspath_prepend(tmp_path)
  with pytest.raises(ConfigError, match=f"{path} names the feature 'chosen_by"):
    load(tmp_path)
  path.write_text('[' * 9999)
  with pytest.raises(ConfigError, match=f'{path} cannot be read: .*; delete'):
    load(tmp_path)
