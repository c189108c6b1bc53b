"""Tags of Python programs."""

import numpy as np
import pytest

from psa_jax.config import DataConfig
from psa_jax.data import sources
from psa_jax.data.examples.tagged import Tagged
from psa_jax.data.sources import stdlib_tags

CODE = '''
import os.path as p, sys
from . import a
from .b.c import d
async def f(x, *args, y: int = 3, **kw) -> str:
  """Prose."""
  return os.path.join("ü", x).strip().z
class Q(f):
  v = lambda w: w
'''


def test_tags_of_a_program_are_those_of_its_syntax_tree():
  sentences = list(stdlib_tags.python_sentences(CODE))
  spans = [
    (word, stdlib_tags.TAGS[tag])
    for words, tags in sentences
    for word, tag in zip(words, tags, strict=True)
    if tag
  ]
  assert spans == [
    ('os', 'B-import'), ('.', 'I-import'), ('path', 'I-import'),
    ('sys', 'B-import'), ('a', 'B-import'), ('b', 'B-import'),
    ('.', 'I-import'), ('c', 'I-import'), ('d', 'B-import'),
    ('f', 'B-func'), ('x', 'B-param'), ('args', 'B-param'), ('y', 'B-param'),
    ('kw', 'B-param'), ('.', 'B-attr'), ('path', 'I-attr'), ('.', 'I-attr'),
    ('join', 'I-attr'), ('.', 'B-attr'), ('strip', 'I-attr'), ('.', 'B-attr'),
    ('z', 'I-attr'), ('Q', 'B-class'), ('w', 'B-param'),
  ]  # fmt: skip
  assert sentences[4].words == ("'...'",)  # of a string only that it is one


def test_only_a_new_line_ends_a_line():
  """A form feed, which many modules have, is no line for Python."""
  odd = '\f\x0b\x1c\x1d\x1e\x85\u2028\u2029'
  before = f'\f\n"""{odd}"""  # {odd}\nx = "{odd}"\n'
  tagged = list(stdlib_tags.python_sentences(CODE))
  assert list(stdlib_tags.python_sentences(before + CODE))[2:] == tagged


def test_passages_join_lines_and_cut_long_ones_between_spans():
  lines = [Tagged(('a', 'b'), (0, 1))] * 3
  joined = list(stdlib_tags.passages(lines, most=6))
  assert [p.words for p in joined] == [
    ('a', 'b', '\n', 'a', 'b'),
    ('a', 'b'),
  ]
  attr = stdlib_tags.TAGS.index('B-attr')
  long = Tagged(tuple('abcdefg'), (0, 0, attr, attr + 1, attr + 1, 0, 0))
  cut = list(stdlib_tags.passages([long], most=4))
  assert [''.join(p.words) for p in cut] == ['abcde', 'fg']


@pytest.mark.tier('default')
def test_the_library_is_tagged():
  data = sources.load(DataConfig(source='stdlib_tags'), sources.TAGGED)
  tags = np.concatenate([e.tags for e in data.examples.validation])
  counts = np.bincount(tags, minlength=len(stdlib_tags.TAGS))
  assert counts[0] > counts[1:].sum() / 2 > 0 and (counts[1::2] > 10).all()
