"""Bytes to token ids and back, exactly, for any bytes.

Id 0 separates documents and never comes out of `encode`; in the packed stream
it stands for one byte, NUL, so bits per byte is the loss in bits for the byte
tokenizer.

`bytes`: the id of a byte is its value, vocabulary 256. Should the text itself
hold a NUL byte, that byte gets id 256 (vocabulary 257), so 0 keeps its
meaning.

`bpe:<size>`: byte-pair encoding (Sennrich et al. 2016, arXiv:1508.07909)
trained on the train split with the `tokenizers` library. Each byte is handed
to it as the Latin-1 character of the same number; all 256 are in the
vocabulary, so there is no unknown token and no need for valid UTF-8. Words
are runs of letters or of bytes from 128 up, up to three digits, or
punctuation, each with one space before, and white space.
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32, Integer

from psa_jax.config import ConfigError, DataConfig

SEPARATOR = 0
_SEPARATOR_BYTES = b'\0'
# Not a Latin-1 character: no text can contain it.
_SEPARATOR_TOKEN = '\u2400'
_SMALLEST_BPE = 257  # every byte and the separator
_TRAINING_BYTES = 2**28  # merges settle long before; bounds time and memory
_SPACE = r' \t\n\r\x{0b}\x{0c}'
_WORDS = (
  r' ?[A-Za-z\x{80}-\x{ff}]+'
  r'| ?[0-9]{1,3}'
  rf'| ?[^{_SPACE}A-Za-z0-9\x{{80}}-\x{{ff}}]+'
  rf'|[{_SPACE}]+(?![^{_SPACE}])'
  rf'|[{_SPACE}]+'
)


@runtime_checkable
class Tokenizer(Protocol):
  """Documents to ids and back.

  Attributes:
    name: as in `data.tokenizer`.
    vocab_size: ids are 0 to vocab_size - 1.
    token_bytes: what each id stands for; the separator for one byte.
  """

  @property
  def name(self) -> str: ...

  @property
  def vocab_size(self) -> int: ...

  @property
  def token_bytes(self) -> tuple[bytes, ...]: ...

  def encode(self, text: bytes) -> Int32[np.ndarray, 'T']: ...

  def encode_all(
    self, documents: Iterable[bytes]
  ) -> Iterator[Int32[np.ndarray, 'T']]: ...

  def decode(self, ids: Integer[np.ndarray, 'T'] | Sequence[int]) -> bytes: ...


def byte_lengths(tokenizer: Tokenizer) -> Int32[np.ndarray, 'V']:
  """Bytes that each id stands for: what bits per byte divides by."""
  return np.array([len(b) for b in tokenizer.token_bytes], np.int32)


@dataclasses.dataclass(frozen=True)
class ByteTokenizer:
  """One id a byte; `nul` adds the id that text with NUL bytes needs."""

  nul: bool = False
  name: str = 'bytes'

  @property
  def vocab_size(self) -> int:
    return 257 if self.nul else 256

  @functools.cached_property
  def token_bytes(self) -> tuple[bytes, ...]:
    """Byte i for id i; the real NUL has id 256."""
    single = tuple(bytes([i]) for i in range(256))
    return single + (b'\0',) if self.nul else single

  def encode(self, text: bytes) -> Int32[np.ndarray, 'T']:
    """Ids of `text`.

    Raises:
      ConfigError: a NUL byte without `nul`.
    """
    ids = np.frombuffer(text, np.uint8).astype(np.int32)
    if b'\0' in text:
      if not self.nul:
        raise ConfigError(
          'the text holds a NUL byte, which this model has no token for; '
          'remove it'
        )
      ids[ids == 0] = 256
    return ids

  def encode_all(self, documents: Iterable[bytes]):
    """`encode` of each."""
    return map(self.encode, documents)

  def decode(self, ids: Integer[np.ndarray, 'T'] | Sequence[int]) -> bytes:
    """The bytes of `ids`; separators come out as NUL."""
    return np.asarray(ids).astype(np.uint8).tobytes()  # 256 wraps to 0


class BpeTokenizer:
  """A trained byte-pair encoding; see the module's docstring."""

  def __init__(self, model: Any):
    self._model = model
    self.vocab_size = model.get_vocab_size()
    self.name = f'bpe:{self.vocab_size}'
    tokens = [model.id_to_token(i) for i in range(1, self.vocab_size)]
    self.token_bytes = (
      _SEPARATOR_BYTES,
      *(token.encode('latin-1') for token in tokens),
    )

  @classmethod
  def train(cls, documents: Iterable[bytes], *, size: int) -> 'BpeTokenizer':
    """Learns up to `size` tokens; fewer where the text has fewer pairs."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.Split(Regex(_WORDS), 'isolated')
    trainer = trainers.BpeTrainer(
      vocab_size=size,
      special_tokens=[_SEPARATOR_TOKEN],
      initial_alphabet=[chr(i) for i in range(256)],
      show_progress=False,
    )
    texts = (text.decode('latin-1') for text in _sample(documents))
    model.train_from_iterator(texts, trainer)
    return cls(model)

  @classmethod
  def load(cls, path: Path) -> 'BpeTokenizer':
    """What `save` wrote."""
    from tokenizers import Tokenizer

    return cls(Tokenizer.from_str(path.read_text('utf8')))

  def save(self, path: Path) -> None:
    """Writes the `tokenizers` library's JSON."""
    path.write_text(self._model.to_str(), 'utf8')

  def encode(self, text: bytes) -> Int32[np.ndarray, 'T']:
    """Ids of `text`."""
    return next(self.encode_all([text]))

  def encode_all(self, documents: Iterable[bytes]):
    """`encode` of each, a few at a time so that every core works."""
    batch: list[str] = []
    for text in documents:
      batch.append(text.decode('latin-1'))
      if len(batch) == 32:
        yield from self._encode_batch(batch)
        batch = []
    yield from self._encode_batch(batch)

  def _encode_batch(self, texts: list[str]):
    # The "fast" variant leaves out offsets, two thirds of the time.
    for encoding in self._model.encode_batch_fast(texts):
      yield np.array(encoding.ids, np.int32)

  def decode(self, ids: Integer[np.ndarray, 'T'] | Sequence[int]) -> bytes:
    """The bytes of `ids`; separators come out as NUL."""
    return b''.join(self.token_bytes[i] for i in ids)


