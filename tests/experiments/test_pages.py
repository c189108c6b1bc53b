"""Every page is what its recorded rows give; `make tables` changes nothing."""

import pathlib
import shutil

import pytest

from experiments.bench import experiment, plots
from experiments.bench.rows import ROOT

pytestmark = pytest.mark.tier('default')


@pytest.mark.parametrize('name', experiment.NAMES)
def test_regenerating_a_page_changes_nothing(name, tmp_path):
  one = experiment.find(name)
  own = f'experiments/{name}'
  pages = one.pages or (f'{own}/README.md',)
  pictures = [f'{own}/{file}' for file in one.pictures]
  for path in (*pages, *pictures):
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(ROOT / path, tmp_path / path)
  one.write_pages(tmp_path)
  for path in (*pages, *pictures):
    assert (tmp_path / path).read_bytes() == (ROOT / path).read_bytes(), path


@pytest.mark.parametrize('name', experiment.NAMES)
def test_a_page_has_a_place_for_every_table_and_picture(name):
  one = experiment.find(name)
  texts = one.sections(one.recorded())
  assert texts
  for page in one.pages or (f'experiments/{name}/README.md',):
    text = (ROOT / page).read_text()
    for marker, part in texts.items():
      assert f'<!-- {marker} -->\n{part}\n<!-- /{marker} -->' in text
    for file in one.pictures:
      assert f']({file})' in text


def drawn(rows):
  figure, [axis] = plots.panels(1, (2, 2))
  names = {row['contender']: {'label': row['contender']} for row in rows}
  plots.over_length(axis, rows, names)
  return figure


def test_a_picture_is_drawn_anew_only_where_its_rows_changed(tmp_path):
  path = tmp_path / 'a.png'
  rows = [{'contender': 'a', 'length': n, 'median': n} for n in (1, 2)]
  plots.write(drawn, rows, path)
  assert plots.digest_of(path) == plots.digest(drawn, rows)
  stamp = path.stat().st_mtime_ns
  plots.write(drawn, rows, path)
  assert path.stat().st_mtime_ns == stamp
  plots.write(drawn, rows[:1], path)
  assert plots.digest_of(path) == plots.digest(drawn, rows[:1])
  assert plots.digest_of(pathlib.Path(tmp_path / 'b.png')) is None
