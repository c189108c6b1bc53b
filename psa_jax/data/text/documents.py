"""What every text source is: two sequences of documents and their identity.

A document is `bytes`; nothing here decodes text, so any encoding survives.
"""

import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable


@runtime_checkable
class Documents(Protocol):
  """What is used of `Sequence[bytes]`.

  A protocol, because run-time type checks look into a sequence, and a look
  into one of these may read a file.
  """

  def __len__(self) -> int: ...

  def __getitem__(self, i: int, /) -> bytes: ...

  def __iter__(self) -> Iterator[bytes]: ...


class Splits(NamedTuple):
  """Documents to learn from and documents to be judged on."""

  train: Documents
  validation: Documents


@dataclass(frozen=True)
class TextSource:
  """Documents of one source, read only when they are asked for.

  Attributes:
    manifest: where the text is from (source, package, version, ...); plain
      JSON values.
    key: changes whenever the content may have changed; names cached work.
    read: returns the documents.
  """

  manifest: dict
  key: str
  read: Callable[[], Splits]

  @functools.cached_property
  def splits(self) -> Splits:
    return self.read()

  @property
  def train(self) -> Documents:
    return self.splits.train

  @property
  def validation(self) -> Documents:
    return self.splits.validation


class Selection(Sequence[bytes]):
  """Some items of a sequence, in the order of `indices`, read on demand."""

  def __init__(self, documents: Documents, indices: Sequence[int]):
    self._documents = documents
    self._indices = indices

  def __len__(self) -> int:
    return len(self._indices)

  def __getitem__(self, i):
    return self._documents[self._indices[i]]


def every_tenth(documents: Documents) -> Splits:
  """Holds out documents 0, 10, 20, ... for validation."""
  indices = range(len(documents))
  return Splits(
    Selection(documents, [i for i in indices if i % 10]),
    Selection(documents, indices[::10]),
  )


class Measure(NamedTuple):
  """What one pass over documents finds out.

  Attributes:
    documents, bytes: how many.
    sha256: of the contents in order; lengths keep the borders in it.
    nul: whether any byte is 0.
  """

  documents: int
  bytes: int
  sha256: str
  nul: bool


def measure(documents: Iterable[bytes]) -> Measure:
  """Counts and hashes documents."""
  digest, count, total, nul = hashlib.sha256(), 0, 0, False
  for document in documents:
    digest.update(len(document).to_bytes(8, 'little'))
    digest.update(document)
    count, total = count + 1, total + len(document)
    nul = nul or b'\0' in document
  return Measure(count, total, digest.hexdigest(), nul)


def sha256(splits: Splits) -> str:
  """Hash of a whole set."""
  return combined_sha256(*(measure(split).sha256 for split in splits))


def combined_sha256(train: str, validation: str) -> str:
  """Hash of a whole set, from the hashes of its two splits."""
  return hashlib.sha256(f'{train} {validation}'.encode()).hexdigest()
