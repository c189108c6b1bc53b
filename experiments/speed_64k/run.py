"""Speed and memory of sparse attention against dense, 2k to 64k tokens.

  make bench-peers                              once, for the PyTorch rows
  python experiments/speed_64k/run.py           everything, about 25 minutes

Measures what `--what` names (see `measurements.py`), appends every row to
`results.jsonl` as soon as it is found, and renews the tables of `README.md`
and the picture from the newest rows. An empty `--what=` only does the latter.
`--resume` goes on with a run that was cut off, at the same commit.

Contenders of one length are interleaved (A B C A B C ...) after a warm-up;
the tables show medians. Nothing else should use the machine.
"""

import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from absl import app, flags  # noqa: E402

from experiments.speed_64k import measurements, plot, rows, tables  # noqa: E402
from psa_jax import report  # noqa: E402

DEFAULT = [what for what in measurements.MEASUREMENTS if what != 'attention']

_WHAT = flags.DEFINE_list(
  'what', DEFAULT, f'Measurements: {", ".join(measurements.MEASUREMENTS)}.'
)
_LENGTHS = flags.DEFINE_list(
  'lengths',
  ['2048', '4096', '8192', '16384', '32768', '65536'],
  'Tokens, for `lengths`, `decode` and `peak`.',
)
_BLOCKS = flags.DEFINE_list(
  'blocks', ['24', '48', '96'], 'Key blocks of 64 that a tile reads at most.'
)
_REPEATS = flags.DEFINE_integer(
  'repeats',
  0,
  'Timed rounds of everything; 0: fewer rounds for what takes long.',
  lower_bound=0,
)
_LENGTH = flags.DEFINE_integer(
  'length', 65_536, 'Tokens, for `attention`, `step` and `memory`.'
)
_RECIPE = flags.DEFINE_string(
  'recipe', 'configs/lm_64k.py', 'Recipe of `attention`, `step` and `memory`.'
)
_PEERS = flags.DEFINE_string(
  'peers', '.venv-peers/bin/python', 'Python with PyTorch; empty for none.'
)
_PEER_GIB = flags.DEFINE_float(
  'peer_gib', 8, 'Memory that a PyTorch process may take, in GiB.'
)
_QUADRATIC_GIB = flags.DEFINE_float(
  'quadratic_gib',
  1,
  'Largest [T, T] f32 array for jax.nn.dot_product_attention, in GiB; at '
  'worst, in its backward pass, it has six of them at once.',
)
_RESUME = flags.DEFINE_bool(
  'resume', False, 'Skip what this commit has measured already.'
)
_WRITE = flags.DEFINE_bool(
  'write', True, 'Append to results.jsonl, renew README.md and the picture.'
)


def main(argv):
  """Runs the chosen measurements and writes them down."""
  if len(argv) > 1:
    raise app.UsageError(f'unknown argument {argv[1]!r}')
  chosen = {**measurements.MEASUREMENTS, **measurements.CHILDREN}
  unknown = sorted(set(_WHAT.value) - set(chosen))
  if unknown:
    raise app.UsageError(f'--what={unknown[0]} is none of {list(chosen)}')
  book = rows.Book(rows.RESULTS if _WRITE.value else None, resume=_RESUME.value)
  try:
    for what in _WHAT.value:
      chosen[what](settings(), book)
  finally:
    finish(book)


def settings():
  """The command line as one value."""
  return measurements.Settings(
    lengths=tuple(map(int, _LENGTHS.value)),
    blocks=tuple(map(int, _BLOCKS.value)),
    repeats=_REPEATS.value,
    python=_PEERS.value,
    peer_gib=_PEER_GIB.value,
    quadratic_gib=_QUADRATIC_GIB.value,
    length=_LENGTH.value,
    recipe=_RECIPE.value,
  )


def finish(book):
  """Prints the tables of this run, and renews the page from all rows."""
  for name, text in tables.sections(rows.newest(book.rows)).items():
    print(f'{name}\n\n{text}\n')
  if _WRITE.value:
    render(rows.HERE / 'README.md', rows.newest(rows.read()))


def render(page, found):
  """Puts the tables and the picture of `found` into the page."""
  made = tables.sections(found)
  if 'targets' in made:
    plot.draw(found, page.parent / 'speed.png')
    made['picture'] = '![time and memory over the length](speed.png)'
  for name, text in made.items():
    report.replace_section(page, name, text)


if __name__ == '__main__':
  app.run(main)
