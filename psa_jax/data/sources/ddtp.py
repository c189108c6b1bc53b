"""Fetches the sets that no package passes on: `vader3` and `ddtp_en_<xx>`.

Each is fetched by the tool that the machine has for it, pip or apt, into the
data folder; `python -m psa_jax.data.prepare --name=<set>` is the command.
"""

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from psa_jax.config import ConfigError, DataConfig, RunError
from psa_jax.data import folder, labelled, parallel


def known(name: str) -> bool:
  """Whether `prepare` can fetch it."""
  return name == 'vader3' or parallel.DDTP.fullmatch(name) is not None


def prepare(name: str, root: Path) -> str:
  """Fetches a set if it is not there yet; returns what it holds.

  Args:
    name: one that is `known`.
    root: the data folder.

  Raises:
    RunError: it cannot be fetched or written.
    ConfigError: what was fetched holds no such set.
  """
  config = DataConfig(source=name, data_dir=str(root))
  if name == 'vader3':
    load, build, kind = labelled.load, _vader, 'encoder'
  else:
    load, build, kind = parallel.load, _ddtp, 'encoder_decoder'

  def check(path: Path):
    try:
      return load(config)
    except ConfigError as e:
      raise folder.Damaged(str(e)) from e

  found = folder.cached(
    root / name, build=lambda path: build(name, path), load=check
  )
  counts = [f'{k} {found.manifest[k]}' for k in ('train', 'validation', 'test')]
  return (
    f'{name}: {", ".join(counts)}\n'
    f'use: --config.data.source={name}, model.kind={kind}'
  )


def _vader(name: str, path: Path) -> None:
  command = [sys.executable, '-m', 'pip', 'download', '--no-deps', '-q']
  _run(name, [*command, '--no-binary', ':all:', labelled.VADER, '-d', path])


def _ddtp(name: str, path: Path) -> None:
  match = parallel.DDTP.fullmatch(name)
  assert match is not None
  language = match[1]
  with tempfile.TemporaryDirectory() as place:
    lists, cache = Path(place, 'lists'), Path(place, 'cache')
    (lists / 'partial').mkdir(parents=True)
    (cache / 'archives' / 'partial').mkdir(parents=True)
    where = (
      f'Acquire::Languages=en,{language}',
      f'Dir::State::lists={lists}',
      f'Dir::Cache={cache}',
    )
    options = [word for option in where for word in ('-o', option)]
    _run(name, ['apt-get', '-q', *options, 'update'])
    texts = {}
    for tongue in ('en', language):
      found = sorted(lists.glob(f'*_Translation-{tongue}*'))
      if not found:
        raise RunError(
          f'{name}: the package archive has no descriptions in {tongue!r}; '
          'choose another language'
        )
      command = ['/usr/lib/apt/apt-helper', 'cat-file', *found]
      texts[tongue] = _run(name, command)
    lines = pairs(texts['en'], texts[language])
    with (path / parallel.PAIRS_FILE).open('wb') as f:
      for fields in lines:
        f.write(b'\t'.join(fields) + b'\n')


def pairs(english: bytes, other: bytes) -> Iterator[tuple[bytes, bytes, bytes]]:
  """(package, paragraph, its translation) of two lists of descriptions.

  Descriptions pair by the hash of the English one. Their first lines pair, and
  their paragraphs where both have equally many. What is the same in both is
  left untranslated, and left out; so is what was there before.

  Args:
    english, other: stanzas of apt's `Translation-<language>` files.
  """
  there = {digest: texts for _, digest, texts in _stanzas(other)}
  seen = set()
  for package, digest, texts in _stanzas(english):
    own = there.get(digest, [])
    if len(own) != len(texts):
      own, texts = own[:1], texts[:1]
    for pair in zip(texts, own, strict=True) if own else ():
      if all(pair) and pair[0] != pair[1] and pair not in seen:
        seen.add(pair)
        yield package, *pair


def _stanzas(content: bytes) -> Iterator[tuple[bytes, bytes, list[bytes]]]:
  """(package, hash, [first line, paragraph, ...]) of every description."""
  for stanza in content.split(b'\n\n'):
    package = digest = b''
    paragraphs: list[bytes] = []
    for line in stanza.splitlines():
      if line.startswith(b'Package: '):
        package = line[9:].strip()
      elif line.startswith(b'Description-md5: '):
        digest = line[17:].strip()
      elif line.startswith(b'Description-'):
        paragraphs = [line.partition(b': ')[2], b'']
      elif line.strip() == b'.':
        paragraphs.append(b'')
      elif line.startswith(b' ') and paragraphs:
        paragraphs[-1] += b' ' + line.strip()
    if digest and paragraphs:
      clean = [b' '.join(text.split()) for text in paragraphs]
      yield package, digest, clean


def _run(name: str, command: list) -> bytes:
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
