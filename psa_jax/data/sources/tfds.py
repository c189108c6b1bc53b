"""`tfds:<name>`: any set that TFDS knows and somebody has prepared.

`tfds_sets` finds, prepares and opens it. Which features of a record are read is
said by keys of `data`, and what they are read as by the task: documents,
labelled texts, tagged words, translations or images.

Validation of documents is the set's validation split, else its test split,
else every tenth record of train; the manifest says which. Sets of examples
hold out every twentieth record where they have no validation split.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from psa_jax.config import ConfigError, DataConfig, RunError
from psa_jax.data import cache
from psa_jax.data.examples import labelled, pairs, splits, tagged
from psa_jax.data.images import sets
from psa_jax.data.sources import tfds_sets
from psa_jax.data.sources.registry import (
  DOCUMENTS,
  IMAGES,
  LABELLED,
  PAIRS,
  TAGGED,
  Source,
  register,
)
from psa_jax.data.text import documents

_IMAGE = 'image'


def _name(config: DataConfig) -> str:
  return config.source.partition(':')[2]


class Records(Sequence[bytes]):
  """The text of each record of one split, read on demand."""

  def __init__(self, records: Any, *, text_key: str, name: str, path: str):
    self._records = records
    self._text_key = text_key
    self._name = name
    self._path = path

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, i) -> bytes:
    try:
      value = self._records[i][self._text_key]
    except RuntimeError as e:  # one of the ways array_record shows damage
      raise self._damaged(i, str(e).partition(';')[0]) from e
    if value is None:  # the other
      raise self._damaged(i, f'no {self._text_key!r} in it')
    return _as_bytes(value)

  def __iter__(self) -> Iterator[bytes]:
    return (self[i] for i in range(len(self)))

  def _damaged(self, i: int, reason: str) -> RunError:
    return RunError(
      f'tfds:{self._name}: record {i} cannot be read ({reason}); delete '
      f'{self._path} and prepare it again'
    )


def _as_bytes(value: Any) -> bytes:
  """Real records hold `bytes`, mocked ones `str`, tensors either."""
  if isinstance(value, np.ndarray | np.generic):
    value = value.item()
  return value.encode() if isinstance(value, str) else value


def load_documents(config: DataConfig) -> documents.TextSource:
  """A prepared TFDS set as documents.

  Raises:
    ConfigError: no such set, not prepared, or without such a feature.
  """
  name = _name(config)
  builder = tfds_sets.find_builder(name, cache.data_dir(config))
  # A set that was never prepared knows no splits; opening one tells.
  known = list(builder.info.splits) or ['train', 'validation']
  if 'train' not in known:
    raise ConfigError(
      f'tfds:{name} has no train split, only {", ".join(known)}; choose '
      'another data.source'
    )

  def records(split):
    path = str(builder.data_path)
    data = tfds_sets.open_split(name, builder, split, config)
    _check_text_key(name, builder, config.text_key)
    return Records(data, text_key=config.text_key, name=name, path=path)

  train = records('train')
  held_out = next((s for s in ('validation', 'test') if s in known), None)
  if held_out:
    parts = documents.Splits(train, records(held_out))
  else:
    logging.info('tfds:%s: holding out every tenth record of train', name)
    parts = documents.every_tenth(train)
  manifest = {
    'source': f'tfds:{name}',
    'package': builder.name,
    'version': str(builder.version),
    'builder_config': builder.builder_config and builder.builder_config.name,
    'text_key': config.text_key,
    'held_out': f'split {held_out}' if held_out else 'every tenth of train',
    'documents': len(parts.train) + len(parts.validation),
  }
  return documents.TextSource(
    manifest, _identity(manifest, Path(builder.data_path)), lambda: parts
  )


def _check_text_key(name: str, builder: Any, text_key: str) -> None:
  features = builder.info.features
  texts = sorted(
    k for k, feature in features.items() if tfds_sets.is_text(feature)
  )
  if not texts:
    raise ConfigError(f'tfds:{name} has no text, only {", ".join(features)}')
  if text_key not in texts:
    what = 'text feature' if text_key in features else 'feature'
    raise ConfigError(
      f'tfds:{name} has no {what} {text_key!r}; set data.text_key to '
      f'{" or ".join(texts)}'
    )


def _identity(manifest: dict, path: Path) -> str:
  """Changes when the prepared files do; hashing them would take minutes."""
  stats = [(p.name, p.stat()) for p in sorted(path.glob('*'))]
  files = [(name, s.st_size, s.st_mtime_ns) for name, s in stats]
  return hashlib.sha256(repr((manifest, files)).encode()).hexdigest()


def load_labelled(config: DataConfig) -> labelled.LabelledSet:
  """Texts in `data.text_key`, labels in `data.label_key`."""

  def example(where: str, i: int, record: Any) -> labelled.Labelled:
    text = splits.text_of(record[config.text_key], where, i)
    pair = labelled.Labelled(text, int(record[config.label_key]))
    return labelled.check(pair, len(classes), where, i)

  keys = (config.text_key, config.label_key)
  parts, features = _examples(config, keys, example, label_key=config.label_key)
  classes = _class_names(features[config.label_key], config)
  return labelled.LabelledSet(parts, classes)


def load_tagged(config: DataConfig) -> tagged.TaggedSet:
  """Words in `data.words_key`, their tags in `data.label_key`."""
  keys = (config.words_key, config.label_key)

  def example(where: str, i: int, record: Any) -> tagged.Tagged:
    words = tuple(_text(word) for word in record[config.words_key])
    tags = tuple(int(tag) for tag in record[config.label_key])
    return tagged.check(tagged.Tagged(words, tags), len(tags_of), where, i)

  parts, features = _examples(config, keys, example)
  feature = getattr(features[config.label_key], 'feature', None)
  names = _class_names(feature, config)
  tags_of = tagged.check_names(names, config.source)
  return tagged.TaggedSet(parts, tags_of)


def _text(word: Any) -> str:
  return (
    word.decode('utf8', 'replace') if isinstance(word, bytes) else str(word)
  )


def load_pairs(config: DataConfig) -> pairs.PairSet:
  """Texts in `data.source_key`, translations in `data.target_key`."""
  keys = (config.source_key, config.target_key)

  def example(where: str, i: int, record: Any) -> pairs.Pair:
    return pairs.Pair(*(splits.text_of(record[key], where, i) for key in keys))

  parts, _ = _examples(config, keys, example)
  return pairs.PairSet(parts)


def load_images(config: DataConfig) -> sets.PreparedImages:
  """Pictures in the feature `image`, labels in `data.label_key`.

  Mean and standard deviation of the channels are those of the first 500
  training pictures.
  """

  def example(where: str, i: int, record: Any) -> sets.Picture:
    label = int(record[config.label_key])
    labelled.check(labelled.Labelled(b'', label), len(classes), where, i)
    pixels = np.asarray(record[_IMAGE], np.uint8)
    return sets.Picture(pixels, label, f'{where}: picture {i}')

  keys = (_IMAGE, config.label_key)
  parts, features = _examples(config, keys, example, label_key=config.label_key)
  classes = _class_names(features[config.label_key], config)
  return sets.PreparedImages(parts, classes, sets.moments(parts.train))


def _class_names(feature: Any, config: DataConfig) -> tuple[str, ...]:
  """Names of a label feature's classes.

  Raises:
    ConfigError: it is no label.
  """
  names = getattr(feature, 'names', None)
  if not names:
    raise ConfigError(
      f'{config.source}: feature {config.label_key!r} is no label; set '
      'data.label_key to one that is'
    )
  return tuple(names)


def _examples(
  config: DataConfig,
  keys: Sequence[str],
  example: Callable[[str, int, Any], Any],
  *,
  label_key: str = '',
) -> tuple[splits.Examples, Any]:
  """A prepared TFDS set, read a record at a time.

  The validation split is the set's own, else every twentieth record of train,
  which is left out there. The test split is the set's own, if it has one whose
  labels are public.

  Args:
    config: which set, and where data lies.
    keys: features that a record must have.
    example: turns (where, index, record) into an example.
    label_key: feature that is below 0 where a label is kept secret, as in the
      test split of ImageNet or of GLUE.

  Returns:
    The splits and the set's features.

  Raises:
    ConfigError: no such set, not prepared, or without these features.
  """
  name = _name(config)
  builder = tfds_sets.find_builder(name, cache.data_dir(config))
  features = builder.info.features
  for key in keys:
    if key not in features:
      raise ConfigError(
        f'tfds:{name} has no feature {key!r}, only {", ".join(features)}; set '
        'the keys of config.data to those'
      )
  known = list(builder.info.splits) or ['train', 'validation']

  def records(split):
    data = tfds_sets.open_split(name, builder, split, config)
    where = f'tfds:{name}, {split}'
    return splits.Mapped(data, lambda i, record: example(where, i, record))

  train = records('train')
  if 'validation' in known:
    validation, held_out = records('validation'), 'split validation'
  else:
    count, held_out = len(train), 'every twentieth of train'
    first = np.arange(count)
    validation = _Chosen(train, first[::20])
    train = _Chosen(train, first[first % 20 > 0])
  test = records('test') if 'test' in known else None
  secret = (
    bool(label_key) and test is not None and _secret(test.items, label_key)
  )
  manifest = {
    'source': f'tfds:{name}',
    'package': builder.name,
    'version': str(builder.version),
    'keys': list(keys),
    'held_out': held_out,
    'train': len(train),
    'validation': len(validation),
    'test': 0 if test is None else len(test),
  }
  test = None if secret else test
  return splits.Examples(train, validation, test, manifest, secret), features


def _secret(records: Any, key: str) -> bool:
  """Whether labels are below 0, in a few records from all over a split."""
  count = len(records)
  sampled = {i * count // 5 for i in range(5)} if count else set()
  some = [records[i][key] for i in sorted(sampled)]
  return bool(some) and all(
    isinstance(x, int | np.integer) and x < 0 for x in some
  )


class _Chosen(Sequence):
  """The items of a sequence at some places."""

  def __init__(self, items: Any, places: np.ndarray):
    self._items, self._places = items, places

  def __len__(self) -> int:
    return len(self._places)

  def __getitem__(self, i):
    return self._items[int(self._places[i])]


register(
  Source(
    'tfds:<name>',
    yields={
      DOCUMENTS: load_documents,
      LABELLED: load_labelled,
      TAGGED: load_tagged,
      PAIRS: load_pairs,
      IMAGES: load_images,
    },
    prepare=lambda config: tfds_sets.prepare(_name(config), config),
    lock='sha256 of each download, in the package tensorflow-datasets',
  )
)
