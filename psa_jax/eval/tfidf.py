"""What a linear model on words and pairs of words scores.

The baseline of text classification: logistic regression on TF-IDF of words and
pairs of neighbours that occur twice, by scikit-learn. A quarter of a minute for
25,000 sentences.
"""

from collections.abc import Sequence

import numpy as np

MOST = 50_000  # texts; more take minutes


def macro_f1(
  train: tuple[Sequence[bytes], Sequence[int]],
  judged: tuple[Sequence[bytes], Sequence[int]],
) -> float:
  """Macro-F1 on `judged` of a model fitted to `train`.

  Args:
    train: texts and labels.
    judged: likewise.
  """
  from sklearn.feature_extraction.text import TfidfVectorizer
  from sklearn.linear_model import LogisticRegression
  from sklearn.metrics import f1_score

  words = TfidfVectorizer(
    ngram_range=(1, 2), min_df=2, sublinear_tf=True, decode_error='replace'
  )
  features = words.fit_transform(train[0])
  # Balanced, because macro-F1 counts rare classes as much as frequent ones.
  model = LogisticRegression(C=10, max_iter=500, class_weight='balanced')
  guesses = model.fit(features, np.asarray(train[1])).predict(
    words.transform(judged[0])
  )
  return float(f1_score(judged[1], guesses, average='macro'))
