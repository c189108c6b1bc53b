"""F1 of classes and spans, against scikit-learn and seqeval."""

import jax.numpy as jnp
import numpy as np
import pytest
from seqeval.metrics import classification_report
from seqeval.metrics import f1_score as seqeval_f1
from sklearn.metrics import confusion_matrix
from sklearn.metrics import f1_score as sklearn_f1

from psa_jax.eval import f1, tfidf

TAGS = ('O', 'B-x', 'I-x', 'B-y', 'I-y', 'I-z')
SCHEME = f1.Scheme.of(TAGS)


@pytest.mark.parametrize('seed', range(4))
def test_macro_f1_is_scikit_learns(seed):
  rng = np.random.default_rng(seed)
  classes = 5
  labels = rng.integers(0, classes - 1, 40)  # one class has no label
  guesses = np.where(
    rng.random(40) < 0.5, labels, rng.integers(0, 4 + seed % 2, 40)
  )
  weights = (rng.random(40) < 0.8).astype(np.float32)
  counts = f1.confusion(
    jnp.asarray(guesses), jnp.asarray(labels), jnp.asarray(weights),
    classes=classes,
  )  # fmt: skip
  real = weights > 0
  want = confusion_matrix(labels[real], guesses[real], labels=range(classes))
  np.testing.assert_array_equal(counts, want)
  want = sklearn_f1(labels[real], guesses[real], average='macro')
  assert float(f1.macro_f1(counts)) == pytest.approx(want, abs=1e-6)
  assert f1.macro_f1(np.asarray(counts)) == pytest.approx(want, abs=1e-6)


def test_nothing_judged_has_an_f1_of_0():
  assert float(f1.macro_f1(jnp.zeros((3, 3)))) == 0
  assert float(f1.span_f1(jnp.zeros((3, 2)))) == 0


def sentences(seed, rows=12, width=9):
  """Random tags, nearly right guesses, and rows that end early."""
  rng = np.random.default_rng(seed)
  there = rng.integers(0, len(TAGS), (rows, width))
  noise = rng.random((rows, width)) < 0.25
  guesses = np.where(noise, rng.integers(0, len(TAGS), (rows, width)), there)
  sizes = rng.integers(1, width + 1, rows)
  return guesses, there, np.arange(width)[None] < sizes[:, None]


def named(tags, real):
  return [
    [TAGS[t] for t in row[keep]] for row, keep in zip(tags, real, strict=True)
  ]


@pytest.mark.parametrize('seed', range(8))
def test_span_f1_is_seqevals(seed):
  guesses, there, real = sentences(seed)
  counts = f1.count_spans(*map(jnp.asarray, (guesses, there, real)), SCHEME)
  want, got = named(there, real), named(guesses, real)
  assert float(f1.span_f1(counts)) == pytest.approx(
    seqeval_f1(want, got), abs=1e-6
  )
  report = classification_report(want, got, output_dict=True, zero_division=0)
  by_kind = f1.span_f1_by_kind(np.asarray(counts), SCHEME)
  assert by_kind == {
    kind: pytest.approx(report[kind]['f1-score']) for kind in by_kind
  }
  assert [int(n) for n in counts[2]] == [
    int(report[kind]['support']) if kind in report else 0
    for kind in SCHEME.kinds
  ]


def test_a_span_needs_its_kind_its_beginning_and_its_end():
  def score(guess, there):
    rows = [
      jnp.asarray([[TAGS.index(t) for t in x.split()]]) for x in (guess, there)
    ]
    counts = f1.count_spans(*rows, rows[0] >= 0, SCHEME)
    return float(f1.span_f1(counts))

  there = 'O B-x I-x O'
  assert score(there, there) == 1
  assert score('O B-x O O', there) == 0
  assert score('B-x I-x I-x O', there) == 0
  assert score('O B-y I-y O', there) == 0
  assert score('O I-x I-x O', there) == 1  # opened by an I, as CoNLL reads it
  assert score('O B-x B-x O', there) == 0


def test_a_linear_model_on_words_learns_words():
  texts = [b'red apple', b'red cherry', b'blue sea', b'blue sky'] * 3
  labels = [0, 0, 1, 1] * 3
  judged = [b'a red house', b'a blue house']
  assert tfidf.macro_f1((texts, labels), (judged, [0, 1])) == 1
  assert tfidf.macro_f1((texts, labels), (judged, [1, 0])) == 0
