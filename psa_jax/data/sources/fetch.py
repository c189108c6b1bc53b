"""Fetches the sets that no package passes on, from an index or by apt.

`python -m psa_jax.data.prepare --name=<set>` is the command; a source of this
kind calls `into_cache` with what fills its folder.
"""

import subprocess
from collections.abc import Callable
from pathlib import Path

from psa_jax.config import ConfigError, DataConfig, RunError
from psa_jax.data import cache
from psa_jax.data.sources.registry import find


def into_cache(
  config: DataConfig, build: Callable[[Path], None], *, kind: str
) -> str:
  """Fetches a set if it is not there yet; returns what it holds.

  Args:
    config: `source` is the set, and the name of its folder of the data cache.
    build: fills the folder.
    kind: of data that the set has.

  Raises:
    RunError: it cannot be fetched or written.
    ConfigError: what was fetched holds no such set.
  """
  name, source = config.source, find(config.source)
  assert source is not None

  def check(path: Path):
    del path  # `load` finds it by the configuration
    try:
      return source.yields[kind](config)
    except ConfigError as e:
      raise cache.Damaged(str(e)) from e

  data = cache.cached(cache.data_dir(config) / name, build=build, load=check)
  counts = [f'{k} {data.manifest[k]}' for k in ('train', 'validation', 'test')]
  return (
    f'{name}: {", ".join(counts)}\n'
    f'use: --config.data.source={name} (it has {kind})'
  )


def run(name: str, command: list) -> bytes:
  """Output of a command.

  Raises:
    RunError: it is not there, or failed.
  """
  try:
    done = subprocess.run(command, capture_output=True, check=True)
  except FileNotFoundError as e:
    raise RunError(
      f'{name} needs {command[0]}, which is not on this machine; prepare it on '
      'a Debian or Ubuntu and copy the folder'
    ) from e
  except subprocess.CalledProcessError as e:
    words = e.stderr.decode('utf8', 'replace').split()
    raise RunError(
      f'{name} could not be fetched: {" ".join(words)[-300:]}'
    ) from e
  return done.stdout
