"""Ids stand for bytes, exactly, whatever the bytes are."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from psa_jax.config import ConfigError, DataConfig
from psa_jax.data.text import tokenizer
from psa_jax.data.text.tokenizer import BpeTokenizer, ByteTokenizer

TEXT = (
  'The committee, in 1776 and 12345678, considered the considerable '
  'considerations of Zoë and 日本語.\n\n\tThe end; the end!\r\n'
).encode() * 4


@pytest.fixture(scope='module')
def bpe():
  return BpeTokenizer.train([TEXT, b'more text'], size=400)


def test_byte_ids_are_byte_values():
  ids = ByteTokenizer().encode(b'\x01a\xff')
  assert ids.tolist() == [1, 97, 255]
  assert ids.dtype == np.int32
  assert ByteTokenizer().vocab_size == 256


@given(st.binary())
def test_bytes_round_trip_and_never_use_the_separator(data):
  byte_tokenizer = ByteTokenizer(nul=b'\0' in data)
  ids = byte_tokenizer.encode(data)
  assert len(ids) == len(data)
  assert tokenizer.SEPARATOR not in ids
  assert byte_tokenizer.decode(ids) == data


def test_a_real_nul_is_not_the_separator():
  with_nul = ByteTokenizer(nul=True)
  assert with_nul.encode(b'a\0b').tolist() == [97, 256, 98]
  assert with_nul.vocab_size == 257
  with pytest.raises(ConfigError, match='NUL byte'):
    ByteTokenizer().encode(b'a\0b')


@given(data=st.binary())
def test_bpe_round_trips_any_bytes(bpe, data):
  ids = bpe.encode(data)
  assert tokenizer.SEPARATOR not in ids
  assert bpe.decode(ids) == data


@pytest.mark.tier('default')
@given(data=st.text())
def test_bpe_round_trips_any_text(bpe, data):
  assert bpe.decode(bpe.encode(data.encode())) == data.encode()


def test_bpe_round_trips_the_name_of_its_separator(bpe):
  """The text of a special token must not become that token."""
  data = tokenizer._SEPARATOR_TOKEN.encode() + b'<doc>\0'
  ids = bpe.encode(data)
  assert tokenizer.SEPARATOR not in ids
  assert bpe.decode(ids) == data


def test_bpe_compresses_what_it_was_trained_on(bpe):
  assert 257 < bpe.vocab_size <= 400
  ids = bpe.encode(TEXT)
  assert len(ids) < len(TEXT) / 2
  assert ids.max() < bpe.vocab_size


def test_bpe_tokens_stay_within_words(bpe):
  words = [token for token in bpe.token_bytes[1:] if len(token) > 1]
  assert b' the' in words
  assert not any(b' ' in word[1:].strip() for word in words)
  assert not any(sum(c in b'0123456789' for c in word) > 3 for word in words)
  assert any(max(word) >= 0x80 for word in words)  # UTF-8 is not torn apart


def test_bpe_training_is_repeatable_and_survives_saving(bpe, tmp_path):
  again = BpeTokenizer.train([TEXT, b'more text'], size=400)
  assert again.token_bytes == bpe.token_bytes
  bpe.save(tmp_path / 'tokenizer.json')
  loaded = BpeTokenizer.load(tmp_path / 'tokenizer.json')
  assert loaded.token_bytes == bpe.token_bytes
  assert loaded.encode(TEXT).tolist() == bpe.encode(TEXT).tolist()


def test_encode_all_is_encode_of_each(bpe):
  documents = [TEXT[i : 3 * i] for i in range(70)]
  for each in (bpe, ByteTokenizer()):
    together = [ids.tolist() for ids in each.encode_all(documents)]
    assert together == [each.encode(d).tolist() for d in documents]
  assert list(bpe.encode_all([])) == []


@pytest.mark.parametrize('nul', [False, True])
def test_token_bytes_say_what_ids_stand_for(bpe, nul):
  for each in (bpe, ByteTokenizer(nul)):
    assert len(each.token_bytes) == each.vocab_size
    lengths = tokenizer.byte_lengths(each)
    assert lengths[each.encode(TEXT)].sum() == len(TEXT)
    assert lengths[tokenizer.SEPARATOR] == 1


def test_config_names_the_tokenizer():
  made = tokenizer.make_tokenizer(DataConfig(), [])
  assert isinstance(made, ByteTokenizer)
  made = tokenizer.make_tokenizer(DataConfig(tokenizer='bpe:300'), [TEXT])
  assert isinstance(made, BpeTokenizer) and made.vocab_size == 300
  assert tokenizer.bpe_size('bpe:257') == 257
  for name in ('bpe', 'bpe:', 'bpe:-1', 'bpe:256', 'bpe:9999999', 'words', ''):
    with pytest.raises(ConfigError, match='data.tokenizer is'):
      tokenizer.bpe_size(name)
