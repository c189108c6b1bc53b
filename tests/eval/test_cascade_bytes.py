"""Bytes under cascade pruning: by hand, and the paper's arithmetic."""

import math

import pytest

from psa_jax.attention.cascade import CascadeConfig, survivors
from psa_jax.eval.cascade_bytes import Bits, cascade_bytes

MODEL = dict(tokens=10, heads=4, head_dim=8)


def test_nothing_pruned_is_the_baseline():
  traffic = cascade_bytes([(10, 4)] * 3, baseline='float16', **MODEL)
  # Queries, keys and values of 3 layers, 4 heads, 10 tokens, 8 channels.
  assert traffic.baseline == traffic.fetched == 3 * 3 * 4 * 10 * 8 * 2
  assert traffic.reduction == 1 and set(traffic.factors.values()) == {1}


def test_by_hand():
  layers = [(10, 4), (5, 2)]
  traffic = cascade_bytes(layers, baseline='float32', **MODEL)
  assert traffic.baseline == 2 * 3 * 4 * 10 * 8 * 4
  assert traffic.fetched == 3 * (4 * 10 + 2 * 5) * 8 * 4
  assert traffic.factors['tokens'] == 80 / 60
  assert traffic.factors['heads'] == 60 / 50
  assert traffic.factors['values'] == traffic.factors['bits'] == 1


def test_generation_reads_one_query_and_its_own_values():
  one = dict(MODEL, generation=True, baseline='float32', value_keep=0.25)
  traffic = cascade_bytes([(10, 4)], **one)
  assert traffic.fetched == 4 * 8 * (1 + 10 + 3) * 4
  grouped = cascade_bytes([(10, 4)], group=2, **one)
  # Two heads of a group drop different values.
  assert grouped.fetched == 4 * 8 * (2 + 10 + 6) * 4
  most = cascade_bytes([(10, 4)], group=8, **one)
  assert most.fetched == 4 * 8 * (8 + 10 + 10) * 4
  whole = cascade_bytes([(10, 4)], **(one | {'generation': False}))
  assert whole.reduction == 1, 'a whole sentence wants all values'


def test_the_baseline_makes_half_of_the_papers_factor():
  """6 bits and 4 more for 7.0 % of the inputs: 5.1x, but of float32 only."""
  bits = Bits(6, 6, 6.28, refetched=4, refetch_share=0.07)
  same = [(1024, 12)] * 12
  model = dict(tokens=1024, heads=12, head_dim=64, bits=bits)
  paper = cascade_bytes(same, baseline='float32', **model)
  assert paper.reduction == pytest.approx(32 / 6.28) == pytest.approx(5.1, 0.01)
  half = cascade_bytes(same, baseline='float16', **model)
  assert half.reduction == pytest.approx(paper.reduction / 2)
  assert 'float32' in str(paper) and 'float16' in str(half)
  assert half.baseline_precision == 'float16'


def test_factors_multiply_to_the_reduction():
  settings = CascadeConfig(token_keep=0.4, head_keep=0.8, value_keep=0.2)
  sizes = survivors.plan(
    settings, 12, tokens=1024, kv_heads=12, amount=1.0, packed=False
  )
  traffic = cascade_bytes(
    [(size.tokens, size.heads) for size in sizes],
    tokens=1024,
    heads=12,
    head_dim=64,
    baseline='float32',
    value_keep=settings.value_keep,
    bits=Bits(12, 12, 8),
    generation=True,
  )
  assert math.prod(traffic.factors.values()) == pytest.approx(traffic.reduction)
  assert all(factor > 1 for factor in traffic.factors.values())
  mean = sum(size.tokens for size in sizes) / 12 / 1024
  assert traffic.factors['tokens'] == pytest.approx(1 / mean, rel=0.01)


def test_refusals():
  with pytest.raises(ValueError, match="unknown baseline 'fp32'"):
    cascade_bytes([(1, 1)], baseline='fp32', **MODEL)
  with pytest.raises(ValueError, match='hold more than 10 tokens'):
    cascade_bytes([(11, 4)], baseline='float32', **MODEL)
