"""`stdlib`: the sources of Python's standard library, found on disk."""

import platform
import sys
import sysconfig
from pathlib import Path

from psa_jax.data.sources import packaged
from psa_jax.data.sources.registry import DOCUMENTS, Source, register

# Test suites and character tables are not the prose of a programmer.
_SKIP = {'test', 'tests', 'idle_test', 'encodings', '__pycache__'}


def find() -> list[tuple[str, Path]]:
  """(name, path) of every module, sorted by name."""
  root = Path(sysconfig.get_paths()['stdlib'])
  paths = []
  for module in sys.stdlib_module_names:  # leaves out site-packages
    paths += [root / f'{module}.py', *(root / module).rglob('*.py')]
  files: dict[Path, Path] = {}
  for path in sorted(paths, key=lambda p: (p.is_symlink(), p)):
    if path.is_file():  # each once, though links lead to it
      files.setdefault(path.resolve(), path)
  named = {p.relative_to(root).as_posix(): p for p in files.values()}
  return [
    (name, path)
    for name, path in sorted(named.items())
    if not _SKIP & set(Path(name).parts) and path.stat().st_size
  ]


PACKAGE = packaged.Package(
  name='stdlib',
  find=find,
  version=platform.python_version,
  package='python',
  license='PSF-2.0',
  description='Sources of the standard library of the Python that prepares it.',
)
register(
  Source(
    'stdlib',
    yields={DOCUMENTS: lambda config: packaged.load(PACKAGE, config)},
    prepare=lambda config: packaged.prepare(PACKAGE, config),
    lock='nothing is fetched: the files are installed',
  )
)
