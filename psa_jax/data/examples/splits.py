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

from psa_jax.config import ConfigError

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
    examples = getattr(self, name)
    if examples is None or not len(examples):
      source, secret = self.manifest['source'], name == 'test' and self.secret
      what = 'public labels in its test' if secret else name
      raise ConfigError(
        f'{source} has no {what} split; set eval.split to another one'
      )
    return examples


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
