"""What an experiment is: one spec, from which its command and page follow."""

import dataclasses
import importlib
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from experiments.bench import plots, rows
from experiments.bench.rows import ROOT, Book, Row
from experiments.bench.settings import Settings
from psa_jax import report

# Every folder with a command, in the order of `experiments/README.md`.
NAMES = (
  'speed_64k',
  'speed_gpu',
  'mechanisms',
  'slab',
  'text_tasks',
  'hybrid',
  'topk',
  'nsa',
  'softmax',
  'aot',
)


@dataclasses.dataclass(frozen=True)
class Experiment:
  """One folder of `experiments/`.

  Attributes:
    name: of the folder.
    about: what the command does, for `--help`.
    settings: what it runs with, changed by `--set`.
    quick: what `--quick` runs with; a minute or so.
    run: measures, and adds rows to the book.
    sections: rows -> {marker in the page: text}.
    key: fields that name what a row is about.
    one_commit: see `rows.newest`.
    newest: of all rows those that the page shows; None for `rows.newest`.
    pictures: file -> what draws it.
    child: answers for a process that the run starts: takes the settings and
      the words after `--child=`, returns what is printed as JSON.
    load: what is recorded; None reads `results.jsonl`.
    pages: that show the sections, below the root.
  """

  name: str
  about: str
  settings: Settings
  quick: Settings
  run: Callable[[Any, Book], int | None]
  sections: Callable[[Any], dict[str, str]]
  key: Sequence[str] = ()
  one_commit: bool = False
  newest: Callable[[Sequence[Row]], list[Row]] | None = None
  pictures: Mapping[str, plots.Draw] = dataclasses.field(default_factory=dict)
  child: Callable[[Any, str], Any] | None = None
  load: Callable[[], Any] | None = None
  pages: Sequence[str] = ()

  @property
  def folder(self) -> pathlib.Path:
    """Where the experiment lives."""
    return ROOT / 'experiments' / self.name

  @property
  def results(self) -> pathlib.Path:
    """Its recorded rows."""
    return self.folder / 'results.jsonl'

  def shown(self, found: Sequence[Row]) -> list[Row]:
    """Of all rows those that the page shows."""
    if self.newest is not None:
      return self.newest(found)
    return rows.newest(found, self.key, one_commit=self.one_commit)

  def recorded(self) -> Any:
    """What the page is made from."""
    if self.load is not None:
      return self.load()
    return self.shown(rows.read(self.results))

  def book(self, settings: Settings, path: pathlib.Path | None) -> Book:
    """The book of a run; None writes nothing."""
    own = f':(glob)experiments/{self.name}/*.py'
    sources = ['psa_jax', 'configs', ':(glob)experiments/bench/*.py', own]
    stamp = report.provenance(ROOT, sources)
    if settings.commit:
      stamp['commit'] = settings.commit
    return Book(path, self.key, stamp, resume=settings.resume)

  def write_pages(self, root: pathlib.Path | None = None) -> None:
    """Renews tables and pictures from what is recorded; runs nothing.

    Args:
      root: of the pages, the project's where there is none; the recorded rows
        are those of the project.
    """
    root = ROOT if root is None else root
    recorded = self.recorded()
    own = f'experiments/{self.name}'
    for page in self.pages or (f'{own}/README.md',):
      for name, text in self.sections(recorded).items():
        report.replace_section(root / page, name, text)
    for file, draw in self.pictures.items():
      plots.write(draw, recorded, root / own / file)


def find(name: str) -> Experiment:
  """The experiment of a folder."""
  return importlib.import_module(f'experiments.{name}.__main__').EXPERIMENT
