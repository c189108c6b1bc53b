"""A path as a user writes it: on the command line, in a key, in a variable.

`expanded` is the one place that reads `~`. Paths that the program makes itself,
and those that Python code passes, are taken as they are.
"""

import os

from psa_jax.config.errors import ConfigError, shown


def expanded(text: str | os.PathLike[str], key: str) -> str:
  """The path with `~` or `~user` at its beginning replaced.

  Args:
    text: the path, or a pattern of paths; nothing is read or made.
    key: what set it, for the message.

  Raises:
    ConfigError: no file can have that name, or there is no such home.
  """
  problem = unusable(text, key)
  if problem:
    raise ConfigError(problem)
  return os.path.expanduser(text)


def unusable(text: str | os.PathLike[str], key: str) -> str:
  """One line about a path that `expanded` refuses; empty where it does not."""
  text = os.fspath(text)
  if '\0' in text:
    return f'{key}: {shown(text)} holds a NUL character; choose another path'
  try:
    text.encode()
  except UnicodeEncodeError:
    # It could not be written into the record of a run.
    return f'{key}: {shown(text)} is not UTF-8; choose another path'
  if not text.startswith('~'):
    return ''
  user = text[1:].split('/')[0]
  # Without a home, Python leaves `~` in the path; an empty one gives `/`.
  known = os.path.expanduser(text) != text
  if known and (user or os.environ.get('HOME') != ''):
    return ''
  if user:
    return (
      f'{key}: {shown(text)}: there is no user {user}; write it as '
      f'{shown("./" + text)} for a file of that name'
    )
  return (
    f'{key}: {shown(text)}: there is no home folder; set HOME or write the '
    'path without ~'
  )
