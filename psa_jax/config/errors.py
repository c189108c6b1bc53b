"""The errors of psa_jax, and how a refused value is worded.

Every message is one line that names the key, what is wrong with it and the way
out. The wording is here once; who refuses only says what and where.
"""

import difflib
import re
from collections.abc import Iterable
from typing import Any

# Longer words than any key: more would only make the search for the nearest
# key slow and the message unreadable.
_LONGEST = 200
# Of a whole message, and of a word in it: a path may be longer than a key.
_LONGEST_LINE = 3000
_LONGEST_WORD = 500


class _Bounded(Exception):
  """An error whose message is cut where it quotes something endless."""

  def __init__(self, text: object):
    super().__init__(bounded(str(text)))


class ConfigError(_Bounded, ValueError):
  """A request that is refused before anything runs: a key, a value, a flag.

  The text is one line and the whole message; the command line exits with 2.
  """


class RunError(_Bounded, RuntimeError):
  """A run that cannot go on for a reason outside the program.

  A checkpoint that cannot be read, a full disk, a loss that is not finite. The
  text is one line and the whole message; the command line exits with 1.
  """


class StalledError(RunError):
  """A run whose threads wait for a disk, perhaps for ever.

  The process has to be left without waiting for them.
  """


def nearest(word: str, options: Iterable[str]) -> str:
  """The option most like `word`; there must be one."""
  return max(options, key=lambda option: likeness(word, option))


def likeness(word: str, option: str) -> float:
  """How alike two words are, from 0 to 1, whatever their case."""
  word, option = word[:_LONGEST].lower(), option.lower()
  return difflib.SequenceMatcher(None, word, option).ratio()


def shown(value: Any) -> str:
  """`repr` of a value, cut where it is longer than a line can hold."""
  try:
    return cut(repr(value))
  except Exception:  # an integer of thousands of digits, a class of a recipe
    return f'a {type(value).__name__}'


def cut(text: str, most: int = _LONGEST) -> str:
  """A text up to `most` characters; three dots say that there was more."""
  return text if len(text) <= most else f'{text[:most]}...'


def bounded(text: str) -> str:
  """A message whose words, and which itself, are cut where they are endless."""
  words = re.sub(rf'\S{{{_LONGEST_WORD},}}', lambda m: _short(m[0]), text)
  return cut(words, _LONGEST_LINE)


def _short(word: str) -> str:
  return cut(word, _LONGEST_WORD)


def line(error: object) -> str:
  """An error as one bounded line, which moves no terminal's cursor."""
  text = ' '.join(bounded(str(error)).split())
  return ''.join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def unknown(path: str, value: Any, options: Iterable[str]) -> str:
  """The message for a name that is not among `options`."""
  options = tuple(options)
  if not options:
    return f'{path}: unknown {shown(value)}; there are no options'
  hint = nearest(str(value), options)
  return (
    f'{path}: unknown {shown(value)}; did you mean {hint!r}? '
    f'options: {", ".join(options)}'
  )


def wrong_type(path: str, expected: str, value: Any, hint: str = '') -> str:
  """The message for a value of another type."""
  return f'{path}: expected {expected}, got {shown(value)}{hint}'
