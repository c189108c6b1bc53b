"""`stdlib_tags`: words of Python programs with what each of them is.

The modules of Python's standard library that are one file. The words are
Python's own tokens, a sentence is a few logical lines, and what a word is comes
from the syntax tree, so the tags (IOB2) are exact: `func`, `class` and `param`
are names where they are defined, `import` is the dotted name of a module,
`attr` the dots and names behind an object (`.path.join` in `os.path.join`). A
module is in one split as a whole. Comments are left out.
"""

import ast
import hashlib
import io
import platform
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path

from psa_jax.config import DataConfig
from psa_jax.data.examples.tagged import (
  OUTSIDE,
  Tagged,
  TaggedSet,
  from_sentences,
)
from psa_jax.data.sources import stdlib
from psa_jax.data.sources.registry import TAGGED, Source, register

KINDS = ('func', 'class', 'param', 'import', 'attr')
TAGS = (OUTSIDE, *(f'{p}-{kind}' for kind in KINDS for p in 'BI'))
NEW_LINE = '\n'
_PASSAGE = 48  # words, about
# What has no text of its own, or none that matters.
_SILENT = {
  tokenize.COMMENT,
  tokenize.NL,
  tokenize.NEWLINE,
  tokenize.INDENT,
  tokenize.DEDENT,
  tokenize.ENCODING,
  tokenize.ENDMARKER,
}


def load(config: DataConfig) -> TaggedSet:
  """Every one-file module of the standard library."""
  del config
  digest, sentences = hashlib.sha256(), []
  modules = stdlib.find()
  paths = [path for name, path in modules if '/' not in name]
  for number, path in enumerate(paths):
    source = _read(path)
    digest.update(source.encode())
    joined = passages(python_sentences(source), most=_PASSAGE)
    sentences += [(number, passage) for passage in joined]
  manifest = {
    'source': 'stdlib_tags',
    'package': 'python',
    'version': platform.python_version(),
    'license': 'PSF-2.0',
    'sha256': digest.hexdigest(),
  }
  return from_sentences(sentences, TAGS, manifest)


def _read(path: Path) -> str:
  with tokenize.open(path) as f:
    return f.read()


def python_sentences(source: str) -> Iterator[Tagged]:
  """The logical lines of a program as words with tags.

  Args:
    source: a program that parses.
  """
  tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
  marks = _marks(ast.parse(source), source, tokens)
  words: list[str] = []
  tags: list[int] = []
  before = None
  for token in tokens:
    if token.type == tokenize.NEWLINE and words:
      yield Tagged(tuple(words), tuple(tags))
      words, tags, before = [], [], None
    if token.type in _SILENT or not token.string.strip():
      continue
    span = marks.get(token.start)
    prefix = 'I' if span == before else 'B'
    tags.append(TAGS.index(f'{prefix}-{span[0]}') if span else 0)
    before = span
    # Of a string only that it is one: the rest is prose.
    words.append("'...'" if token.type == tokenize.STRING else token.string)
  if words:
    yield Tagged(tuple(words), tuple(tags))


def passages(lines: Iterable[Tagged], *, most: int) -> Iterator[Tagged]:
  """Joins lines, with a line's end as a word between them, up to `most` words.

  A line that is longer is cut, between spans.
  """
  words: list[str] = []
  tags: list[int] = []
  for line in lines:
    if words and len(words) + len(line.words) >= most:
      yield Tagged(tuple(words), tuple(tags))
      words, tags = [], []
    if words:
      words.append(NEW_LINE)
      tags.append(0)
    for word, tag in zip(*line, strict=True):
      if len(words) >= most and not TAGS[tag].startswith('I'):
        yield Tagged(tuple(words), tuple(tags))
        words, tags = [], []
      words.append(word)
      tags.append(tag)
  if words:
    yield Tagged(tuple(words), tuple(tags))


def _marks(tree: ast.AST, source: str, tokens) -> dict[tuple[int, int], tuple]:
  """(line, column) of a token -> (kind, number of its span)."""
  at = {token.start: i for i, token in enumerate(tokens)}
  lines = source.split('\n')  # as Python counts them
  names: dict[tuple[int, int], tuple] = {}

  def place(line, column) -> int | None:
    """The token there; `ast` counts columns in UTF-8 bytes."""
    text = lines[line - 1].encode()[:column].decode(errors='ignore')
    return at.get((line, len(text)))

  def mark(kind: str, first: int | None, count: int, number: int) -> None:
    if first is not None:
      for token in tokens[first : first + count]:
        names.setdefault(token.start, (kind, number))

  def after(first: int | None, *skipped: str) -> int | None:
    """The first token from there on that is none of `skipped`."""
    while first is not None and tokens[first].string in skipped:
      first += 1
    return first

  for number, node in enumerate(ast.walk(tree)):
    match node:
      case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
        kind = 'class' if isinstance(node, ast.ClassDef) else 'func'
        first = place(node.lineno, node.col_offset)
        mark(kind, after(first, 'async', 'def', 'class'), 1, number)
      case ast.arg():
        mark('param', place(node.lineno, node.col_offset), 1, number)
      case ast.alias():
        first = place(node.lineno, node.col_offset)
        mark('import', first, 2 * node.name.count('.') + 1, number)
      case ast.ImportFrom(module=str(module)):
        first = place(node.lineno, node.col_offset)
        first = after(first, 'from', '.', '...')
        mark('import', first, 2 * module.count('.') + 1, number)
      case ast.Attribute():
        # Walked from the outside in, so the longest chain marks its tokens.
        base, depth = node.value, 1
        while isinstance(base, ast.Attribute):
          base, depth = base.value, depth + 1
        first = place(base.end_lineno, base.end_col_offset)
        mark('attr', first, 2 * depth, number)
  return names


register(Source('stdlib_tags', yields={TAGGED: load}))
