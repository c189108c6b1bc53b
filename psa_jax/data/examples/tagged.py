"""Words with a tag each, and their rows.

Tags are IOB2: `B-func` opens a span, `I-func` goes on with it, `O` is outside
every span.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from psa_jax.config import ConfigError
from psa_jax.data.examples import rows, splits

OUTSIDE = 'O'


class Tagged(NamedTuple):
  """A sentence: words, and for each the number of its tag."""

  words: tuple[str, ...]
  tags: tuple[int, ...]


class TaggedSet(NamedTuple):
  """Everything a run needs to know of its sentences.

  Attributes:
    examples: splits of `Tagged`.
    tags: names of the tags, IOB2.
  """

  examples: splits.Examples
  tags: tuple[str, ...]

  @property
  def manifest(self) -> dict:
    """What it is; plain JSON values."""
    return self.examples.manifest


def from_sentences(sentences, tags: Sequence[str], manifest: dict) -> TaggedSet:
  """Splits (group, `Tagged`) by group.

  Raises:
    ConfigError: a tag that is none, or an empty sentence or split.
  """
  tags = check_names(tags, manifest['source'])

  def checked():
    for i, (group, example) in enumerate(sentences):
      yield group, check(example, len(tags), manifest['source'], i)

  train, validation, test, manifest = splits.by_group(checked(), manifest)
  return TaggedSet(splits.Examples(train, validation, test, manifest), tags)


def check_names(tags: Sequence[str], where: str) -> tuple[str, ...]:
  """The names of tags.

  Raises:
    ConfigError: one is neither `O` nor `B-` or `I-` and a kind.
  """
  for name in tags:
    if name != OUTSIDE and name[:2] not in ('B-', 'I-'):
      raise ConfigError(
        f'{where}: {name!r} is no IOB2 tag; tags are O, B-<kind> and I-<kind>'
      )
  return tuple(tags)


def check(example: Tagged, count: int, where: str, i: int) -> Tagged:
  """The sentence.

  Raises:
    ConfigError: it is empty, its words and tags do not pair, or a tag is none.
  """
  words, tags = example
  if not words or not all(words):
    raise ConfigError(f'{where}: record {i} has an empty word or no word')
  if len(words) != len(tags):
    raise ConfigError(
      f'{where}: record {i} has {len(words)} words and {len(tags)} tags'
    )
  for tag in tags:
    if not 0 <= tag < count:
      raise ConfigError(
        f'{where}: record {i} has tag {tag}, but there are {count} tags, 0 to '
        f'{count - 1}'
      )
  return example


class TaggedRows(rows.Rows):
  """inputs, segment_ids int32 [T]; by word: first, tags int32, weights f32.

  `first` is the place of a word's first token, where its tag is judged. There
  is room for T words; those that are not there have weight 0.
  """

  def row(self, example: Tagged):
    ids: list[int] = []
    first: list[int] = []
    for word in example.words:
      pieces = self.tokenizer.encode(f' {word}'.encode())
      if len(ids) + len(pieces) > self.length:
        break
      first.append(len(ids))
      ids += pieces.tolist()
    return {
      'inputs': self.fill(ids),
      'segment_ids': self.fill(np.ones(len(ids))),
      'first': self.fill(first),
      'tags': self.fill(example.tags[: len(first)]),
      'weights': self.fill(np.ones(len(first)), np.float32),
    }
