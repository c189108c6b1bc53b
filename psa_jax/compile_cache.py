"""Where compiled programs are kept between runs of the command line.

JAX can write what it has compiled to a folder and read it back. launch.py turns
that on, in a folder of its own with a bound on its size; a cache that the user
or a test has set up already, in JAX's own variables, stays as it is.
"""

import hashlib
import os
import pathlib
import platform
from collections.abc import MutableMapping

FOLDER = 'PSA_JAX_CACHE_DIR'
MAX_BYTES = 2 * 2**30
# Compiling takes longer than reading for all but the smallest programs.
MIN_SECONDS = 0.1


def turn_on(environ: MutableMapping[str, str] = os.environ) -> str | None:
  """Sets the variables that JAX reads when it is imported.

  Args:
    environ: of the process; JAX must not be imported yet.

  Returns:
    The folder, or None if JAX's own variable names one already.
  """
  if 'JAX_COMPILATION_CACHE_DIR' in environ:
    return None
  folder = str(_folder(environ))
  environ['JAX_COMPILATION_CACHE_DIR'] = folder
  environ.setdefault('JAX_COMPILATION_CACHE_MAX_SIZE', str(MAX_BYTES))
  environ.setdefault(
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', str(MIN_SECONDS)
  )
  return folder


def _folder(environ: MutableMapping[str, str]) -> pathlib.Path:
  chosen, cache = environ.get(FOLDER), environ.get('XDG_CACHE_HOME')
  root = pathlib.Path(cache) if cache else pathlib.Path.home() / '.cache'
  base = pathlib.Path(chosen) if chosen else root / 'psa_jax'
  return base / f'compiled-{_machine()}'


def _machine() -> str:
  """This kind of CPU, in a word.

  Programs for the CPU are machine code: one of a newer processor that shares
  the home folder ends with an illegal instruction here.
  """
  try:
    text = pathlib.Path('/proc/cpuinfo').read_text()
  except OSError:
    text = platform.processor()
  flags = {
    line.partition(':')[2]
    for line in text.splitlines()
    if line.startswith(('flags', 'Features', 'model name'))
  }
  described = ''.join(sorted(flags)) or text
  digest = hashlib.sha256(described.encode()).hexdigest()[:8]
  return f'{platform.machine()}-{digest}'
