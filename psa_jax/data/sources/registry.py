"""Which `data.source` there is, and what each of them yields.

A source is a file of this folder that ends with one `register(Source(...))`,
and a line in `__init__.py` that imports it. Nothing else lists sources: a task
says which kind of data it reads, and any source that yields it will do.
"""

import dataclasses
import difflib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from psa_jax.config import ConfigError, DataConfig

# What a source may yield, in the words of an error.
DOCUMENTS = 'documents'  # text.documents.TextSource
LABELLED = 'labelled texts'  # examples.labelled.LabelledSet
TAGGED = 'tagged words'  # examples.tagged.TaggedSet
PAIRS = 'translations'  # examples.pairs.PairSet
IMAGES = 'images'  # images.sets.ImageSet or PreparedImages
QUESTIONS = 'questions'  # synthetic.Recall


def _no_problem(config: DataConfig) -> Iterator[str]:
  del config
  return iter(())


@dataclasses.dataclass(frozen=True)
class Source:
  """A place where data comes from.

  Attributes:
    name: value of `data.source`; `<...>` in it stands for any text.
    yields: kind of data -> function that loads it. It may raise ConfigError
      where the data is missing or unfit, RunError where the cache cannot be
      used; what it returns has a `manifest`.
    pattern: regular expression of the values; empty means that of `name`.
    check: one line for each setting of the source that cannot be, before
      anything is read.
    prepare: fetches or writes the data ahead of a run and returns what it
      holds; None where nothing has to be prepared.
    lock: what says that `prepare` fetches what was meant, a hash or a
      signature; `make audit` lists it.
  """

  name: str
  yields: Mapping[str, Callable[[DataConfig], Any]]
  pattern: str = ''
  check: Callable[[DataConfig], Iterator[str]] = _no_problem
  prepare: Callable[[DataConfig], str] | None = None
  lock: str = ''

  def matches(self, value: str) -> bool:
    """Whether `data.source=value` means this source."""
    pattern = self.pattern or re.sub('<.*?>', '.+', self.name)
    return re.fullmatch(pattern, value) is not None


_SOURCES: dict[str, Source] = {}


def register(source: Source) -> Source:
  """Makes a source known by its name.

  Raises:
    ValueError: there is one of that name.
  """
  if source.name in _SOURCES:
    raise ValueError(f'there is a source {source.name} already')
  _SOURCES[source.name] = source
  return source


def every() -> tuple[Source, ...]:
  """All sources, sorted by name."""
  return tuple(source for _, source in sorted(_SOURCES.items()))


def names(kind: str = '') -> tuple[str, ...]:
  """Names of all sources, or of those that yield a kind of data."""
  return tuple(s.name for s in every() if not kind or kind in s.yields)


def find(value: str) -> Source | None:
  """The source that `data.source=value` means, if there is one."""
  return next((s for s in _SOURCES.values() if s.matches(value)), None)


def unknown(value: str, kind: str = '') -> str:
  """One line about a `data.source` that is none."""
  known = names(kind)
  near = difflib.get_close_matches(value, known, n=1)
  hint = f'; did you mean {near[0]}?' if near else ''
  return f'data.source is {value!r}, not one of {", ".join(known)}{hint}'


def load(config: DataConfig, kind: str) -> Any:
  """The data of `config.source`, of one of the kinds above.

  Raises:
    ConfigError: no such source, one that yields something else, or data that
      is missing or unfit.
    RunError: the data cache cannot be used.
  """
  source = find(config.source)
  if source is None:
    raise ConfigError(unknown(config.source, kind))
  if kind not in source.yields:
    raise ConfigError(
      f'data.source {config.source!r} has no {kind}; choose one of '
      f'{", ".join(names(kind))}'
    )
  return source.yields[kind](config)
