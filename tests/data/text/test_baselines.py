"""Baselines against a case done by hand and a slow independent count."""

import collections
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from psa_jax.data.text import baselines
from psa_jax.data.text.tokenizer import ByteTokenizer


def bits(train, validation, nul=False):
  counts = [
    baselines.pair_counts(d, ByteTokenizer(nul)) for d in (train, validation)
  ]
  return (
    baselines.unigram_bits_per_byte(*counts),
    baselines.bigram_bits_per_byte(*counts),
  )


def test_example_done_by_hand():
  """Train `|aab|`, validation `|ab|c|` (| separates), 256 symbols.

  Train predicts a, a, b, |: unigram (c+1)/(4+256) is 3/260 for a, 2/260 for b
  and |, 1/260 for c. Pairs |a, aa, ab, b|: p(a||) = 2/257, p(b|a) = 2/258,
  p(||b) = 2/257, p(c||) = 1/257, p(||c) = 1/256.
  """
  unigram, bigram = bits([b'aab'], [b'ab', b'c'])
  by_hand = [3 / 260, 2 / 260, 2 / 260, 1 / 260, 2 / 260]
  assert unigram == pytest.approx(-sum(map(math.log2, by_hand)) / 5)
  by_hand = [2 / 257, 2 / 258, 2 / 257, 1 / 257, 1 / 256]
  assert bigram == pytest.approx(-sum(map(math.log2, by_hand)) / 5)


documents = st.lists(st.binary(min_size=0, max_size=30), min_size=1, max_size=5)


@given(documents, documents)
def test_against_a_dictionary_count(train, validation):
  def stream(split):
    symbols = [0]
    for document in split:
      symbols += [b or 256 for b in document] + [0]
    return symbols

  pairs = collections.Counter(
    zip(stream(train), stream(train)[1:], strict=False)
  )
  single, context = collections.Counter(), collections.Counter()
  for (a, b), n in pairs.items():
    single[b] += n
    context[a] += n
  scored = list(zip(stream(validation), stream(validation)[1:], strict=False))
  total = sum(single.values())
  uni = [math.log2((single[b] + 1) / (total + 257)) for _, b in scored]
  bi = [math.log2((pairs[a, b] + 1) / (context[a] + 257)) for a, b in scored]
  unigram, bigram = bits(train, validation, nul=True)
  assert unigram == pytest.approx(-np.mean(uni))
  assert bigram == pytest.approx(-np.mean(bi))


def test_unseen_text_costs_log_v():
  unigram, bigram = bits([b''], [b'abc'])
  assert unigram == pytest.approx((3 * math.log2(257) + math.log2(257 / 2)) / 4)
  assert bigram == pytest.approx((math.log2(257) + 3 * math.log2(256)) / 4)


def test_a_deterministic_text_costs_nothing_to_the_bigram_alone():
  text = bytes(range(1, 256)) * 400
  unigram, bigram = bits([text], [text])
  assert unigram == pytest.approx(math.log2(255), abs=0.01)
  assert bigram < 0.8 < unigram  # 1/256 smoothing mass per 400 counts


def test_chunks_do_not_lose_pairs(monkeypatch):
  rng = np.random.default_rng(0)
  texts = [
    rng.integers(1, 256, n).astype(np.uint8).tobytes() for n in range(50)
  ]
  whole = baselines.pair_counts(texts, ByteTokenizer())
  monkeypatch.setattr(baselines, '_CHUNK', 64)
  np.testing.assert_array_equal(
    baselines.pair_counts(texts, ByteTokenizer()), whole
  )
  assert whole.sum() == sum(map(len, texts)) + len(texts)
