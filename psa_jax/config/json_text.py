"""JSON that somebody else may have written: read within bounds, or refused.

What a work directory or the data cache holds may be cut off, flipped or made
to harm. `json.loads` ends such text with four kinds of error, among them
RecursionError for text nested some thousand deep; here all of it is one,
`ValueError`, with a reason of a few words.

A file may be flipped and still be JSON, with another number in it. One that is
sealed carries the CRC-32 of its own content and cannot.
"""

import json
import os
import pathlib
import re
import zlib
from collections.abc import Mapping
from typing import Any

# No file of ours comes near either: the largest, a manifest of many files, has
# a few MiB, and the deepest, a configuration, five levels.
MOST_BYTES = 1 << 28
DEEPEST = 100
SEAL = 'crc32'
# Possessive, and the last quote may be missing: linear in the text's length.
_BRACKETS = re.compile(r'"(?:[^"\\]|\\.)*+"?|[\[\]{}]', re.DOTALL)


def read(path: str | os.PathLike) -> Any:
  """The value that a file holds.

  Raises:
    OSError: it cannot be read.
    ValueError: it is not JSON, too long or nested too deep.
  """
  with pathlib.Path(path).open('rb') as f:
    content = f.read(MOST_BYTES + 1)
  return parse(content)


def read_object(path: str | os.PathLike) -> dict[str, Any]:
  """The object that a file holds; as `read`, and no other value."""
  value = read(path)
  if not isinstance(value, dict):
    raise ValueError('it is no JSON object')
  return value


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
  """An object with the checksum of its content, to be written as JSON."""
  return {**value, SEAL: _checksum(value)}


def unsealed(value: Any, *, required: bool = True) -> dict[str, Any]:
  """What `sealed` was given, from what was read.

  Args:
    value: of a JSON text.
    required: without it, an object that has no checksum is as it was meant: a
      person or an older version wrote it.

  Raises:
    ValueError: it is no object, has no checksum or another content.
  """
  if not isinstance(value, dict):
    raise ValueError('it is no JSON object')
  if not required and SEAL not in value:
    return value
  content = {key: part for key, part in value.items() if key != SEAL}
  if SEAL not in value:
    raise ValueError(f'it has no {SEAL}')
  if value[SEAL] != _checksum(content):
    raise ValueError(
      f'it was altered: its {SEAL} is of another content (whoever edits it '
      f'takes {SEAL} out)'
    )
  return content


def _checksum(value: Mapping[str, Any]) -> str:
  return f'{zlib.crc32(json.dumps(value, sort_keys=True).encode()):08x}'


def parse(content: str | bytes) -> Any:
  """The value of a JSON text; bytes are UTF-8.

  Raises:
    ValueError: as `read`; the reason quotes nothing of the text.
  """
  if len(content) > MOST_BYTES:
    raise ValueError(f'it has more than {MOST_BYTES >> 20} MiB')
  if isinstance(content, bytes):
    try:
      content = content.decode('utf-8')
    except UnicodeDecodeError as e:
      raise ValueError(f'byte {e.start} is not UTF-8') from None
  # Few brackets cannot be deep, and most texts have few.
  many = content.count('[') + content.count('{') > DEEPEST
  if many and _depth(content) > DEEPEST:
    raise ValueError(f'it is nested more than {DEEPEST} deep')
  try:
    return json.loads(content)
  except json.JSONDecodeError as e:
    place = f'line {e.lineno} column {e.colno}'
    raise ValueError(f'it is not JSON: {e.msg} at {place}') from None
  except (ValueError, RecursionError):  # an integer of thousands of digits
    raise ValueError('it is not JSON: a number is too long') from None


def _depth(text: str) -> int:
  """How deep the brackets outside of strings go."""
  depth = deepest = 0
  for match in _BRACKETS.finditer(text):
    if match[0] in '[{':
      depth += 1
      deepest = max(deepest, depth)
    elif match[0] in ']}':
      depth -= 1
  return deepest
