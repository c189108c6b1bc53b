"""NSA against dense attention and against the pip package, on this machine.

  make bench-peers                once, for the PyTorch rows
  python -m experiments.nsa       everything, about 30 minutes

Three measurements (`what`):

  attention  the operation with its compression, choice and gates, G = 16
             heads on one kv head, against dense: forward, backward, both;
             and every part of `nsa`, forward
  module     a whole layer of one head with its projections, against the pip
             package's, where the latter fits in memory
  peak       growth of peak memory of both in a fresh process, forward+backward

Contenders are interleaved (A B C A B C ...) after a warm-up; tables show
medians. Nothing else should use the machine.
"""

import dataclasses
import json
import subprocess
import sys

from experiments.bench import cli, memory, passes, peers
from experiments.bench.experiment import Experiment
from experiments.bench.rows import ROOT
from experiments.bench.settings import Settings, option
from experiments.nsa import contenders, tables

WHAT = ('attention', 'module', 'peak')


@dataclasses.dataclass(frozen=True)
class NsaSettings(Settings):
  """What `--set` changes."""

  what: tuple[str, ...] = option(WHAT, 'Measurements.', choices=WHAT)
  lengths: tuple[int, ...] = option(
    (8192, 65_536), 'Tokens, for attention.', least=1
  )
  heads: int = option(16, 'Query heads that share a kv head.', least=1)
  module_length: int = option(4096, 'Tokens, for module and peak.', least=1)
  repeats: int = option(0, 'Timed rounds; 0: fewer for what takes long.')
  peers: str = option(peers.INTERPRETER, 'Python with PyTorch; empty for none.')
  peer_gib: float = option(16.0, 'Memory that PyTorch may take, in GiB.')


def run(settings, book):
  """The chosen measurements, in their order."""
  for what, measure in MEASUREMENTS.items():
    if what in settings.what:
      measure(settings, book)


def attention(settings, book):
  """The operation at every length."""
  heads, repeats = settings.heads, settings.repeats
  with peers.started(settings.peers, settings.peer_gib, ('sdpa',)) as servers:
    for length in sorted(settings.lengths):
      found = contenders.attention(length, heads)
      for peer in servers:
        for which in passes.PASSES:
          found[peer.name, which] = peer.call(which, length, heads=heads)
      about = {'what': 'attention', 'length': length, 'heads': heads}
      book.sweep(found, repeats=repeats, **about)
      contenders.inputs.cache_clear()


def module(settings, book):
  """Whole layers of one head."""
  length = settings.module_length
  found = contenders.modules(length)
  with peers.started(settings.peers, settings.peer_gib, ('nsa',)) as servers:
    for peer in servers:
      for which in passes.PASSES:
        found[peer.name, which] = peer.call(which, length)
    repeats = settings.repeats
    book.sweep(found, repeats=repeats, what='module', length=length)


def peak(settings, book):
  """Growth of the peak memory of a fresh process, forward+backward."""
  about = {'what': 'peak', 'length': settings.module_length}
  about['pass'] = passes.BOTH
  for mechanism in contenders.MECHANISMS:
    command = cli.child_command('nsa', settings, mechanism)
    done = subprocess.run(
      [sys.executable, *command],
      cwd=ROOT,
      check=True,
      stdout=subprocess.PIPE,
      text=True,
    )
    row = json.loads(done.stdout.rstrip().split('\n')[-1])
    book.add({**about, 'contender': contenders.layer_name(mechanism), **row})
  with peers.started(settings.peers, settings.peer_gib, ('nsa',)) as servers:
    for peer in servers:
      row = peer.growth(passes.BOTH, settings.module_length)
      book.add({**about, 'contender': peer.name, **row})


def child_peak(settings, mechanism):
  """Bytes that this process takes for one layer, compilation included."""
  before = memory.peak_bytes()
  layer, args = contenders.layer(mechanism, settings.module_length)
  passes.passes('', layer, lambda: args)['', passes.BOTH](1)
  return {'bytes': memory.peak_bytes() - before}


MEASUREMENTS = dict(zip(WHAT, (attention, module, peak), strict=True))
EXPERIMENT = Experiment(
  name='nsa',
  about='NSA against dense attention and the pip package, two CPU cores',
  settings=NsaSettings(),
  quick=NsaSettings(
    lengths=(512,), heads=2, module_length=256, repeats=1, peers=''
  ),
  run=run,
  sections=tables.sections,
  key=('what', 'length', 'contender', 'pass'),
  one_commit=True,
  child=child_peak,
)

if __name__ == '__main__':
  sys.exit(cli.main(EXPERIMENT))
