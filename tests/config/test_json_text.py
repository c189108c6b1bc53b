"""JSON of others: what is read, and one short reason for all that is not."""

import json

import pytest

from psa_jax.config import json_text


@pytest.mark.parametrize(
  'value',
  [
    {},
    {'a': [1, -2.5, True, None, 'é\n"\\'], 'b': {'c': {}}},
    ['[' * 500, '"]}' * 500, '\\'],  # brackets in text are no depth
    [{}] * 1000,
  ],
)
def test_what_json_writes_is_read(value):
  assert json_text.parse(json.dumps(value)) == value
  assert json_text.parse(json.dumps(value).encode()) == value


@pytest.mark.parametrize(
  ('content', 'reason'),
  [
    ('[' * 3000 + ']' * 3000, 'nested more than 100 deep'),
    ('{"a":' * 3000 + '1' + '}' * 3000, 'nested more than 100 deep'),
    ('[' * 200, 'nested more than 100 deep'),
    ('"' + '\\"[' * 20000, 'not JSON: Unterminated string'),
    (b'{"a": "\xff"}', 'byte 7 is not UTF-8'),
    (b'', 'not JSON: Expecting value at line 1 column 1'),
    ('{"a": 1', 'not JSON: Expecting'),
    ('{"a": ' + '9' * 5000 + '}', 'a number is too long'),
    ('x' * 10000, 'not JSON'),
  ],
  ids=lambda x: repr(x)[:20],
)
def test_what_is_no_json_is_refused_in_a_few_words(content, reason):
  with pytest.raises(ValueError, match=reason) as caught:
    json_text.parse(content)
  assert len(str(caught.value)) < 100


def test_a_file_is_read_up_to_a_bound(tmp_path, monkeypatch):
  path = tmp_path / 'a.json'
  path.write_text('{"a": 1}')
  assert json_text.read_object(path) == {'a': 1}
  path.write_text('[1]')
  assert json_text.read(path) == [1]
  with pytest.raises(ValueError, match='no JSON object'):
    json_text.read_object(path)
  monkeypatch.setattr(json_text, 'MOST_BYTES', 2)
  with pytest.raises(ValueError, match='more than 0 MiB'):
    json_text.read(path)


def test_a_seal_finds_every_flipped_bit():
  value = {'b': [1.25, {'c': None}], 'a': 'x'}
  text = json.dumps(json_text.sealed(value)).encode()
  assert json_text.unsealed(json.loads(text)) == value
  for place in range(len(text)):
    for bit in range(8):
      flipped = bytearray(text)
      flipped[place] ^= 1 << bit
      try:
        found = json_text.unsealed(json_text.parse(bytes(flipped)))
      except ValueError:
        continue
      assert found == value, flipped


@pytest.mark.parametrize('value', [[], {'a': 1}, {'crc32': None}, 1, None])
def test_what_is_not_sealed_is_refused(value):
  with pytest.raises(ValueError):
    json_text.unsealed(value)
