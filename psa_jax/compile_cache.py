"""Where compiled programs are kept between runs of the command line.

JAX can write what it has compiled to a folder and read it back. launch.py turns
that on, in a folder of its own with a bound on its size; a cache that the user
or a test has set up already, in JAX's own variables, stays as it is.
"""

import hashlib
import os
import pathlib
import platform
from collections.abc import Mapping

import jax

from psa_jax.config import paths

FOLDER = 'PSA_JAX_CACHE_DIR'
MAX_BYTES = 2 * 2**30
# Compiling takes longer than reading for all but the smallest programs.
MIN_SECONDS = 0.1


def turn_on() -> None:
  """Keeps what this process compiles from now on, as `settings` says."""
  for name, value in settings(os.environ).items():
    jax.config.update(name, value)


def settings(environ: Mapping[str, str]) -> dict[str, str | int | float]:
  """Options of JAX and their values.

  Args:
    environ: variables of the process. JAX reads its own ones: what they set is
      left out, and with a folder among them nothing is set.
  """
  if 'JAX_COMPILATION_CACHE_DIR' in environ:
    return {}
  values = {
    'jax_compilation_cache_dir': str(_folder(environ)),
    'jax_compilation_cache_max_size': MAX_BYTES,
    'jax_persistent_cache_min_compile_time_secs': MIN_SECONDS,
  }
  return {n: v for n, v in values.items() if n.upper() not in environ}


def _folder(environ: Mapping[str, str]) -> pathlib.Path:
  own, cache = environ.get(FOLDER), environ.get('XDG_CACHE_HOME')
  if own:
    base = paths.expanded(own, f'${FOLDER}')
  elif cache:
    base = os.path.join(paths.expanded(cache, '$XDG_CACHE_HOME'), 'psa_jax')
  else:
    base = paths.expanded('~/.cache/psa_jax', f'--compile_cache or ${FOLDER}')
  return pathlib.Path(base) / f'compiled-{_machine()}'


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
    for line in text.split('\n')
    if line.startswith(('flags', 'Features', 'model name'))
  }
  described = ''.join(sorted(flags)) or text
  digest = hashlib.sha256(described.encode()).hexdigest()[:8]
  return f'{platform.machine()}-{digest}'
