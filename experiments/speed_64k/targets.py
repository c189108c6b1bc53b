"""What was promised at 65,536 tokens, and whether it was reached.

Everything is computed from rows of `lengths`, `decode` and `peak`; "dense" is
always the fastest of all dense contenders at that length and pass. Ratios are
of the smallest list that was measured, and of the whole operation: selection
is inside.
"""

from collections.abc import Sequence

from experiments.bench import tables as lib
from experiments.bench.attention import JAX_DENSE
from experiments.bench.passes import BOTH
from experiments.bench.peers import ONE_THREAD, SDPA
from experiments.bench.rows import Row
from experiments.bench.tables import Target
from experiments.speed_64k import contenders

DENSE = (contenders.OURS_DENSE, JAX_DENSE, SDPA, ONE_THREAD)
LENGTH, CROSSOVER = 65_536, 4_096


def settings(rows: Sequence[Row]) -> list[int]:
  """The sizes of lists that were measured."""
  return sorted({row['blocks'] for row in rows if 'blocks' in row})


def crossover(rows: Sequence[Row], blocks: int) -> int | None:
  """Smallest length from which forward+backward beats every dense one.

  Args:
    rows: of `lengths`.
    blocks: the setting of ours.

  Returns:
    A measured length such that ours is faster there and at all longer
    measured ones; None if it is slower at the longest.
  """
  smallest = None
  compared = {row['length'] for row in rows if row['what'] == 'lengths'}
  for length in sorted(compared, reverse=True):
    at = {'what': 'lengths', 'length': length, 'which': BOTH}
    ours = lib.median(rows, contender=contenders.whole(blocks), **at)
    dense = lib.fastest(rows, DENSE, **at)
    if ours is None or dense is None:
      continue
    if ours >= dense[1]:
      break
    smallest = length
  return smallest


def gemm_rate(rows: Sequence[Row], length: int) -> float | None:
  """Operations a second of the machine's own product, timed at that length."""
  took = lib.median(
    rows, what='lengths', length=length, contender=contenders.GEMM
  )
  return None if took is None else lib.gemm_rate(contenders.GEMM_SIZE, took)


def gemm_shares(row: Row, rate: float) -> tuple[float, float]:
  """Shares of the rate: of all that is read, of what causality leaves."""
  read, seen = (
    lib.gemm_share(row, pairs, row['head_dim'], rate)
    for pairs in ('pairs_read', 'pairs_visible')
  )
  return read, seen


def targets(rows: Sequence[Row]) -> list[Target]:
  """The targets, each with what was measured or `not measured`."""
  blocks = min(settings(rows), default=24)
  return [
    _ratio(rows, 'lengths', blocks, 'forward', 12),
    _ratio(rows, 'lengths', blocks, 'backward', 9),
    _ratio(rows, 'decode', blocks, 'decode', 15),
    _crossover(rows, blocks),
    _share(rows, blocks),
    _memory(rows, blocks),
    _dense(rows, 'forward'),
    _dense(rows, 'backward'),
  ]


def _ratio(rows, what, blocks, which, least):
  """How much faster the whole operation is than the fastest dense one."""
  target = Target(
    f'{which}, selection included, {blocks} blocks, against dense',
    f'at least {least}x',
  )
  at = {'what': what, 'length': LENGTH, 'which': which}
  ours = lib.median(rows, contender=contenders.whole(blocks), **at)
  dense = lib.fastest(rows, DENSE, **at)
  if ours is None or dense is None:
    return target
  return target.at_least(dense[1] / ours, least, dense[0])


def _crossover(rows, blocks):
  target = Target(
    f'forward+backward beats dense from, {blocks} blocks',
    f'{CROSSOVER:,} tokens or less',
  )
  if not lib.fastest(rows, DENSE, what='lengths', length=LENGTH, which=BOTH):
    return target
  at = crossover(rows, blocks)
  text = 'never' if at is None else f'{at:,} tokens'
  return target.judged(text, at is not None and at <= CROSSOVER)


def _share(rows, blocks):
  target = Target(
    'share of the f32 GEMM rate on what is selected, forward, kernel alone',
    'at least 45%',
  )
  rate = gemm_rate(rows, LENGTH)
  texts, reached = [], False
  for block_q in contenders.tiles(blocks, [blocks]):
    wanted = 'lengths', LENGTH, contenders.kernel(blocks, block_q), 'forward'
    for row in rows:
      about = row['what'], row['length'], row.get('contender'), row.get('pass')
      if about != wanted or rate is None or 'median' not in row:
        continue
      read, seen = gemm_shares(row, rate)
      own = block_q == contenders.BLOCK_Q
      texts.append(
        f'{read:.0%} ({seen:.0%} without what causality masks)'
        + ('' if own else f' with tiles of {block_q}')
      )
      reached = reached or (own and seen >= 0.45)
  return target.judged(', '.join(texts), reached) if texts else target


def _memory(rows, blocks):
  target = Target(
    f'memory of forward+backward, {LENGTH:,} over {LENGTH // 2:,} tokens',
    'at most 2.1x',
  )
  sizes = [
    row['bytes']
    for length in (LENGTH // 2, LENGTH)
    for row in rows
    if (row['what'], row['length']) == ('peak', length)
    and row['contender'] == contenders.whole(blocks)
    and 'bytes' in row
  ]
  if len(sizes) != 2:
    return target
  ratio = sizes[1] / sizes[0]
  return target.judged(f'{ratio:.2f}x', ratio <= 2.1)


def _dense(rows, which):
  target = Target(f'our dense against PyTorch SDPA, {which}', 'at least 1.0x')
  at = {'what': 'lengths', 'length': LENGTH, 'which': which}
  ours = lib.median(rows, contender=contenders.OURS_DENSE, **at)
  theirs = lib.median(rows, contender=SDPA, **at)
  if ours is None or theirs is None:
    return target
  return target.at_least(theirs / ours, 1, digits=2)
