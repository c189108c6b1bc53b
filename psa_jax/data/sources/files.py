"""The user's own text: `files:<glob>`, each file a document.

Validation is every tenth file by sorted path, at least one. A single file
gives its last tenth. Empty files are left out.
"""

import contextlib
import glob
import os
from collections.abc import Sequence

from psa_jax.config import ConfigError, DataConfig
from psa_jax.data.sources.registry import DOCUMENTS, Source, register
from psa_jax.data.text import documents


class Files(Sequence[bytes]):
  """Contents of `paths`, read on demand."""

  def __init__(self, paths: Sequence[str]):
    self._paths = paths

  def __len__(self) -> int:
    return len(self._paths)

  def __getitem__(self, i) -> bytes:
    with _readable(self._paths[i]), open(self._paths[i], 'rb') as f:
      return f.read()


def load(config: DataConfig) -> documents.TextSource:
  """Files that match the pattern (`**` crosses folders, `~` is the home).

  Raises:
    ConfigError: no file matches, one cannot be read, or all are empty.
  """
  name, pattern = config.source, config.source.partition(':')[2]
  matches = sorted(glob.glob(os.path.expanduser(pattern), recursive=True))
  paths = [path for path in matches if not os.path.isdir(path)]
  if not paths:
    hint = f'; try {name.rstrip("/")}/**/*.txt' if matches else ''
    raise ConfigError(f'data.source {name!r} matches no file{hint}')
  texts = Files([path for path in paths if _size(path)])
  if not len(texts):
    raise ConfigError(
      f'data.source {name!r}: all matching files ({len(paths)}) are empty'
    )
  splits = _split(texts)
  content = documents.sha256(splits)
  held_out = 'every tenth file by sorted path'
  if len(texts) == 1:
    held_out = 'last tenth of the only file'
  manifest = {
    'source': name,
    'package': 'files',
    'version': content[:12],
    'held_out': held_out,
    'documents': len(texts),
    'sha256': content,
  }
  return documents.TextSource(manifest, content, lambda: splits)


def _size(path: str) -> int:
  with _readable(path):
    return os.path.getsize(path)


@contextlib.contextmanager
def _readable(path: str):
  try:
    yield
  except OSError as e:
    raise ConfigError(
      f'data.source: cannot read {path}: {e.strerror}; fix the file or leave '
      'it out of the pattern'
    ) from e


def _split(texts: Files) -> documents.Splits:
  if len(texts) > 1:
    return documents.every_tenth(texts)
  text = texts[0]
  cut = len(text) - max(1, len(text) // 10)
  while cut > 0 and text[cut] & 0xC0 == 0x80:  # inside a UTF-8 character
    cut -= 1
  if cut == 0:
    raise ConfigError(
      f'data.source: the only file holds {len(text)} bytes, too few to hold '
      'some out for validation; add text'
    )
  return documents.Splits([text[:cut]], [text[cut:]])


register(Source('files:<glob>', yields={DOCUMENTS: load}))
