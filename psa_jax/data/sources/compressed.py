"""Files that are compressed: read as the text in them, or refused by name.

What a file is, its first bytes say, not its name. gzip, bzip2 and xz are read
decompressed, one file a document; archives of several files (zip, tar, 7z,
rar) and what Python cannot decompress (zstd, lz4, compress) are refused, as are
archives inside a compressed file.

A document is in memory as a whole, and a small file may decompress to a huge
one, so `LARGEST` bounds what is read of a compressed file.
"""

import bz2
import gzip
import lzma
import os
import zlib
from collections.abc import Callable
from typing import Any

from psa_jax.config import ConfigError

LARGEST = 2**30  # bytes of a document
_CHUNK = 2**20
_HEAD = 265  # bytes that tell what a file is
# First bytes, the name of the format, and what opens it here.
_OPENED = (
  (b'\x1f\x8b\x08', 'gzip', gzip.open),
  (b'BZh', 'bzip2', bz2.open),
  (b'\xfd7zXZ\0', 'xz', lzma.open),
)
# First bytes, the name of the format, and the command that unpacks it.
_REFUSED = (
  (b'\x28\xb5\x2f\xfd', 'zstd', 'zstd -d'),
  (b'\x04\x22\x4d\x18', 'lz4', 'lz4 -d'),
  (b'\x1f\x9d', 'compress', 'uncompress'),
  (b'PK\3\4', 'zip', 'unzip'),
  (b'PK\5\6', 'zip', 'unzip'),
  (b'7z\xbc\xaf\x27\x1c', '7z', '7z x'),
  (b'Rar!\x1a\x07', 'rar', 'unrar x'),
)
_TAR = slice(257, 262), b'ustar'
# Suffixes whose files must begin as the format says.
_SUFFIXES = {
  '.gz': 'gzip',
  '.bz2': 'bzip2',
  '.xz': 'xz',
  '.zst': 'zstd',
  '.lz4': 'lz4',
  '.zip': 'zip',
}


def read(path: str) -> bytes:
  """The content of a file, decompressed.

  Raises:
    ConfigError: it is damaged or larger than `LARGEST`.
    OSError: it cannot be read.
  """
  opener = _opener(path)
  if opener is None:
    with open(path, 'rb') as f:
      return f.read()
  return _decompressed(path, opener, LARGEST + 1)


def check(path: str) -> bool:
  """Whether there is any text in a file that is not empty.

  Raises:
    ConfigError: it is of a kind that is not read, or damaged at its beginning.
    OSError: it cannot be read.
  """
  with open(path, 'rb') as f:
    head = f.read(_HEAD)
  _refuse(path, head)
  name = _format(head)
  claimed = _SUFFIXES.get(os.path.splitext(path)[1].lower())
  if claimed and claimed != name:
    raise ConfigError(
      f'data.source: {path!r} is no {claimed} file, as its name says; mend or '
      'rename it, or leave it out of the pattern'
    )
  opener = _opener(path)
  if opener is None:
    return bool(head)
  head = _decompressed(path, opener, _HEAD)
  if _format(head):
    raise _unread(path, f'a {_format(head)} file in a {name} file', 'unpack it')
  _refuse(path, head)
  return bool(head)


def _format(head: bytes) -> str:
  """Name of a format that is read, or empty."""
  if head[:3] == b'BZh' and head[4:10] not in (
    b'1AY&SY',
    b'\x17\x72\x45\x38\x50\x90',  # the end of an empty one
  ):
    return ''
  return next((n for magic, n, _ in _OPENED if head.startswith(magic)), '')


def _opener(path: str) -> Callable[..., Any] | None:
  with open(path, 'rb') as f:
    name = _format(f.read(_HEAD))
  return next((opener for _, n, opener in _OPENED if n == name), None)


def _refuse(path: str, head: bytes) -> None:
  for magic, name, command in _REFUSED:
    if head.startswith(magic):
      raise _unread(path, f'a {name} file', f'unpack it ({command})')
  place, magic = _TAR
  if head[place] == magic:
    raise _unread(path, 'a tar archive', 'unpack it (tar -xf)')


def _unread(path: str, what: str, remedy: str) -> ConfigError:
  return ConfigError(
    f'data.source: {path!r} is {what}, which is not read; {remedy} or leave it '
    'out of the pattern'
  )


def _decompressed(path: str, opener: Callable[..., Any], most: int) -> bytes:
  """At most `most` bytes; memory grows with what there is, not with `most`."""
  content = bytearray()
  try:
    with opener(path) as f:
      while len(content) < most:
        chunk = f.read(min(_CHUNK, most - len(content)))
        if not chunk:
          break
        content += chunk
  except (EOFError, OSError, zlib.error, lzma.LZMAError) as e:
    raise ConfigError(
      f'data.source: {path!r} cannot be decompressed: {e}; mend it or leave it '
      'out of the pattern'
    ) from e
  if len(content) > LARGEST:
    raise ConfigError(
      f'data.source: {path!r} decompresses to more than {LARGEST:,} bytes; '
      'unpack it and split it'
    )
  return bytes(content)
