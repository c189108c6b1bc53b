"""The command line that every experiment has."""

import dataclasses
import json
import re

import pytest

from experiments import __main__ as every
from experiments.bench import cli, experiment, rows, settings
from experiments.bench.experiment import Experiment
from experiments.bench.settings import GridSettings, Settings, option

pytestmark = pytest.mark.tier('default')


@dataclasses.dataclass(frozen=True)
class Plain(Settings):
  """For a test."""

  sizes: tuple[int, ...] = option((1, 2), 'Sizes.', least=1)
  what: tuple[str, ...] = option(('a',), 'What.', choices=('a', 'b'))
  share: float = option(0.5, 'A share.')


@pytest.fixture
def made(tmp_path, monkeypatch):
  """An experiment of one page in a project of its own."""
  monkeypatch.setattr(experiment, 'ROOT', tmp_path)
  monkeypatch.setattr(cli, 'ROOT', tmp_path)
  folder = tmp_path / 'experiments' / 'made'
  folder.mkdir(parents=True)
  (folder / 'README.md').write_text('<!-- x -->\nold\n<!-- /x -->\n')

  def run(settings, book):
    for size in settings.sizes:
      book.add({'size': size, 'settings': settings.what})
      if size == 13:
        raise KeyboardInterrupt

  return Experiment(
    name='made',
    about='for a test',
    settings=Plain(),
    quick=Plain(sizes=(7,)),
    run=run,
    sections=lambda found: {'x': ' '.join(str(row['size']) for row in found)},
    key=('size',),
    child=lambda settings, words: [words, settings.share],
  )


def page(made):
  return (made.folder / 'README.md').read_text().split('\n')[1]


def write(root, row):
  rows.append(root.results, {'commit': 'abc', **row})


def test_a_run_is_recorded_and_shown(made, capsys):
  write(made, {'size': 5})
  assert cli.main(made, ['--set', 'sizes=3,4', '--set', 'commit=mine']) == 0
  assert page(made) == '5 3 4'
  found = rows.read(made.results)
  assert [row['commit'] for row in found] == ['abc', 'mine', 'mine']
  assert 'x\n\n5 3 4' in capsys.readouterr().out


def test_what_was_measured_before_a_break_is_shown(made):
  assert cli.main(made, ['--set', 'sizes=3,13,4']) == 130
  assert page(made) == '3 13'


def test_quick_records_nothing(made, capsys):
  write(made, {'size': 5})
  before = made.results.read_bytes()
  assert cli.main(made, ['--quick', '--set', 'what=b']) == 0
  assert made.results.read_bytes() == before and page(made) == 'old'
  assert 'x\n\n7' in capsys.readouterr().out


def test_rows_may_go_elsewhere_and_the_page_stays(made):
  assert cli.main(made, ['--set', 'results=other.jsonl']) == 0
  assert page(made) == 'old' and not made.results.exists()
  assert len(rows.read(experiment.ROOT / 'other.jsonl')) == 2


def test_regenerating_runs_nothing(made, monkeypatch):
  monkeypatch.setattr(Experiment, 'book', lambda *args: pytest.fail('ran'))
  write(made, {'size': 5})
  write(made, {'size': 6})
  before = made.results.read_bytes()
  assert cli.main(made, ['--regenerate']) == 0
  assert page(made) == '5 6' and made.results.read_bytes() == before


def test_a_child_answers_with_a_line(made, capsys):
  command = cli.child_command('made', Plain(share=0.25), 'a,b')
  assert command[:2] == ['-m', 'experiments.made']
  assert cli.main(made, command[2:]) == 0
  assert json.loads(capsys.readouterr().out) == ['a,b', 0.25]


def ended(made, argv, capsys):
  """Exit code and what is said of a mistake."""
  try:
    code = cli.main(made, argv)
  except SystemExit as error:
    code = error.code
  return code, capsys.readouterr().err


