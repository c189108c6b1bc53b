"""Debian's descriptions: how they pair, and the file that is kept."""

import pytest

from psa_jax.config import ConfigError, DataConfig
from psa_jax.data import sources
from psa_jax.data.sources import ddtp

ENGLISH = b"""Package: one
Description-md5: 11
Description-en: a tool
 It does
 much.
 .
 And more.

Package: two
Description-md5: 22
Description-en: a tool
 Only here.

Package: three
Description-md5: 33
Description-en: GNU
 One paragraph
 .
 and two.
"""
FRENCH = b"""Package: one
Description-md5: 11
Description-fr: un outil
 Il fait
 beaucoup.
 .
 Et plus.

Package: three
Description-md5: 33
Description-fr: GNU
 Un seul.
"""


def test_paragraphs_pair_where_both_have_as_many():
  assert list(ddtp.pairs(ENGLISH, FRENCH)) == [
    (b'one', b'a tool', b'un outil'),
    (b'one', b'It does much.', b'Il fait beaucoup.'),
    (b'one', b'And more.', b'Et plus.'),
  ]


def test_a_return_inside_a_line_does_not_end_it():
  english, french = ENGLISH.replace(b'It does', b'It\rdoes'), FRENCH
  assert list(ddtp.pairs(english, french)) == list(ddtp.pairs(ENGLISH, french))


def load(folder):
  config = DataConfig(source='ddtp_en_fr', data_dir=str(folder))
  return sources.load(config, sources.PAIRS)


def test_descriptions_from_the_prepared_file(tmp_path):
  with pytest.raises(
    ConfigError, match='prepare --name=ddtp_en_fr --data_dir='
  ):
    load(tmp_path)
  path = tmp_path / 'ddtp_en_fr' / ddtp.PAIRS_FILE
  path.parent.mkdir()
  path.write_text(''.join(f'p{i}\tthe {i}\tle {i}\n' for i in range(99)))
  pairs = load(tmp_path)
  assert pairs.manifest['train'] + pairs.manifest['test'] < 99
  assert pairs.examples.train[0].target.startswith(b'le')
  path.write_text('p\tno translation\n')
  with pytest.raises(
    ConfigError, match='line 1 has 2 fields.*prepare it again'
  ):
    load(tmp_path)
