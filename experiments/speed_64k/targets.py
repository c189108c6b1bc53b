"""What was promised at 65,536 tokens, and whether it was reached.

Everything is computed from rows of `lengths`, `decode` and `peak`; "dense" is
always the fastest of all dense contenders at that length and pass. Ratios are
of the smallest list that was measured, and of the whole operation: selection
is inside.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from experiments.speed_64k import contenders as lib
from experiments.speed_64k.pipe import NAMES, ONE_THREAD

SDPA = NAMES['sdpa']
DENSE = (lib.OURS_DENSE, lib.JAX_DENSE, SDPA, ONE_THREAD)
BOTH = lib.PASSES[2]
LENGTH, CROSSOVER = 65_536, 4_096
# Products of [queries, keys] with a head's width: scores and output forward;
# backward again the scores, and the gradients of p, v, q and k.
PRODUCTS = {'forward': 2, 'backward': 5, BOTH: 7}

Row = dict[str, Any]


class Target(NamedTuple):
  """One line of the table."""

  name: str
  wanted: str
  measured: str
  verdict: str


def median(rows, what, length, contender, which) -> float | None:
  """Median seconds of one contender, or None if there are none."""
  for row in rows:
    asked = row['what'], row['length'], row.get('contender'), row.get('pass')
    if asked == (what, length, contender, which) and 'median' in row:
      return row['median']
  return None


def fastest_dense(rows, what, length, which) -> tuple[str, float] | None:
  """Name and seconds of the fastest dense contender."""
  found = [
    (name, took)
    for name in DENSE
    if (took := median(rows, what, length, name, which)) is not None
  ]
  return min(found, key=lambda x: x[1], default=None)


def settings(rows) -> list[int]:
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
  found = None
  compared = {row['length'] for row in rows if row['what'] == 'lengths'}
  for length in sorted(compared, reverse=True):
    ours = median(rows, 'lengths', length, lib.whole(blocks), BOTH)
    dense = fastest_dense(rows, 'lengths', length, BOTH)
    if ours is None or dense is None:
      continue
    if ours >= dense[1]:
      break
    found = length
  return found


def gemm_share(rows, row: Row, pairs: str) -> float | None:
  """Useful flops a second as a share of the machine's own product.

  Args:
    rows: with the product's own row at the same length.
    row: of a sparse contender.
    pairs: `pairs_read` or `pairs_visible`.
  """
  if 'median' not in row or pairs not in row:
    return None
  took = median(rows, row['what'], row['length'], lib.GEMM, 'forward')
  if took is None:
    return None
  rate = 2 * lib.GEMM_SIZE**3 / took
  flops = 2 * PRODUCTS[row['pass']] * row[pairs] * row['head_dim']
  return flops / row['median'] / rate


def targets(rows: Sequence[Row]) -> list[Target]:
  """The targets, each with what was found or `not measured`."""
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


def _target(name, wanted, found, reached):
  if found is None:
    return Target(name, wanted, 'not measured', '')
  return Target(name, wanted, found, 'met' if reached else 'missed')


def _ratio(rows, what, blocks, which, least):
  """How much faster the whole operation is than the fastest dense one."""
  name = f'{which}, selection included, {blocks} blocks, against dense'
  ours = median(rows, what, LENGTH, lib.whole(blocks), which)
  dense = fastest_dense(rows, what, LENGTH, which)
  if ours is None or dense is None:
    return _target(name, f'at least {least}x', None, False)
  ratio = dense[1] / ours
  return _target(
    name, f'at least {least}x', f'{ratio:.1f}x ({dense[0]})', ratio >= least
  )


def _crossover(rows, blocks):
  name = f'forward+backward beats dense from, {blocks} blocks'
  wanted = f'{CROSSOVER:,} tokens or less'
  if fastest_dense(rows, 'lengths', LENGTH, BOTH) is None:
    return _target(name, wanted, None, False)
  at = crossover(rows, blocks)
  text = 'never' if at is None else f'{at:,} tokens'
  return _target(name, wanted, text, at is not None and at <= CROSSOVER)


def _share(rows, blocks):
  name = 'share of the f32 GEMM rate on what is selected, forward, kernel alone'
  texts, reached = [], False
  for block_q in lib.tiles(blocks, [blocks]):
    for row in rows:
      asked = row['what'], row['length'], row.get('contender'), row.get('pass')
      wanted = 'lengths', LENGTH, lib.kernel(blocks, block_q), 'forward'
      read = gemm_share(rows, row, 'pairs_read') if asked == wanted else None
      seen = gemm_share(rows, row, 'pairs_visible') if read else None
      if read is None or seen is None:
        continue
      texts.append(
        f'{read:.0%} ({seen:.0%} without what causality masks)'
        + (f' with tiles of {block_q}' if block_q != lib.BLOCK_Q else '')
      )
      reached = reached or (block_q == lib.BLOCK_Q and seen >= 0.45)
  return _target(name, 'at least 45%', ', '.join(texts) or None, reached)


def _memory(rows, blocks):
  name = f'memory of forward+backward, {LENGTH:,} over {LENGTH // 2:,} tokens'
  sizes = [
    row['bytes']
    for length in (LENGTH // 2, LENGTH)
    for row in rows
    if (row['what'], row['length']) == ('peak', length)
    and row['contender'] == lib.whole(blocks)
    and 'bytes' in row
  ]
  if len(sizes) != 2:
    return _target(name, 'at most 2.1x', None, False)
  ratio = sizes[1] / sizes[0]
  return _target(name, 'at most 2.1x', f'{ratio:.2f}x', ratio <= 2.1)


def _dense(rows, which):
  name = f'our dense against PyTorch SDPA, {which}'
  ours = median(rows, 'lengths', LENGTH, lib.OURS_DENSE, which)
  theirs = median(rows, 'lengths', LENGTH, SDPA, which)
  if ours is None or theirs is None:
    return _target(name, 'at least 1.0x', None, False)
  ratio = theirs / ours
  return _target(name, 'at least 1.0x', f'{ratio:.2f}x', ratio >= 1)
