"""PyTorch contenders in their own environment, asked over a pipe.

The other end is `peer.py`. An error there, or its death, is an `Unavailable`
with one line that says why; the next question starts a new server.
"""

import contextlib
import functools
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
ONE_THREAD = f'{NAMES["sdpa"]}, one thread'


@functools.cache
def find(python: str) -> pathlib.Path | None:
  """The interpreter with PyTorch; None, with a line that says how to get it."""
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
    self._server: Any = None
    self.name = NAMES[kind]
    self._start()

  def _start(self):
    self._server = subprocess.Popen(
      self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
      about = self._read()
    except Unavailable:
      self.close()
      raise
    self.version, self.sizes = about['version'], about['sizes']

  def ask(
    self, what: str, length: int = 0, calls: int = 1, **more: int
  ) -> dict[str, Any]:
    """The answer to one request; `more` may set `threads`. See `peer.py`.

    Raises:
      Unavailable: the server answers with an error, or dies.
    """
    if self._server is None:
      self._start()
    request = {'what': what, 'T': length, 'H': HEAD_DIM, 'calls': calls, **more}
    try:
      self._server.stdin.write(json.dumps(request) + '\n')
      self._server.stdin.flush()
    except BrokenPipeError:
      pass  # `_read` says that it died
    return self._read()

  def call(self, what: str, length: int, **more: int) -> Call:
    """A contender; see `timing`."""
    return lambda calls: self.ask(what, length, calls, **more)['seconds']

  def _read(self):
    line = self._server.stdout.readline()
    if not line:
      raise Unavailable(f'{self.name} died, exit code {self.close()}')
    answer = json.loads(line)
    if 'error' in answer:
      reason = answer['error']
      if "can't allocate memory" in reason or 'MemoryError' in reason:
        reason = f'out of memory: more than {self._gib:g} GiB'
      raise Unavailable(reason)
    return answer

  def close(self) -> int | None:
    """Ends the server; its exit code if there was one."""
    server, self._server = self._server, None
    if server is None:
      return None
    with contextlib.suppress(BrokenPipeError):  # it died with a request unread
      server.stdin.close()
    code = server.wait()
    server.stdout.close()
    return code


def start(python: str, gib: float, kinds=tuple(NAMES)) -> list[Peer]:
  """The peers that can be started; what cannot costs one line."""
  interpreter = find(python)
  if interpreter is None:
    return []
  peers = []
  for kind in kinds:
    try:
      peers.append(Peer(interpreter, kind, gib))
    except Unavailable as error:
      print(f'{error}: run `make bench-peers` again', file=sys.stderr)
  return peers