@pytest.mark.parametrize(
  ('argv', 'words'),
  [
    (['--bogus'], '--bogus'),
    (['extra'], 'extra'),
    (['--quick', '--regenerate'], 'not allowed with'),
    (['--regenerat'], '--regenerat'),
    (['--set'], 'expected one argument'),
    (['--set', 'sizes'], 'it takes KEY=VALUE'),
    (['--set', 'nope=1'], 'there is no nope; there are results'),
    (['--set', 'a.b=1'], 'there is no a.b'),
    (['--set', 'sizes=two'], '--set sizes=two: it takes int'),
    (['--set', 'sizes=2,0'], '--set sizes=0: at least 1'),
    (['--set', 'share=much'], 'it takes float'),
    (['--set', 'resume=1'], 'it takes true or false'),
    (['--set', 'what=a,c'], '--set what=c: choose of a, b'),
    (['--regenerate', '--set', 'sizes=1'], '--regenerate takes no --set'),
  ],
)
def test_a_mistake_is_one_line(made, argv, words, capsys):
  code, said = ended(made, argv, capsys)
  assert code == 2
  assert said.count('\n') == 1
  assert said.startswith('error: ') and words in said
  assert not made.results.exists()


@pytest.mark.parametrize(
  ('argv', 'words'),
  [
    (['--set', 'train.stepz=3'], 'did you mean config.train.steps'),
    (['--set', 'train.steps=3'], 'add --set results=FILE'),
    (['--set', 'train=3'], 'there is no train'),
  ],
)
def test_keys_of_recipes_are_known(made, argv, words, capsys):
  grid = dataclasses.replace(made, settings=GridSettings())
  code, said = ended(grid, argv, capsys)
  assert (code, said.count('\n')) == (2, 1)
  assert words in said


@pytest.mark.parametrize(
  'made_of',
  [
    Plain(),
    Plain(sizes=(), what=('a', 'b'), share=0.25, resume=True),
    GridSettings(seeds=1, changes=(('train.steps', '2,2'), ('seed', '4'))),
  ],
)
def test_settings_are_flags_and_back(made_of):
  flags = settings.words(made_of)
  words = [flag.partition('=')[2] for flag in flags]
  assert settings.apply(type(made_of)(), words) == made_of


@pytest.mark.parametrize('name', experiment.NAMES)
def test_every_experiment_says_what_it_takes(name, capsys):
  one = experiment.find(name)
  assert one.name == name
  assert type(one.quick) is type(one.settings) and one.quick != one.settings
  with pytest.raises(SystemExit) as ended:
    cli.main(one, ['--help'])
  assert ended.value.code == 0
  text = capsys.readouterr().out
  for key in settings.known(one.settings):
    assert f'\n  {key}=' in text


def test_every_folder_with_a_command_is_listed():
  folder = rows.ROOT / 'experiments'
  found = {path.parent.name for path in folder.glob('*/__main__.py')}
  assert found == set(experiment.NAMES)
  index = (folder / 'README.md').read_text()
  for name in experiment.NAMES:
    assert f'[`{name}`]({name}/README.md)' in index


def test_the_whole_folder_takes_one_flag(capsys):
  assert every.main(['--regenerate', '--quick']) == 2
  assert capsys.readouterr().err.count('\n') == 1
  assert every.main([]) == 0
  assert capsys.readouterr().out.count('\n') == len(experiment.NAMES)


def commands():
  """(file, name, words) of `python -m experiments.NAME`, pages and code."""
  folder = rows.ROOT / 'experiments'
  for path in sorted([*folder.rglob('*.md'), *folder.rglob('*.py')]):
    pattern = r'python -m experiments\.(\w+)(?!\.)\b([^\n`]*)'
    for name, words in re.findall(pattern, path.read_text()):
      if name != 'NAME' and path.name != 'LOG.md':
        words = re.split(r' {2,}|#|,', words)[0]
        yield str(path.relative_to(folder)), name, words.split()


@pytest.mark.parametrize(('file', 'name', 'words'), [*commands()])
def test_commands_on_pages_are_understood(file, name, words):
  one = experiment.find(name)
  flags = cli.parser(one).parse_args(words)
  settings.apply(one.settings, flags.set)