def make_tokenizer(
  config: DataConfig,
  train_documents: Iterable[bytes],
  *,
  nul: bool = False,
) -> Tokenizer:
  """The tokenizer that `config.tokenizer` names, trained if need be.

  Args:
    config: `tokenizer` is `bytes` or `bpe:<size>`.
    train_documents: what a trained tokenizer learns from.
    nul: whether any document of any split holds a NUL byte.
  """
  size = bpe_size(config.tokenizer)
  if size is None:
    return ByteTokenizer(nul)
  return BpeTokenizer.train(train_documents, size=size)


def bpe_size(name: str) -> int | None:
  """The size in `bpe:<size>`, or None for `bytes`.

  Raises:
    ConfigError: neither of the two, or a size that cannot be.
  """
  if name == 'bytes':
    return None
  kind, _, size = name.partition(':')
  if kind != 'bpe' or not size.isdecimal():
    raise ConfigError(
      f'data.tokenizer is {name!r}, not bytes or bpe:<vocabulary size>'
    )
  if not _SMALLEST_BPE <= int(size) <= 2**20:
    raise ConfigError(
      f'data.tokenizer is {name!r}, but a size must be {_SMALLEST_BPE} (every '
      f'byte and the separator) to {2**20}'
    )
  return int(size)


def _sample(documents: Iterable[bytes]) -> Iterator[bytes]:
  """The first documents, up to a size that bounds training."""
  taken = 0
  for text in documents:
    if taken >= _TRAINING_BYTES:
      return
    taken += len(text)
    yield text
