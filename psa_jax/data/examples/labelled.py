"""Texts with a label each: `verse_genre`, `vader3`, and TFDS sets.

`verse_genre`: a verse of the American Standard Version, and what kind of book
it is from, one of seven; a chapter is in one split as a whole.

`vader3`: 23,703 sentences from film reviews, tweets, product reviews and
editorials with the mean rating of twenty people (Hutto and Gilbert, ICWSM
2014): negative up to -0.5, positive from 0.5, else neutral. They are in the
source distribution of vaderSentiment, which `python -m psa_jax.data.prepare
--name=vader3` fetches; the sentences belong to others, so they are not passed
on here.

`tfds:<name>`: the features `data.text_key` and `data.label_key`.
"""

import hashlib
import io
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from psa_jax.config import ConfigError, DataConfig
from psa_jax.data import examples, folder, verses

VADER = 'vaderSentiment==3.3.2'
_RATED = ('movieReview', 'tweets', 'amazonReview', 'nytEditorial')


class Labelled(NamedTuple):
  """A text in bytes and its label, from 0 on."""

  text: bytes
  label: int


class LabelledSet(NamedTuple):
  """Everything a run needs to know of its texts.

  Attributes:
    examples: splits of `Labelled`.
    classes: names of the labels.
  """

  examples: examples.Examples
  classes: tuple[str, ...]

  @property
  def manifest(self) -> dict:
    """What it is; plain JSON values."""
    return self.examples.manifest


def load(config: DataConfig) -> LabelledSet:
  """The texts of `data.source`.

  Raises:
    ConfigError: an unknown source, one that is missing, or one without labels.
  """
  kind, _, rest = config.source.partition(':')
  if config.source == 'verse_genre':
    return from_pairs(_verses(), verses.GENRES, _manifest('asv'))
  if config.source == 'vader3':
    path = _vader_path(config)
    manifest = {
      'source': 'vader3',
      'package': VADER,
      'sha256': hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    names = ('negative', 'neutral', 'positive')
    return from_pairs(_vader(path), names, manifest)
  if kind == 'tfds' and rest:
    return _tfds(rest, config)
  raise ConfigError(
    f'data.source {config.source!r} has no labelled texts; choose verse_genre, '
    'vader3 or tfds:<name>'
  )


def from_pairs(pairs, classes: tuple[str, ...], manifest: dict) -> LabelledSet:
  """Splits (group, `Labelled`) by group.

  Raises:
    ConfigError: a label out of range, or an empty text or split.
  """

  def checked():
    for i, (group, example) in enumerate(pairs):
      examples.text_of(example.text, manifest['source'], i)
      yield group, check(example, len(classes), manifest['source'], i)

  train, validation, test, manifest = examples.by_group(checked(), manifest)
  splits = examples.Examples(train, validation, test, manifest)
  return LabelledSet(splits, classes)


def check(example: Labelled, classes: int, where: str, i: int) -> Labelled:
  """The example.

  Raises:
    ConfigError: its label is none of the classes.
  """
  if not 0 <= example.label < classes:
    raise ConfigError(
      f'{where}: record {i} has label {example.label}, but there are {classes} '
      f'classes, 0 to {classes - 1}; choose a split with labels (eval.split) '
      'or mend the record'
    )
  return example


def _manifest(edition: str) -> dict:
  return {'source': 'verse_genre', **verses.manifest(edition)}


def _verses() -> Iterator[tuple[int, Labelled]]:
  found = verses.read('asv')
  chapters = verses.chapters(found)
  for number, text in found.items():
    label = verses.genre(number)
    yield chapters[number], Labelled(text.encode(), label)


def _vader_path(config: DataConfig) -> Path:
  where = folder.data_dir(config) / 'vader3'
  found = sorted(where.glob('vader*entiment-*.tar.gz'))
  if not found:
    option = f' --data_dir={config.data_dir}' if config.data_dir else ''
    raise ConfigError(
      f'data.source vader3 is not in {where}; fetch it once: python -m '
      f'psa_jax.data.prepare --name=vader3{option}'
    )
  return found[-1]


def _vader(path: Path) -> Iterator[tuple[str, Labelled]]:
  """Sentences by source and number; an archive in an archive."""
  try:
    with tarfile.open(path) as outer:
      inner = next(
        member for member in outer if member.name.endswith('2014.tar.gz')
      )
      content = outer.extractfile(inner)
      assert content is not None
      with tarfile.open(fileobj=io.BytesIO(content.read())) as archive:
        for name in _RATED:
          yield from _rated(archive, name)
  except (tarfile.TarError, StopIteration, KeyError, OSError, EOFError) as e:
    raise ConfigError(
      f'{path} is not the archive of {VADER} ({e}); delete it and prepare '
      'vader3 again'
    ) from e


def _rated(archive: tarfile.TarFile, name: str):
  stem = name if name == 'tweets' else f'{name}Snippets'
  names = [
    n for n in archive.getnames() if n.endswith(f'{stem}_GroundTruth.txt')
  ]
  content = archive.extractfile(names[0] if names else stem)
  assert content is not None
  for line in content.read().splitlines():
    number, rating, text = line.split(b'\t', 2)
    if not text.strip():
      continue
    mean = float(rating)
    label = 0 if mean <= -0.5 else 2 if mean >= 0.5 else 1
    # Snippets of one review have its number: 12_3 is of review 12.
    group = number.partition(b'_')[0].decode()
    yield f'{name} {group}', Labelled(text.strip(), label)


def _tfds(name: str, config: DataConfig) -> LabelledSet:
  def example(where: str, i: int, record: Any) -> Labelled:
    text = examples.text_of(record[config.text_key], where, i)
    found = Labelled(text, int(record[config.label_key]))
    return check(found, len(classes), where, i)

  keys = (config.text_key, config.label_key)
  splits, features = examples.from_tfds(
    name, config, keys, example, label_key=config.label_key
  )
  classes = tuple(class_names(name, features[config.label_key], config))
  return LabelledSet(splits, classes)


def class_names(name: str, feature: Any, config: DataConfig) -> list[str]:
  """Names of a label feature's classes.

  Raises:
    ConfigError: it is no label.
  """
  names = getattr(feature, 'names', None)
  if not names:
    raise ConfigError(
      f'tfds:{name}: feature {config.label_key!r} is no label; set '
      'data.label_key to one that is'
    )
  return list(names)
