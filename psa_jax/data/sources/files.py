"""The user's own text: `files:<glob>`, each file a document.

Validation is every tenth file by sorted path, at least one. A single file
gives its last tenth. Empty files are left out. `matching` says which files
match, and that each counts once; `compressed`, which are read decompressed.
"""

from collections.abc import Sequence

from psa_jax.config import ConfigError, DataConfig, paths
from psa_jax.data.sources import compressed, matching
from psa_jax.data.sources.registry import DOCUMENTS, Source, register
from psa_jax.data.text import documents

_CHARACTER = 4  # bytes of a UTF-8 character, at most


class Files(Sequence[bytes]):
  """Contents of `paths`, read on demand."""

  def __init__(self, paths: Sequence[str]):
    self._paths = paths

  def __len__(self) -> int:
    return len(self._paths)

  def __getitem__(self, i) -> bytes:
    with matching.readable(self._paths[i]):
      return compressed.read(self._paths[i])


def load(config: DataConfig) -> documents.TextSource:
  """Files that match the pattern (`**` crosses folders, `~` is the home).

  Raises:
    ConfigError: no file matches, one cannot be read, or all are empty.
  """
  name = config.source
  pattern = paths.expanded(name.partition(':')[2], 'data.source')
  found = matching.files(pattern)
  if not found:
    raise ConfigError(
      f'data.source {name!r} matches no file{_hint(name, pattern)}'
    )
  texts = Files([file.path for file in found if _has_text(file)])
  if not len(texts):
    raise ConfigError(
      f'data.source {name!r}: all matching files ({len(found)}) are empty'
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


def _hint(name: str, pattern: str) -> str:
  if matching.any_match(pattern):
    return f'; try {name.rstrip("/")}/**/*.txt'
  if '[' in pattern:
    return '; [ begins a set of letters, and [[] stands for itself'
  return ''


def _has_text(file: matching.Found) -> bool:
  with matching.readable(file.path):
    return bool(file.size) and compressed.check(file.path)


def _split(texts: documents.Documents) -> documents.Splits:
  if len(texts) > 1:
    return documents.every_tenth(texts)
  text = texts[0]
  cut = _cut(text)
  if cut == 0:
    raise ConfigError(
      f'data.source: the only file holds {len(text)} bytes, too few to hold '
      'some out for validation; add text'
    )
  return documents.Splits([text[:cut]], [text[cut:]])


def _cut(text: bytes) -> int:
  """Where the last tenth begins: at a UTF-8 character, if there is any near."""
  cut = len(text) - max(1, len(text) // 10)
  for place in range(cut, max(-1, cut - _CHARACTER), -1):
    if text[place] & 0xC0 != 0x80:
      return place
  return cut


register(Source('files:<glob>', yields={DOCUMENTS: load}))
