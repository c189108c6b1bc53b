"""Tables, generated sections and the plot of a run."""

import json
import subprocess

import pytest
from matplotlib import pyplot as plt

from psa_jax import report
from psa_jax.config import ConfigError, json_text
from psa_jax.train import metrics


def test_markdown():
  assert report.markdown([('a', 'b'), ('1', '2')]) == (
    '| a | b |\n| --- | --- |\n| 1 | 2 |'
  )


def test_a_section_is_replaced_and_the_rest_kept(tmp_path):
  page = tmp_path / 'README.md'
  page.write_text('top\n<!-- x -->\nold\n<!-- /x -->\nend\n')
  report.replace_section(page, 'x', 'new')
  report.replace_section(page, 'x', 'newer')
  assert page.read_text() == 'top\n<!-- x -->\nnewer\n<!-- /x -->\nend\n'
  with pytest.raises(ConfigError, match='<!-- y -->'):
    report.replace_section(page, 'y', 'new')


@pytest.fixture
def run(tmp_path):
  """The folder of a run whose quality is its bits per byte."""
  rows = [
    {
      'kind': 'train',
      'step': step,
      'stage': step // 3,
      'seq_len': 64 if step < 3 else 128,
      'accuracy': 0.5,
      'bits_per_byte': 8 / step,
      'seconds_per_step': 0.1,
      'density': 1 / step,
      'gamma': 0.5,
    }
    for step in range(1, 6)
  ]
  rows.append(
    {'kind': 'final', 'step': 5, 'mechanism': 'psa', 'bits_per_byte': 2.0}
  )
  file = metrics.MetricsFile(tmp_path / metrics.METRICS, step=0)
  for row in rows:
    file.write(row)
  file.close()
  result = {'quality': 'bits_per_byte', 'baselines': {'bigram': 3.4}}
  write_result(tmp_path, result)
  return tmp_path


def write_result(folder, result):
  text = json.dumps(json_text.sealed(result))
  (folder / 'result.json').write_text(text)


def test_plot_of_a_run(run):
  target = run / 'run.svg'
  report.plot_run(run, target)
  assert target.read_text().count('<path') > 20


def drawn(run, monkeypatch):
  """The axes of the picture of a run."""
  figures = []
  monkeypatch.setattr(plt, 'close', figures.append)
  report.plot_run(run, run / 'run.svg')
  monkeypatch.undo()
  plt.close(figures[0])
  return figures[0].axes


def test_baselines_are_of_the_quality_and_nothing_hides_them(run, monkeypatch):
  axis = drawn(run, monkeypatch)[0]
  assert axis.get_ylabel() == 'bits per byte'
  labels = [line.get_label() for line in axis.lines]
  assert 'bigram: 3.400' in labels and 'validation, psa: 2.000' in labels
  legend = axis.get_legend().get_window_extent()
  assert legend.x0 >= axis.get_window_extent().x1  # beside the axes
  write_result(run, {'quality': 'macro_f1', 'baselines': {'majority': 0.3}})
  axis = drawn(run, monkeypatch)[0]
  assert axis.get_ylabel() == 'accuracy'
  assert not any('majority' in line.get_label() for line in axis.lines)


def test_what_cannot_be_drawn_is_named(run):
  for name, text in (
    ('run.nosuch', 'is not supported'),
    ('a/b.png', 'No such'),
  ):
    with pytest.raises(ConfigError, match=text):
      report.plot_run(run, run / name)
  (run / 'result.json').write_text('{"quality": "loss", "baselines": {}}')
  with pytest.raises(ConfigError, match='cannot read .*result.json'):
    report.plot_run(run, run / 'run.svg')
  (run / 'metrics.jsonl').write_text('')
  with pytest.raises(ConfigError, match='has no row of a step yet'):
    report.plot_run(run, run / 'run.svg')


def test_a_folder_without_a_run_is_named(tmp_path):
  with pytest.raises(ConfigError, match='give the work directory of a run'):
    report.plot_run(tmp_path, tmp_path / 'run.png')


def test_provenance_marks_what_differs_from_the_commit(tmp_path):
  def git(*words):
    name = ['-c', 'user.name=a', '-c', 'user.email=a@b.c']
    subprocess.run(['git', *name, *words], cwd=tmp_path, check=True)

  assert report.provenance(tmp_path)['commit'] == 'unknown'
  (tmp_path / 'code').mkdir()
  (tmp_path / 'code/a.py').write_text('1')
  git('init', '-q')
  git('add', '.')
  git('commit', '-qm', 'one')
  clean = report.provenance(tmp_path, ['code'])
  assert not clean['commit'].endswith('+') and 'cores' in clean['machine']
  (tmp_path / 'other.txt').write_text('not code')
  assert report.provenance(tmp_path, ['code']) == clean
  (tmp_path / 'code/a.py').write_text('2')
  changed = report.provenance(tmp_path, ['code'])
  assert changed['commit'] == clean['commit'] + '+'
