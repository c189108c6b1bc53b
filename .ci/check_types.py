"""Checks types against the pins of both Python lines, with one Python.

Python 3.11 has an older JAX than 3.12 and 3.13, and what is right for one may
be wrong for the other. Only a few packages differ between the lines. Those of
the other line are unpacked into .types/, without their dependencies, and put in
front of the packages that are installed: a type checker reads them and runs
nothing, so it needs no other interpreter.

Where they cannot be fetched, the line of this Python is checked, and the last
line says that the other was not.
"""

import hashlib
import pathlib
import re
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
# First Python of each line; the marker in requirements.txt -> what it is for.
LINES = {"python_version < '3.12'": '3.11', "python_version >= '3.12'": '3.12'}


def pins(python: str) -> list[str]:
  """Requirements that only the line of `python` has."""
  text = (ROOT / 'requirements.txt').read_text()
  marked = re.findall(r'^([\w-]+==[\w.]+); *(.+)$', text, re.MULTILINE)
  return [pin for pin, marker in marked if LINES[marker] == python]


def unpack(python: str) -> pathlib.Path | None:
  """The folder with the packages of the other line, or None without them."""
  wanted = pins(python)
  digest = hashlib.sha256(' '.join(wanted).encode()).hexdigest()[:12]
  folder = ROOT / '.types' / f'{python}-{digest}'
  if folder.exists():
    return folder
  unfinished = folder.with_suffix('.unfinished')
  shutil.rmtree(unfinished, ignore_errors=True)
  pip = [sys.executable, '-m', 'pip', 'install', '-qq', '--no-input']
  pip += ['--disable-pip-version-check', '--no-compile', '--no-deps']
  pip += ['--only-binary=:all:', '--python-version', python]
  pip += ['--ignore-requires-python']  # pip would compare its own Python
  if subprocess.run([*pip, '--target', unfinished, *wanted]).returncode:
    return None
  return unfinished.rename(folder)


def check(python: str, packages: pathlib.Path | None = None) -> int:
  """Runs ty for one line; returns its exit code."""
  command = [pathlib.Path(sys.executable).with_name('ty'), 'check']
  command += ['--python', sys.prefix, '--python-version', python]
  if packages:
    command += ['--extra-search-path', packages]
  print(f'types, with the pins of Python {python}:', flush=True)
  return subprocess.run(command, cwd=ROOT).returncode


def main() -> int:
  """Checks the line of this Python, then the other one."""
  is_new = sys.version_info >= (3, 12)
  this, other = ('3.12', '3.11') if is_new else ('3.11', '3.12')
  code = check(this)
  packages = unpack(other)
  if packages is None:
    print(
      f'types were NOT checked with the pins of Python {other}: they could '
      'not be fetched'
    )
    return code
  return check(other, packages) or code


if __name__ == '__main__':
  sys.exit(main())
