"""Speed of sparse attention against dense on one NVIDIA GPU, 4k to 64k tokens.

  python experiments/speed_gpu/run.py            everything, some minutes
  python experiments/speed_gpu/run.py --what=    tables again, without a GPU

Adds every row to `results.jsonl` as soon as it is found, and renews the tables
of `README.md` and the picture from the newest run. Needs a GPU of the Hopper
line or newer and `jax[cuda13]`; the PyTorch rows need the interpreter of
`--torch` to have PyTorch for CUDA, and are left out where it has not.

Contenders of one length are interleaved (A B C A B C ...) after a warm-up;
PyTorch's run in a process of their own afterwards, on the same GPU.
"""

import contextlib
import json
import pathlib
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402
import numpy as np  # noqa: E402
from absl import app, flags  # noqa: E402

from experiments.speed_64k import timing  # noqa: E402
from experiments.speed_gpu import contenders as lib  # noqa: E402
from experiments.speed_gpu import plot, tables  # noqa: E402
from psa_jax import report  # noqa: E402

HERE = pathlib.Path(__file__).resolve().parent
SOURCES = ['psa_jax', ':(glob)experiments/speed_gpu/*.py']
WHAT = ('ceilings', 'lengths', 'decode')

_WHAT = flags.DEFINE_list('what', list(WHAT), 'What to measure.')
_LENGTHS = flags.DEFINE_list(
  'lengths', ['4096', '8192', '16384', '32768', '65536'], 'Tokens.'
)
_WIDTHS = flags.DEFINE_list('head_dims', ['128', '64'], 'Head widths.')
_TORCH = flags.DEFINE_string(
  'torch', sys.executable, 'Python with PyTorch for CUDA; empty for none.'
)
_RESULTS = flags.DEFINE_string(
  'results', str(HERE / 'results.jsonl'), 'File that rows are added to.'
)
_COMMIT = flags.DEFINE_string(
  'commit', '', 'What to write as the commit where there is no repository.'
)


def main(argv):
  """Measures what was asked for, and writes it down."""
  if len(argv) > 1:
    raise app.UsageError(f'unknown argument {argv[1]!r}')
  unknown = sorted(set(_WHAT.value) - set(WHAT))
  if unknown:
    raise app.UsageError(f'--what={unknown[0]} is none of {list(WHAT)}')
  results = pathlib.Path(_RESULTS.value)
  if _WHAT.value:
    measure(results)
  rows = tables.newest(report.read_rows(results))
  for name, text in tables.sections(rows).items():
    print(f'{name}\n\n{text}\n')
    if results.parent == HERE:
      report.replace_section(HERE / 'README.md', name, text)
  if results.parent == HERE:
    plot.draw(rows, HERE / 'speed.png')


def measure(results):
  """Runs everything; a row at a time goes to the file."""
  device = jax.devices()[0]
  if device.platform != 'gpu':
    raise app.UsageError('there is no GPU: install jax[cuda13] on one')
  stamp = report.provenance(ROOT, SOURCES)
  stamp['gpu'] = device.device_kind
  if _COMMIT.value:
    stamp['commit'] = _COMMIT.value

  def add(**row):
    row = row | stamp
    with results.open('a', encoding='utf-8') as file:
      file.write(json.dumps(row) + '\n')

  lengths = sorted(map(int, _LENGTHS.value))
  with started_torch() as ask:
    if 'ceilings' in _WHAT.value:
      sweep('ceilings', add, lib.Shape(0), lib.ceilings(), {})
    for width in map(int, _WIDTHS.value):
      for length in lengths:
        shape = lib.Shape(length, head_dim=width)
        if 'lengths' in _WHAT.value:
          about = {}
          if lib.is_sparse(length, lib.BLOCKS):
            about = lib.work(shape)
          sweep('lengths', add, shape, lib.all_passes(shape), about)
          ask(add, 'lengths', shape)
        if 'decode' in _WHAT.value:
          sweep('decode', add, shape, lib.all_decodes(shape), {})
          ask(add, 'decode', shape)
        for made in (lib.inputs, lib.lists, lib.cache):
          made.cache_clear()


def sweep(what, add, shape, found, about):
  """Times the contenders of one shape in turn."""
  for (name, which), took in timing.interleave(found).items():
    add(
      what=what,
      length=shape.length,
      head_dim=shape.head_dim,
      contender=name,
      **{'pass': which},
      **took.row(),
      **(about if name.startswith(lib.WHOLE) else {}),
    )


@contextlib.contextmanager
def started_torch():
  """A function that adds PyTorch's rows of a shape; ends it afterwards."""
  server = _Torch(_TORCH.value) if _TORCH.value else None
  if server is not None and server.version is None:
    print(f'no PyTorch rows: {_TORCH.value} has none', file=sys.stderr)
  try:
    if server is None or server.version is None:
      yield lambda add, what, shape: None
    else:
      yield server.ask
  finally:
    if server is not None:
      server.close()


class _Torch:
  """PyTorch in a process of its own."""

  def __init__(self, python):
    self.server = subprocess.Popen(
      [python, HERE / 'torch_times.py'],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )
    assert self.server.stdin is not None and self.server.stdout is not None
    self.requests, self.answers = self.server.stdin, self.server.stdout
    first = self.answers.readline()
    self.version = json.loads(first)['version'] if first else None

  def ask(self, add, what, shape):
    """Adds the rows of one shape."""
    with tempfile.TemporaryDirectory() as folder:
      request = {'what': what, 'batch': lib.DECODE_BATCH, **shape._asdict()}
      if what == 'lengths' and lib.is_sparse(shape.length, lib.BLOCKS):
        request['lists'] = f'{folder}/lists.npz'
        made = lib.lists(shape)
        np.savez(
          request['lists'],
          ids=np.asarray(made.ids)[0],
          counts=np.asarray(made.counts)[0],
          block_q=lib.BLOCK_Q,
          block_k=lib.BLOCK_K,
        )
      self.requests.write(json.dumps(request) + '\n')
      self.requests.flush()
      for line in self.answers:
        row = json.loads(line)
        if row.get('done'):
          return
        if 'seconds' in row:
          row['median'] = float(np.median(row['seconds']))
        add(**row, version=self.version)
    print('PyTorch died; its further rows are missing', file=sys.stderr)

  def close(self):
    """Ends the process."""
    self.requests.close()
    self.server.wait()


if __name__ == '__main__':
  app.run(main)
