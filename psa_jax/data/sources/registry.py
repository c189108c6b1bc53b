"""`data.source` to documents: one line for each kind of source."""

import difflib

from psa_jax.data.documents import TextSource

from psa_jax.config import ConfigError, DataConfig
from psa_jax.data import files, packaged, prepared


def load_documents(config: DataConfig) -> TextSource:
  """The documents that `config.source` names, in two splits.

  Raises:
    ConfigError: the source is unknown, missing, empty or unreadable.
  """
  kind, separator, rest = config.source.partition(':')
  if kind in packaged.PACKAGES and not separator:
    return packaged.source(kind, config)
  if kind == 'tfds' and rest:
    return prepared.source(rest, config)
  if kind == 'files' and rest:
    return files.source(rest)
  known = [*packaged.PACKAGES, 'tfds:<name>', 'files:<glob>']
  near = difflib.get_close_matches(config.source, known, n=1)
  hint = f'; did you mean {near[0]}?' if near else ''
  raise ConfigError(
    f'data.source is {config.source!r}, not one of {", ".join(known)}{hint}'
  )
