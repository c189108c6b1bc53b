"""Bytes that attention fetches under cascade pruning, counted analytically.

What SpAtten (arXiv 2012.09852) counts as DRAM access of attention layers: for
every head that is left the queries, the keys of the tokens that are left and
the values that local pruning left, each at its own width in bits. Weights, the
feed-forward layer and outputs are not in it, as in the paper.

Every reduction is against a named baseline: the same rows and heads unpruned,
at one precision. The paper's 10x holds quantisation against float32 (6 bits
and, for 7 % of the inputs, 4 more: 32 / 6.28 = 5.1x of it); against float16
half of that factor is gone. A number without the baseline's name says nothing.

Not done: on-chip reuse and transaction sizes; this is a count, not a speed.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

BASELINES = {'float32': 32, 'bfloat16': 16, 'float16': 16, 'int8': 8}


class Traffic(NamedTuple):
  """Bytes of one forward pass, or one generated token, of one sequence.

  Attributes:
    fetched: with pruning and at the given bits.
    baseline: nothing pruned, at the baseline's precision.
    baseline_precision: which one that is.
    factors: how much less each cause leaves, given those before it: tokens,
      heads, values, bits. Their product is `reduction`.
  """

  fetched: float
  baseline: float
  baseline_precision: str
  factors: dict[str, float]

  @property
  def reduction(self) -> float:
    """Baseline over fetched."""
    return self.baseline / self.fetched

  def __str__(self) -> str:
    causes = ', '.join(f'{k} {v:.2f}x' for k, v in self.factors.items())
    return (
      f'{self.fetched:,.0f} bytes, {self.reduction:.2f}x less than '
      f'{self.baseline_precision} ({causes})'
    )


class Bits(NamedTuple):
  """Width of what is fetched.

  Attributes:
    q, k, v: bits an entry.
    refetched: more bits, of keys and queries, where the first do not suffice.
    refetch_share: share of the inputs where that happens.
  """

  q: float
  k: float
  v: float
  refetched: float = 0
  refetch_share: float = 0


def cascade_bytes(
  layers: Sequence[tuple[int, int]],
  *,
  tokens: int,
  heads: int,
  head_dim: int,
  baseline: str,
  group: int = 1,
  value_dim: int | None = None,
  value_keep: float = 1.0,
  bits: Bits | None = None,
  generation: bool = False,
) -> Traffic:
  """Counts the bytes of all layers.

  Args:
    layers: of each layer the tokens and kv heads that are left, for instance
      from `attention.survivors.plan`.
    tokens: rows of the unpruned model; cached tokens for `generation`.
    heads: kv heads of the unpruned model.
    head_dim: H.
    baseline: precision of the unpruned model, a key of `BASELINES`.
    group: query heads a kv head.
    value_dim: Hv; None means H.
    value_keep: share of the values that a query reads. Counts only in
      `generation`, where one query fetches them for itself; the queries of a
      whole sentence together want all of them.
    bits: what is fetched; None means the baseline's width.
    generation: one query a layer instead of one for every token left.

  Raises:
    ValueError: an unknown baseline, or layers that hold more than the model.
  """
  if baseline not in BASELINES:
    raise ValueError(
      f'unknown baseline {baseline!r}; choose from {list(BASELINES)}'
    )
  if any(not 0 <= t <= tokens or not 0 <= h <= heads for t, h in layers):
    raise ValueError(
      f'layers {list(layers)} hold more than {tokens} tokens and {heads} heads'
    )
  width = BASELINES[baseline]
  plain = Bits(width, width, width)
  value_dim = head_dim if value_dim is None else value_dim
  keep = value_keep if generation else 1.0

  def count(layers, keep, bits):
    again = bits.refetched * bits.refetch_share
    total = 0.0
    for tokens_left, alive in layers:
      queries = group * (1 if generation else tokens_left)
      # The heads of a group choose for themselves; at most all is fetched.
      values = min(group * math.ceil(keep * tokens_left - 1e-9), tokens_left)
      scores = queries * (bits.q + again) + tokens_left * (bits.k + again)
      total += alive * (head_dim * scores + value_dim * values * bits.v)
    return total / 8

  whole = [(tokens, heads)] * len(layers)
  stages = {
    'tokens': ([(t, heads) for t, _ in layers], 1.0, plain),
    'heads': (layers, 1.0, plain),
    'values': (layers, keep, plain),
    'bits': (layers, keep, bits or plain),
  }
  first = before = count(whole, 1.0, plain)
  factors = {}
  for cause, stage in stages.items():
    after = count(*stage)
    factors[cause] = before / after if after else math.inf
    before = after
  return Traffic(before, first, baseline, factors)
