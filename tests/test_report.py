"""Tables, generated sections and the plot of a run."""

import json
import subprocess

import pytest

from psa_jax import report
from psa_jax.config import ConfigError


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


def test_plot_of_a_run(tmp_path):
  rows = [
    {
      'kind': 'train',
      'step': step,
      'stage': step // 3,
      'seq_len': 64 if step < 3 else 128,
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
  lines = [json.dumps(row) for row in rows]
  (tmp_path / 'metrics.jsonl').write_text('\n'.join(lines))
  (tmp_path / 'result.json').write_text('{"baselines": {"bigram": 3.4}}')
  target = tmp_path / 'run.svg'
  report.plot_run(tmp_path, target)
  assert target.read_text().count('<path') > 20


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
