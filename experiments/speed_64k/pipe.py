"""PyTorch contenders in their own environment, asked over a pipe.

The other end is `peer.py`. An error there, or its death, is an `Unavailable`
with one line that says why; the next question starts a new server.
"""

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

from experiments.speed_64k.contenders import HEAD_DIM
from experiments.speed_64k.timing import Call, Unavailable

SERVER = pathlib.Path(__file__).with_name('peer.py')
ROOT = SERVER.parents[2]
NAMES = {'sdpa': 'PyTorch SDPA', 'nsa': 'native-sparse-attention-pytorch'}


def find(python: str) -> pathlib.Path | None:
  """The interpreter with PyTorch, or None with a line that says how."""
  if python and (ROOT / python).exists():
    return ROOT / python
  print('no PyTorch rows: run `make bench-peers` first', file=sys.stderr)
  return None


class Peer:
  """One contender's server.

  Attributes:
    version: of the packages, as `peer.py` says.
    sizes: what is run, in words.
  """

  def __init__(self, python: pathlib.Path, kind: str, gib: float):
    """Starts the server.

    Args:
      python: interpreter with PyTorch.
      kind: a key of `NAMES`.
      gib: memory that the process may take.

    Raises:
      Unavailable: it does not start.
    """
    self._command = [python, SERVER, kind, str(os.cpu_count()), str(gib)]
    self._gib = gib
    self._server = None
    self.name = NAMES[kind]
    self._start()

  def _start(self):
    self._server = subprocess.Popen(
      self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    about = self._read()
    self.version, self.sizes = about['version'], about['sizes']

  def ask(self, what: str, length: int = 0, calls: int = 1) -> dict[str, Any]:
    """The answer to one request; see `peer.py`.

    Raises:
      Unavailable: the server answers with an error, or dies.
    """
    if self._server is None:
      self._start()
    request = {'what': what, 'T': length, 'H': HEAD_DIM, 'calls': calls}
    try:
      self._server.stdin.write(json.dumps(request) + '\n')
      self._server.stdin.flush()
    except BrokenPipeError:
      pass  # `_read` says that it died
    return self._read()

  def call(self, what: str, length: int) -> Call:
    """A contender; see `timing`."""
    return lambda calls: self.ask(what, length, calls)['seconds']

  def _read(self):
    line = self._server.stdout.readline()
    if not line:
      code = self._server.wait()
      self._server = None
      raise Unavailable(f'{self.name} died, exit code {code}')
    answer = json.loads(line)
    if 'error' in answer:
      reason = answer['error']
      if "can't allocate memory" in reason or 'MemoryError' in reason:
        reason = f'out of memory: more than {self._gib:g} GiB'
      raise Unavailable(reason)
    return answer

  def close(self) -> None:
    """Ends the server."""
    if self._server is not None:
      self._server.stdin.close()
      self._server.wait()
      self._server.stdout.close()
      self._server = None


def start(python: str, gib: float, kinds=tuple(NAMES)) -> list[Peer]:
  """The peers that can be started; what cannot costs one line."""
  interpreter = find(python)
  peers = []
  for kind in kinds if interpreter else ():
    try:
      peers.append(Peer(interpreter, kind, gib))
    except Unavailable as error:
      print(f'{error}: run `make bench-peers` again', file=sys.stderr)
  return peers
