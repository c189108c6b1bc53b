"""Sentences and their translations: `asv_bbe`, `ddtp_en_<xx>`, TFDS sets.

`asv_bbe`: 31,023 verses of the American Standard Version with what the Bible
in Basic English makes of them. Both are English, so it is rewriting into a
thousand words rather than translation; copying the source scores a BLEU of 26.
A chapter is in one split as a whole.

`ddtp_en_fr`, `ddtp_en_de` and so on: descriptions of Debian's packages and
their translations by the Debian Description Translation Project, paragraph by
paragraph. `python -m psa_jax.data.prepare --name=ddtp_en_fr` fetches them on a
Debian or Ubuntu; their licences are the packages', so they are not passed on.

`tfds:<name>`: the features `data.source_key` and `data.target_key`.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from psa_jax.config import ConfigError, DataConfig
from psa_jax.data import examples, folder, verses

DDTP = re.compile(r'ddtp_en_([a-z]{2,3}(?:_[A-Z]{2})?)')
PAIRS_FILE = 'pairs.tsv'  # of a prepared set: package, source, target


class Pair(NamedTuple):
  """A text in bytes and its translation."""

  source: bytes
  target: bytes


class ParallelSet(NamedTuple):
  """Everything a run needs to know of its sentences.

  Attributes:
    examples: splits of `Pair`.
  """

  examples: examples.Examples

  @property
  def manifest(self) -> dict:
    """What it is; plain JSON values."""
    return self.examples.manifest


def load(config: DataConfig) -> ParallelSet:
  """The pairs of `data.source`.

  Raises:
    ConfigError: an unknown source, one that is missing, or no pairs in it.
  """
  kind, _, rest = config.source.partition(':')
  if config.source == 'asv_bbe':
    manifest = {'source': 'asv_bbe', **verses.manifest('asv', 'bbe')}
    return from_pairs(_verses(), manifest)
  if DDTP.fullmatch(config.source):
    return _ddtp(config)
  if kind == 'tfds' and rest:
    return _tfds(rest, config)
  raise ConfigError(
    f'data.source {config.source!r} has no translations; choose asv_bbe, '
    'ddtp_en_<language> or tfds:<name>'
  )


def from_pairs(
  pairs: Iterable[tuple[object, Pair]], manifest: dict
) -> ParallelSet:
  """Splits (group, `Pair`) by group.

  Raises:
    ConfigError: an empty text or split.
  """

  def checked():
    for i, (group, pair) in enumerate(pairs):
      for text in pair:
        examples.text_of(text, manifest['source'], i)
      yield group, pair

  train, validation, test, manifest = examples.by_group(checked(), manifest)
  return ParallelSet(examples.Examples(train, validation, test, manifest))


def _verses() -> Iterator[tuple[int, Pair]]:
  old, basic = verses.read('asv'), verses.read('bbe')
  chapters = verses.chapters(old)
  for number, text in old.items():
    if number in basic:
      pair = Pair(text.encode(), basic[number].encode())
      yield chapters[number], pair


def _ddtp(config: DataConfig) -> ParallelSet:
  path = folder.data_dir(config) / config.source / PAIRS_FILE
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


def _lines(content: bytes, path: Path) -> Iterator[tuple[bytes, Pair]]:
  for i, line in enumerate(content.splitlines()):
    fields = line.split(b'\t')
    if len(fields) != 3:
      raise ConfigError(
        f'{path}: line {i + 1} has {len(fields)} fields and not 3; prepare it '
        'again'
      )
    yield fields[0], Pair(*fields[1:])


def _tfds(name: str, config: DataConfig) -> ParallelSet:
  keys = (config.source_key, config.target_key)

  def example(where: str, i: int, record: Any) -> Pair:
    return Pair(*(examples.text_of(record[key], where, i) for key in keys))

  splits, _ = examples.from_tfds(name, config, keys, example)
  return ParallelSet(splits)
