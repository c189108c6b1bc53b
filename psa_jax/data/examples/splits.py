"""Examples of a task in three splits, by whatever a task calls an example.

A split is a sequence that may read a record only when it is asked for one.
`by_group` shares examples out by the group they belong to (the chapter of a
verse, the package of a description), so that what belongs together is never on
both sides and the seed of a run does not matter: every tenth group where groups
are numbered, a hash of the name where they are not.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from psa_jax.config import ConfigError, DataConfig

T = TypeVar('T')
TENTHS = 10  # one of them is the test split, one validation


@dataclass(frozen=True)
class Examples:
  """The three splits of a set.

  Attributes:
    train, validation, test: sequences of examples; the test split may be None
      where a set has none.
    manifest: source, package, version, hash and counts; plain JSON values.
    secret: whether a test split is left out because its labels are not public.
  """

  train: Any
  validation: Any
  test: Any
  manifest: dict
  secret: bool = False

  def split(self, name: str) -> Any:
    """The split `eval.split` names.

    Raises:
      ConfigError: it is not there.
    """
    found = getattr(self, name)
    if found is None or not len(found):
      source, secret = self.manifest['source'], name == 'test' and self.secret
      what = 'public labels in its test' if secret else name
      raise ConfigError(
        f'{source} has no {what} split; set eval.split to another one'
      )
    return found


class Mapped(Sequence):
  """Items of a sequence through a function, one at a time.

  Attributes:
    items: the sequence.
  """

  def __init__(self, items: Any, change: Callable[[int, Any], Any]):
    """Of `change(i, item)`."""
    self.items, self._change = items, change

  def __len__(self) -> int:
    return len(self.items)

  def __getitem__(self, i):
    if not 0 <= i < len(self):
      raise IndexError(f'example {i} of {len(self)}')
    return self._change(int(i), self.items[int(i)])


def by_group(
  examples: Iterable[tuple[object, T]], manifest: dict
) -> tuple[list[T], list[T], list[T], dict]:
  """Train, validation and test: 8, 1 and 1 tenths of the groups.

  Args:
    examples: (number or name of the group, example).
    manifest: what they are.

  Returns:
    The splits, and the manifest with their sizes.

  Raises:
    ConfigError: a split is empty.
  """
  parts: list[list[T]] = [[], [], []]
  for group, example in examples:
    number = group if isinstance(group, int) else _number(group)
    parts[{0: 1, 5: 2}.get(number % TENTHS, 0)].append(example)
  names = 'train', 'validation', 'test'
  sizes = dict(zip(names, map(len, parts), strict=True))
  for name, size in sizes.items():
    if not size:
      raise ConfigError(f'{manifest["source"]}: the {name} split is empty')
  train, validation, test = parts
  return train, validation, test, {**manifest, **sizes}


def _number(group: object) -> int:
  digest = hashlib.sha256(str(group).encode()).digest()
  return int.from_bytes(digest[:4], 'big')


def from_tfds(
  name: str,
  config: DataConfig,
  keys: Sequence[str],
  example: Callable[[str, int, Any], Any],
  *,
  label_key: str = '',
) -> tuple[Examples, Any]:
  """A prepared TFDS set, read a record at a time.

  The validation split is the set's own, else every twentieth record of train,
  which is left out there. The test split is the set's own, if it has one whose
  labels are public.

  Args:
    name: as in `data.source=tfds:<name>`.
    config: where data lies.
    keys: features that a record must have.
    example: turns (where, index, record) into an example.
    label_key: feature that is below 0 where a label is kept secret, as in the
      test split of ImageNet or of GLUE.

  Returns:
    The splits and the set's features.

  Raises:
    ConfigError: no such set, not prepared, or without these features.
  """
  from psa_jax.data import folder, prepared

  builder = prepared.find_builder(name, folder.data_dir(config))
  features = builder.info.features
  for key in keys:
    if key not in features:
      raise ConfigError(
        f'tfds:{name} has no feature {key!r}, only {", ".join(features)}; set '
        'the keys of config.data to those'
      )
  known = list(builder.info.splits) or ['train', 'validation']

  def records(split):
    found = prepared.open_split(name, builder, split, config)
    where = f'tfds:{name}, {split}'
    return Mapped(found, lambda i, record: example(where, i, record))

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
  return Examples(train, validation, test, manifest, secret), features


def _secret(records: Any, key: str) -> bool:
  """Whether labels are below 0, in a few records from all over a split."""
  count = len(records)
  places = {i * count // 5 for i in range(5)} if count else set()
  some = [records[i][key] for i in sorted(places)]
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


def text_of(value: Any, where: str, i: int) -> bytes:
  """A record's text.

  Raises:
    ConfigError: it is empty.
  """
  if isinstance(value, np.ndarray | np.generic):
    value = value.item()
  value = value.encode() if isinstance(value, str) else bytes(value)
  if not value.strip():
    raise ConfigError(f'{where}: the text of record {i} is empty; remove it')
  return value
