"""PyTorch contenders in processes of their own, asked over a pipe.

The other ends are `peer_cpu.py` and `peer_gpu.py`: each prints one JSON line
about itself, then answers a JSON line with a JSON line. An error there, or the
process's death, is an `Unavailable` with one line that says why; the next
question starts a new process.
"""

import contextlib
import functools
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Generator, Sequence
from typing import Any

from experiments.bench.rows import ROOT
from experiments.bench.timing import Call, Unavailable

NAMES = {'sdpa': 'PyTorch SDPA', 'nsa': 'native-sparse-attention-pytorch'}
SDPA, NSA_MODULE = NAMES.values()
ONE_THREAD = f'{SDPA}, one thread'
INTERPRETER = '.venv-peers/bin/python'  # what `make bench-peers` makes
MEMORY_ERRORS = ("can't allocate memory", 'MemoryError')


@functools.cache
def find(python: str) -> pathlib.Path | None:
  """The interpreter with PyTorch; None, with a line that says how to get it."""
  if python and (ROOT / python).exists():
    return ROOT / python
  print('no PyTorch rows: run `make bench-peers` first', file=sys.stderr)
  return None


class Server:
  """A process that answers a line with a line.

  Attributes:
    name: what errors call it.
    about: what it says of itself: `version`, ...
  """

  def __init__(self, name: str, command: Sequence[Any]):
    """Starts the process.

    Raises:
      Unavailable: it does not start.
    """
    self.name = name
    self._command = command
    self._process: Any = None
    self._start()

  def _start(self):
    self._process = subprocess.Popen(
      self._command,
      cwd=ROOT,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )
    try:
      self.about = self._read()
    except Unavailable:
      self.close()
      raise

  def ask(self, **request: Any) -> dict[str, Any]:
    """The answer to one request.

    Raises:
      Unavailable: the process answers with an error, or dies.
    """
    if self._process is None:
      self._start()
    try:
      self._process.stdin.write(json.dumps(request) + '\n')
      self._process.stdin.flush()
    except BrokenPipeError:
      pass  # `_read` says that it died
    return self._read()

  def _read(self):
    line = self._process.stdout.readline()
    if not line:
      raise Unavailable(f'{self.name} died, exit code {self.close()}')
    answer = json.loads(line)
    if 'error' in answer:
      raise Unavailable(self.reason(answer['error']))
    return answer

  def reason(self, error: str) -> str:
    """What the rows say of an error."""
    return error

  def close(self) -> int | None:
    """Ends the process; its exit code if there was one."""
    process, self._process = self._process, None
    if process is None:
      return None
    with contextlib.suppress(BrokenPipeError):  # it died, a request unread
      process.stdin.close()
    code = process.wait()
    process.stdout.close()
    return code


class Peer(Server):
  """One contender on the CPU."""

  def __init__(self, python: pathlib.Path, kind: str, gib: float):
    """Starts the process.

    Args:
      python: interpreter with PyTorch.
      kind: a key of `NAMES`.
      gib: memory that the process may take.
    """
    self._gib = gib
    words = [kind, str(os.cpu_count()), str(gib)]
    super().__init__(NAMES[kind], [python, *CPU_PROGRAM, *words])

  @property
  def fields(self) -> dict[str, Any]:
    """Of every row: `version` of the packages, `sizes` in words."""
    return dict(self.about)

  def call(self, what: str, length: int, **more: int) -> Call:
    """A contender; `more` may set `threads` and `heads`, see `peer_cpu.py`."""
    return lambda calls: self.ask(what=what, T=length, calls=calls, **more)[
      'seconds'
    ]

  def growth(self, what: str, length: int) -> dict[str, Any]:
    """Bytes by which one call raises the peak, or why there are none."""
    try:
      before = self.ask(what='peak')['bytes']
      self.ask(what=what, T=length)
      peak = self.ask(what='peak')['bytes']
    except Unavailable as error:
      return {'error': str(error)}
    return {'bytes': peak - before, 'rss': peak}

  def reason(self, error: str) -> str:
    """Says how much memory was too little."""
    if any(words in error for words in MEMORY_ERRORS):
      return f'out of memory: more than {self._gib:g} GiB'
    return error


CPU_PROGRAM = ['-m', 'experiments.bench.peer_cpu']
GPU_PROGRAM = ['-m', 'experiments.bench.peer_gpu']


@contextlib.contextmanager
def started(
  python: str, gib: float, kinds: Sequence[str] = tuple(NAMES)
) -> Generator[list[Peer]]:
  """The peers that can be started; what cannot costs one line."""
  interpreter = find(python)
  if interpreter is None:
    yield []
    return
  peers = []
  try:
    for kind in kinds:
      try:
        peers.append(Peer(interpreter, kind, gib))
      except Unavailable as error:
        print(f'{error}: run `make bench-peers` again', file=sys.stderr)
    yield peers
  finally:
    for peer in peers:
      peer.close()
