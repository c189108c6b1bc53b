"""NSA against dense attention and against the pip package, on this machine.

  make bench-peers                        once, for the PyTorch rows
  python experiments/nsa/run.py           everything, about 30 minutes

Three measurements (`--what`):

  attention  the operation with its compression, choice and gates, G = 16
             heads on one kv head, against dense: forward, backward, both;
             and every part of `nsa`, forward
  module     a whole layer of one head with its projections, against the pip
             package's, where the latter fits in memory
  peak       growth of peak memory of both in a fresh process, forward+backward

Contenders are interleaved (A B C A B C ...) after a warm-up; tables show
medians. Rows are appended to `results.jsonl`, and `README.md` is renewed from
the newest of them. Nothing else should use the machine.
"""

import json
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from absl import app, flags  # noqa: E402

from experiments.nsa import contenders as lib  # noqa: E402
from experiments.nsa import tables  # noqa: E402
from experiments.speed_64k import pipe, rows, timing  # noqa: E402
from psa_jax import report  # noqa: E402

HERE = ROOT / 'experiments' / 'nsa'
RESULTS = HERE / 'results.jsonl'
PASSES = lib.PASSES

_WHAT = flags.DEFINE_list(
  'what', ['attention', 'module', 'peak'], 'Measurements.'
)
_LENGTHS = flags.DEFINE_list(
  'lengths', ['8192', '65536'], 'Tokens, for `attention`.'
)
_HEADS = flags.DEFINE_integer(
  'heads', 16, 'Query heads that share a kv head.', lower_bound=1
)
_MODULE = flags.DEFINE_integer(
  'module_length', 4096, 'Tokens, for `module` and `peak`.'
)
_REPEATS = flags.DEFINE_integer(
  'repeats', 0, 'Timed rounds; 0: fewer for what takes long.', lower_bound=0
)
_PEERS = flags.DEFINE_string(
  'peers', '.venv-peers/bin/python', 'Python with PyTorch; empty for none.'
)
_PEER_GIB = flags.DEFINE_float(
  'peer_gib', 16, 'Memory that a PyTorch process may take, in GiB.'
)
_CHILD = flags.DEFINE_string('child', '', 'For `peak`: the layer to measure.')
_WRITE = flags.DEFINE_bool(
  'write', True, 'Append to results.jsonl and renew README.md.'
)


def main(argv):
  """Runs the chosen measurements and writes them down."""
  if len(argv) > 1:
    raise app.UsageError(f'unknown argument {argv[1]!r}')
  if _CHILD.value:
    print(json.dumps(child_peak(_CHILD.value, _MODULE.value)))
    return
  known = {'attention': attention, 'module': module, 'peak': peak}
  unknown = sorted(set(_WHAT.value) - set(known))
  if unknown:
    raise app.UsageError(f'--what={unknown[0]} is none of {list(known)}')
  book = rows.Book(RESULTS if _WRITE.value else None)
  for what in _WHAT.value:
    known[what](book)
  for name, text in tables.sections(book.rows).items():
    print(f'{name}\n\n{text}\n')
  if _WRITE.value:
    for name, text in tables.sections(rows.newest(rows.read(RESULTS))).items():
      report.replace_section(HERE / 'README.md', name, text)


def add(book, what, length, timings, **more):
  """Notes what was found for every contender and pass."""
  for (name, which), took in timings.items():
    book.add({
      'what': what,
      'length': length,
      'contender': name,
      'pass': which,
      **took.row(),
      **more,
    })  # fmt: skip


def attention(book):
  """The operation at every length."""
  heads = _HEADS.value
  peers = pipe.start(_PEERS.value, _PEER_GIB.value, ('sdpa',))
  for length in sorted(map(int, _LENGTHS.value)):
    found = lib.attention(length, heads)
    for server in peers:
      for which in PASSES:
        found[server.name, which] = server.call(which, length, heads=heads)
    timings = timing.interleave(found, repeats=_REPEATS.value)
    add(book, 'attention', length, timings, heads=heads)
    lib.inputs.cache_clear()
  for server in peers:
    server.close()


def module(book):
  """Whole layers of one head."""
  length = _MODULE.value
  found = lib.modules(length)
  peers = pipe.start(_PEERS.value, _PEER_GIB.value, ('nsa',))
  for server in peers:
    for which in PASSES:
      found[server.name, which] = server.call(which, length)
  add(book, 'module', length, timing.interleave(found, repeats=_REPEATS.value))
  for server in peers:
    server.close()


def peak(book):
  """Growth of the peak memory of a fresh process, forward+backward."""
  length, which = _MODULE.value, PASSES[2]
  row = {'what': 'peak', 'length': length, 'pass': which}
  for mechanism in lib.MECHANISMS:
    found = json.loads(_run_child(mechanism, length))
    book.add({**row, 'contender': lib.layer_name(mechanism), **found})
  for server in pipe.start(_PEERS.value, _PEER_GIB.value, ('nsa',)):
    try:
      before = server.ask('peak')['bytes']
      server.ask(which, length)
      found = {'bytes': server.ask('peak')['bytes'] - before}
    except timing.Unavailable as error:
      found = {'error': str(error)}
    book.add({**row, 'contender': server.name, **found})
    server.close()


def _run_child(mechanism, length):
  command = [sys.executable, HERE / 'run.py', f'--child={mechanism}']
  done = subprocess.run(
    [*command, f'--module_length={length}'],
    check=True,
    stdout=subprocess.PIPE,
    text=True,
  )
  return done.stdout.splitlines()[-1]


def child_peak(mechanism, length):
  """Bytes that this process takes for one layer, compilation included."""
  before = memory()
  run, args = lib.layer(mechanism, length)
  lib.passes('', run, lambda: args)['', PASSES[2]](1)
  return {'bytes': memory() - before}


def memory():
  """Most memory that this process has had."""
  for line in pathlib.Path('/proc/self/status').read_text().splitlines():
    if line.startswith('VmHWM'):
      return int(line.split()[1]) * 1024
  return 0


if __name__ == '__main__':
  app.run(main)
