"""Pages are of one style, and everything that they name exists.

Links, anchors and paths of every page; the pages and anchors that code names;
the folders of docs/tree.md; the keys and defaults of docs/mechanisms.md.
"""

import dataclasses
import functools
import re

import pytest

from psa_jax.attention import registry
from psa_jax.config import AttentionConfig, Config, ScheduleConfig
from tests.docs.pages import PAGES, ROOT, anchors, name_of, prose

MECHANISMS = (ROOT / 'docs' / 'mechanisms.md').read_text()
TREE = (ROOT / 'docs' / 'tree.md').read_text()
TOP = {path.name for path in ROOT.iterdir()} - {'runs'}
SOURCES = [
  ROOT / 'launch.py',
  ROOT / 'Makefile',
  ROOT / 'pyproject.toml',
  *(
    path
    for folder in ('configs', 'examples', 'experiments', 'psa_jax', 'tests')
    for path in sorted((ROOT / folder).rglob('*.py'))
  ),
]
# Pages that are written by hand but for parts between markers.
WRITTEN = [page for page in PAGES if 'experiments' not in page.parts]
GENERATED = re.compile(r'<!-- (\w+) -->.*<!-- /\1 -->', re.DOTALL)
WIDTH = 90  # of a line of prose

every_page = pytest.mark.parametrize('page', PAGES, ids=name_of)


def is_path(word):
  """Whether a word of code is meant as a path of this repository."""
  if not re.fullmatch(r'[\w.][\w./-]*', word):
    return False
  first = word.split('/')[0]
  return ('/' in word and first in TOP) or word.endswith(
    ('.py', '.md', '.toml', '.txt')
  )


@every_page
def test_paths_exist(page):
  words = re.findall(r'`([^`\n]+)`', prose(page.read_text()))
  for word in (word.partition(':')[0] for word in words):
    if is_path(word):
      assert (ROOT / word).exists() or (page.parent / word).exists(), word


@every_page
def test_links_and_anchors_exist(page):
  links = re.findall(r'\]\((?!https?:)([^)\s]+)\)', prose(page.read_text()))
  for link in links:
    name, _, anchor = link.partition('#')
    target = page.parent / name if name else page
    assert target.exists(), link
    if anchor:
      assert anchor in anchors(target.read_text()), link


def test_pages_named_in_code_exist():
  """A page, perhaps with an anchor, in a docstring or an error exists."""
  missing = []
  for source in SOURCES:
    text = source.read_text()
    for name, anchor in re.findall(r'\b(docs/[\w/]+\.md)(?:#([\w-]+))?', text):
      page = ROOT / name
      known = anchors(page.read_text()) if page.is_file() else set()
      if not page.is_file() or (anchor and anchor not in known):
        missing.append(f'{name_of(source)}: {name}#{anchor}')
  assert missing == []


@pytest.mark.parametrize('page', WRITTEN, ids=name_of)
def test_page_has_the_style_of_all(page):
  """One title, then what the page is about; unique headings; short lines."""
  text = GENERATED.sub('', page.read_text())
  body = prose(text)
  assert re.match(r'# \S.*\n\n[^#|`\s-]', text), 'a title, then a paragraph'
  assert len(re.findall(r'^# ', body, re.MULTILINE)) == 1
  headings = re.findall(r'^#+ +(.*)', body, re.MULTILINE)
  assert len(headings) == len(set(headings)), headings
  assert len(anchors(text)) == len(headings)
  long = [
    line
    for line in body.split('\n')
    if len(line) > WIDTH and not line.startswith('|')
  ]
  assert long == []


def tree():
  """Paths of docs/tree.md: two spaces of indent a folder."""
  block = re.search(r'^```\n(.*?)^```', TREE, re.DOTALL | re.MULTILINE)
  assert block is not None
  parents, paths = [], []
  for line in block[1].rstrip('\n').split('\n'):
    match = re.fullmatch(r'( *)(\S+) +(\S.*)', line)
    assert match, f'{line!r} is not: indent, name, description'
    parents = [*parents[: len(match[1]) // 2], match[2].rstrip('/')]
    paths.append('/'.join(parents))
  return paths


def test_tree_names_what_exists():
  assert [path for path in tree() if not (ROOT / path).exists()] == []


def test_tree_names_every_folder_once():
  folders = {
    parent
    for top in ('.ci', 'configs', 'docs', 'examples', 'experiments', 'psa_jax')
    for path in [*(ROOT / top).rglob('*'), *(ROOT / 'tests').rglob('*.py')]
    if path.is_file() and '__pycache__' not in path.parts
    for parent in path.relative_to(ROOT).parents
  }
  names = tree()
  assert {str(folder) for folder in folders} - {'.', *names} == set()
  assert len(names) == len(set(names))


def tables():
  """Path of a section of the configuration -> {key: default} on the page."""
  pattern = (
    r'^Keys of [^`\n]*`([\w.]+)`.*\n\n'
    r'\| key .*\n\|[-|]+\n((?:\|.*\n)+)'
  )
  sections = {}
  for path, rows in re.findall(pattern, MECHANISMS, re.MULTILINE):
    cells = [row.split('|')[1:3] for row in rows.strip().split('\n')]
    sections[path] = {key.strip(' `'): text.strip() for key, text in cells}
  return sections


def shown(value):
  """A default as the page writes it."""
  if not isinstance(value, ScheduleConfig):
    return str(value).replace(' ', '')
  if value.kind == 'constant':
    return f'constant {value.init:g}'
  return f'{value.kind} {value.init:g} to {value.final:g}'


@pytest.mark.parametrize('path', tables())
def test_keys_and_defaults_of_mechanisms(path):
  section = functools.reduce(getattr, path.split('.'), Config())
  assert tables()[path] == {
    field.name: shown(getattr(section, field.name))
    for field in dataclasses.fields(section)
  }


def test_every_section_of_attention_has_a_table():
  attention = AttentionConfig('dense')
  sections = {
    f'model.attention.{field.name}'
    for field in dataclasses.fields(attention)
    if dataclasses.is_dataclass(getattr(attention, field.name))
  }
  others = {'model.norm', 'model.quant', 'train.controller'}
  assert sections - {'model.attention.dense'} | others <= set(tables())


def test_every_mechanism_has_a_heading():
  assert set(registry.names()) <= anchors(MECHANISMS)
