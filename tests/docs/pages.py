"""The documentation as text: which pages there are, and what is in them."""

import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parents[2]
README = ROOT / 'README.md'
FOLDERS = ('docs', 'examples', 'experiments', 'psa_jax', 'tests')
PAGES = [
  README,
  *(page for name in FOLDERS for page in sorted((ROOT / name).rglob('*.md'))),
]
RECIPES = sorted((ROOT / 'configs').glob('*.py'))
# Python files that a user starts or copies: their text names commands.
STARTED = [
  ROOT / 'launch.py',
  *RECIPES,
  *sorted((ROOT / 'examples').rglob('*.py')),
  *sorted((ROOT / 'experiments').rglob('*.py')),
]
FENCED = re.compile(r'^```.*?\n(.*?)^```', re.DOTALL | re.MULTILINE)


def name_of(path: pathlib.Path) -> str:
  """A path below the root, as a test's name."""
  return str(path.relative_to(ROOT))


def prose(text: str) -> str:
  """A Markdown text without its fenced blocks."""
  return FENCED.sub('', text)


def code(text: str) -> list[str]:
  """Lines of fenced blocks, and inline code, of a Markdown text."""
  inline = re.findall(r'`([^`\n]+)`', prose(text))
  fenced = [
    line for block in FENCED.findall(text) for line in block.split('\n')
  ]
  return [line.strip() for line in fenced] + inline


def commands(pattern: str) -> list[tuple[str, str]]:
  """(file, command) of every line that matches; two spaces end a command."""
  matches = set()
  for path in [*PAGES, *STARTED]:
    text = path.read_text()
    lines = code(text) if path.suffix == '.md' else text.split('\n')
    for line in lines:
      if match := re.search(pattern, line):
        matches.add((name_of(path), match[1].split('  ')[0].strip()))
  return sorted(matches)


def anchors(text: str) -> set[str]:
  """What GitHub calls the headings of a Markdown text."""
  slugs, counts = set(), {}
  for heading in re.findall(r'^#+ +(.*?) *$', prose(text), re.MULTILINE):
    words = re.sub(r'\[([^\]]*)\]\([^)]*\)', r'\1', heading).lower()
    slug = re.sub(r'[^\w\- ]', '', words).replace(' ', '-')
    number = counts.get(slug, 0)
    counts[slug] = number + 1
    slugs.add(f'{slug}-{number}' if number else slug)
  return slugs
