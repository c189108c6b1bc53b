"""Windows, against a plain-Python reading of their definition."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from psa_jax.config import ConfigError
from psa_jax.data.text import windows as lib


def packed(documents, split='train'):
  tokens, starts = [], []
  for document in documents:
    starts.append(len(tokens))
    tokens += [0, *document]
  return lib.Packed(
    np.array([*tokens, 0], np.uint8), np.array(starts, np.int64), split
  )


lengths = st.lists(st.integers(0, 9), min_size=1, max_size=8)


@given(lengths, st.integers(1, 12), st.booleans(), st.booleans())
def test_windows_are_what_they_say(lengths, seq_len, cut, train):
  """Every field of every window, from the definition, token by token."""
  documents = [bytes([i + 1]) * n for i, n in enumerate(lengths)]
  split = packed(documents, 'train' if train else 'validation')
  stream = split.tokens.tolist()
  if train and len(stream) <= seq_len:
    with pytest.raises(ConfigError):
      lib.windows(split, seq_len=seq_len, cut_documents=cut)
    return
  windows = lib.windows(split, seq_len=seq_len, cut_documents=cut)
  targets = len(stream) - 1
  full = targets // seq_len
  assert len(windows) == (full if train else -(-targets // seq_len))
  opens = [sum(lengths[:i]) + i for i in range(len(lengths))]
  for i, window in enumerate(windows):
    segment, position = 0, 0
    for t in range(seq_len):
      place = i * seq_len + t
      real = place < targets
      if t == 0 or (cut and place in opens):
        segment, position = segment + 1, 0
      expected = {
        'inputs': stream[place] if real else 0,
        'targets': stream[place + 1] if real else 0,
        'segment_ids': segment if real else 0,
        'positions': position if real else 0,
        'weights': float(real),
      }
      assert {k: v[t].item() for k, v in window.items()} == expected
      position += 1
  for key, value in windows[0].items():
    assert value.dtype == (np.float32 if key == 'weights' else np.int32)
    assert value.shape == (seq_len,)


@given(lengths, st.integers(1, 12))
def test_validation_judges_every_token_once(lengths, seq_len):
  documents = [bytes([i + 1]) * n for i, n in enumerate(lengths)]
  split = packed(documents, 'validation')
  windows = lib.windows(split, seq_len=seq_len, cut_documents=False)
  judged = [t for w in windows for t in w['targets'][w['weights'] > 0]]
  assert judged == split.tokens[1:].tolist()


def test_the_last_token_of_a_document_predicts_its_end_inside_its_segment():
  split = packed([b'ab', b'cd'], 'validation')
  (window,) = lib.windows(split, seq_len=6, cut_documents=True)
  assert window['inputs'].tolist() == [0, *b'ab', 0, *b'cd']
  assert window['targets'].tolist() == [*b'ab', 0, *b'cd', 0]
  assert window['segment_ids'].tolist() == [1, 1, 1, 2, 2, 2]
  assert window['positions'].tolist() == [0, 1, 2, 0, 1, 2]
  assert window['weights'].tolist() == [1] * 6


def test_short_splits():
  short = packed([b'abc'])
  with pytest.raises(
    ConfigError, match='needs 6, .* has 5 in 1 documents'
  ) as e:
    lib.windows(short, seq_len=5, cut_documents=False)
  assert 'train.seq_len' in str(e.value)
  assert len(lib.windows(short, seq_len=4, cut_documents=False)) == 1
  (window,) = lib.windows(
    packed([b'abc'], 'validation'), seq_len=8, cut_documents=True
  )
  assert window['weights'].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
  assert window['segment_ids'].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
  with pytest.raises(ConfigError, match='at least 1'):
    lib.windows(short, seq_len=0, cut_documents=False)
  windows = lib.windows(short, seq_len=4, cut_documents=False)
  for i in (-1, 1):
    with pytest.raises(IndexError):
      windows[i]
