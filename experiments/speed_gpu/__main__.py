"""Speed of sparse attention against dense on one NVIDIA GPU, 4k to 64k tokens.

  python -m experiments.speed_gpu      everything, some minutes

Needs a GPU of the Hopper line or newer and `jax[cuda13]`; the PyTorch rows need
the interpreter of `peers` to have PyTorch for CUDA, and are left out where it
has not.

Contenders of one length are interleaved (A B C A B C ...) after a warm-up;
PyTorch's run in a process of their own afterwards, on the same GPU.
"""

import contextlib
import dataclasses
import pathlib
import statistics
import sys
import tempfile
from typing import Any

import jax
import numpy as np

from experiments.bench import attention, cli, peers
from experiments.bench.experiment import Experiment
from experiments.bench.settings import Settings, option
from experiments.bench.timing import Unavailable
from experiments.speed_gpu import contenders, plot, tables
from psa_jax.config import ConfigError

WHAT = ('ceilings', 'lengths', 'decode')


@dataclasses.dataclass(frozen=True)
class GpuSettings(Settings):
  """What `--set` changes."""

  what: tuple[str, ...] = option(WHAT, 'What to measure.', choices=WHAT)
  lengths: tuple[int, ...] = option(
    (4096, 8192, 16_384, 32_768, 65_536), 'Tokens.', least=1
  )
  head_dims: tuple[int, ...] = option((128, 64), 'Head widths.', least=1)
  repeats: int = option(
    0, 'Timed rounds of everything; 0: fewer for what takes long.'
  )
  peers: str = option(
    sys.executable, 'Python with PyTorch for CUDA; empty for none.'
  )


def run(settings, book):
  """Measures what was asked for; a row at a time goes to the book."""
  device = jax.devices()[0]
  if device.platform != 'gpu':
    raise ConfigError('there is no GPU: install jax[cuda13] on one')
  gpu, repeats = {'gpu': device.device_kind}, settings.repeats

  def sweep(what, shape, found, about=None):
    about = {name: gpu | (about or {}).get(name, {}) for name, _ in found}
    fields = {'length': shape.length, 'head_dim': shape.head_dim}
    book.sweep(found, repeats=repeats, about=about, what=what, **fields)

  with started(settings.peers) as server:
    if 'ceilings' in settings.what:
      nothing = contenders.shape(0)
      sweep('ceilings', nothing, contenders.ceilings())
    for width in settings.head_dims:
      for length in sorted(settings.lengths):
        shape = contenders.shape(length, width)
        if 'lengths' in settings.what:
          sweep('lengths', shape, contenders.all_passes(shape), work(shape))
          ask(server, book, 'lengths', shape, gpu)
        if 'decode' in settings.what:
          sweep('decode', shape, contenders.all_decodes(shape))
          ask(server, book, 'decode', shape, gpu)
        attention.clear()


def work(shape):
  """{contender: what its lists read}."""
  if not contenders.SPARSE.is_sparse(shape.length):
    return {}
  counts = attention.work(shape, contenders.SPARSE)._asdict()
  names = contenders.WHOLE, contenders.KERNEL, contenders.XLA_KERNEL
  return dict.fromkeys(names, counts)


@contextlib.contextmanager
def started(python):
  """PyTorch in a process of its own; None where there is none."""
  server = None
  if python:
    try:
      server = peers.Server('PyTorch', [python, *peers.GPU_PROGRAM])
    except Unavailable:
      print(f'no PyTorch rows: {python} has none', file=sys.stderr)
  try:
    yield server
  finally:
    if server is not None:
      server.close()


def ask(server, book, what, shape, gpu):
  """Adds PyTorch's rows of one shape."""
  if server is None:
    return
  about = {'length': shape.length, 'head_dim': shape.head_dim, 'what': what}
  request = shape._asdict() | {'what': what, 'batch': contenders.DECODE_BATCH}
  with tempfile.TemporaryDirectory() as folder:
    names = tables.SDPA
    if what == 'lengths' and contenders.SPARSE.is_sparse(shape.length):
      names += (tables.FLEX,)
      request['lists'] = str(save_lists(shape, pathlib.Path(folder)))
    for name in names:
      fields = {**about, 'contender': name, **server.about, **gpu}
      try:
        rows: list[Any] = server.ask(**request, contender=name)['rows']
      except Unavailable as error:
        rows = [{'pass': 'every pass', 'error': str(error)}]
      for row in rows:
        if 'seconds' in row:
          row['median'] = statistics.median(row['seconds'])
        book.add(fields | row)


def save_lists(shape, folder):
  """The block lists of a shape, as FlexAttention's side reads them."""
  lists, path = attention.lists(shape, contenders.SPARSE), folder / 'lists.npz'
  np.savez(
    path,
    ids=np.asarray(lists.ids)[0],
    counts=np.asarray(lists.counts)[0],
    block_q=contenders.SPARSE.block_q,
    block_k=contenders.SPARSE.block_k,
  )
  return path


EXPERIMENT = Experiment(
  name='speed_gpu',
  about='speed of sparse attention against dense, one NVIDIA GPU',
  settings=GpuSettings(),
  quick=GpuSettings(lengths=(4096,), head_dims=(128,), repeats=1),
  run=run,
  sections=tables.sections,
  key=('what', 'length', 'head_dim', 'contender', 'pass'),
  pictures={'speed.png': plot.draw},
)

if __name__ == '__main__':
  sys.exit(cli.main(EXPERIMENT))
