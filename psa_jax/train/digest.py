"""What the files of a finished checkpoint are: size and CRC-32 of each one.

Written into a checkpoint before it gets its name and compared before anything
in it is read: a truncated file would cost pages of tracebacks from Orbax's
threads, and a flipped bit in an array is restored as if nothing were wrong.
"""

import json
import os
import pathlib
import zlib

from psa_jax.config import json_text

DIGEST = 'digest.json'


def write(folder: pathlib.Path) -> None:
  """Writes the digest of all that lies in the folders of `folder`."""
  (folder / DIGEST).write_text(json.dumps(_digest(folder)))


def damage(folder: pathlib.Path) -> str | None:
  """What is wrong with the files of a checkpoint, in a few words.

  Raises:
    OSError: a file is there and cannot be read, so nothing is known of it.
  """
  try:
    expected = json_text.read_object(folder / DIGEST)
  except FileNotFoundError:
    return f'{DIGEST} is missing'
  except ValueError as e:
    return f'{DIGEST}: {e}'
  digest = _digest(folder)
  if not digest:
    return 'there are no files in it'
  if not _is_digest(expected):
    return f'{DIGEST} names no files'
  for name, (size, checksum) in expected.items():
    if name not in digest:
      return f'{name} is missing'
    if digest[name][0] != size:
      return f'{name} has {digest[name][0]} bytes, not {size}'
    if digest[name][1] != checksum:
      return f'{name} was altered'
  for name in digest.keys() - expected.keys():
    return f'{name} is not in {DIGEST}'
  return None


def _is_digest(value: dict) -> bool:
  return bool(value) and all(
    isinstance(x, list) and len(x) == 2 for x in value.values()
  )


def _digest(folder: pathlib.Path) -> dict[str, tuple[int, int]]:
  """Size and CRC-32 of every file in the folder's items.

  Files beside the items are Orbax's own notes, written last of all.
  """

  def fail(error: OSError):
    raise error

  digest = {}
  for parent, _, names in os.walk(folder, onerror=fail):
    for name in names if pathlib.Path(parent) != folder else ():
      path = pathlib.Path(parent, name)
      size, checksum = 0, 0
      with path.open('rb') as f:
        while block := f.read(1 << 20):
          size, checksum = size + len(block), zlib.crc32(block, checksum)
      digest[path.relative_to(folder).as_posix()] = (size, checksum)
  return dict(sorted(digest.items()))
