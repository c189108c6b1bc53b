"""The set-up of the Makefile, with a stand-in for the Python interpreter.

The stand-in is a shell script: `-m venv` copies it into the environment, and
what it is asked to do is written to a log, so that no test needs a network.
"""

import os
import pathlib
import shutil
import signal
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
STAND_IN = f"""#!/bin/sh
case "$*" in
  "-c "*) exec {sys.executable} "$@" ;;
  "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  "-m pip --version") ;;
  "-m pip install"*)
    echo "pip $*" >> log
    [ -z "$PIP_KILLED" ] || kill -9 $$
    [ -z "$PIP_FAILS" ] || exit 1 ;;
  *) echo "$*" >> log; exit "${{CODE:-0}}" ;;
esac
"""


@pytest.fixture
def project(tmp_path):
  """A folder with the Makefile, its requirements and the stand-in."""
  for path in [ROOT / 'Makefile', *ROOT.glob('requirements*.txt')]:
    shutil.copy(path, tmp_path)
  (tmp_path / 'python').write_text(STAND_IN)
  (tmp_path / 'python').chmod(0o755)
  return tmp_path


def environment():
  """This process's, less what `make test` has put there."""
  return {k: v for k, v in os.environ.items() if 'MAKE' not in k}


def make(project, *words, **env):
  """Runs make; returns (exit code, errors, what the stand-in logged)."""
  done = subprocess.run(
    ['make', f'PYTHON={project}/python', *words],
    cwd=project,
    env=environment() | env,
    capture_output=True,
    text=True,
    timeout=60,
  )
  log = project / 'log'
  lines = log.read_text().splitlines() if log.exists() else []
  log.unlink(missing_ok=True)
  return done.returncode, done.stderr, lines


def installs(lines):
  return [line.split()[-1] for line in lines if line.startswith('pip ')]


def stamps(project, folder='.venv'):
  return list((project / folder).glob('installed-*'))


def test_train_installs_once_then_only_launches(project):
  code, _, log = make(project, 'train')
  assert code == 0
  assert installs(log) == ['requirements.txt']
  # No package but these runs code of its own to be installed.
  only = '--only-binary=:all: --no-binary=promise,seqeval -r requirements.txt'
  assert log[0].endswith(only)
  launch = 'launch.py --config=configs/lm_64k.py'
  assert log[-1] == launch
  assert make(project, 'train') == (0, '', [launch])


def test_train_hands_on_recipe_work_directory_and_flags(project):
  _, _, log = make(
    project,
    'train',
    'CONFIG=configs/lm_64k.py:quick',
    'WORKDIR=runs/try',
    "ARGS=--config.seed=1 --config.data.source='files:/a b/*.txt'",
  )
  assert log[-1] == (
    'launch.py --config=configs/lm_64k.py:quick --workdir=runs/try '
    '--config.seed=1 --config.data.source=files:/a b/*.txt'
  )


def test_test_and_train_share_an_environment(project):
  _, _, log = make(project, 'test')
  assert installs(log) == ['requirements-dev.txt']
  assert log[-1].startswith('-m pytest')
  assert installs(make(project, 'train')[2]) == []
  assert installs(make(project, 'test')[2]) == []


@pytest.mark.parametrize(
  'target, tier', [('test-quick', 'quick'), ('test-all', 'all')]
)
def test_a_tier_has_a_target(project, target, tier):
  _, _, log = make(project, target, 'ARGS=-x')
  assert log[-1].startswith('-m pytest')
  assert log[-1].endswith(f' --tier={tier} -x')


def test_aot_has_an_environment_of_its_own(project):
  code, _, log = make(project, 'aot', 'ARGS=--set update=true')
  assert code == 0
  assert installs(log) == ['requirements-aot.txt']
  run = '-m experiments.aot --set update=true'
  assert log[-1] == run
  assert len(stamps(project, '.venv-aot')) == 1 and not stamps(project)
  assert make(project, 'aot', 'ARGS=--set update=true') == (0, '', [run])
  assert installs(make(project, 'test')[2]) == ['requirements-dev.txt']
  assert installs(make(project, 'aot')[2]) == []
  with (project / 'requirements.txt').open('a') as file:
    file.write('another==1.0\n')
  assert installs(make(project, 'aot')[2]) == ['requirements-aot.txt']
  assert len(stamps(project, '.venv-aot')) == 1


@pytest.mark.parametrize('target', ['aot', 'audit'])
def test_what_is_found_fails_make(project, target):
  assert make(project, target, CODE='1')[0] == 2


def test_variables_of_the_environment_do_not_count(project):
  others = {'CONFIG': 'release', 'WORKDIR': '/elsewhere', 'ARGS': '-x'}
  _, _, log = make(project, 'train', **others)
  assert log[-1] == 'launch.py --config=configs/lm_64k.py'


@pytest.mark.parametrize('name', ['requirements.txt', 'requirements-dev.txt'])
def test_a_changed_requirement_is_installed(project, name):
  make(project, 'test')
  first = (project / name).read_text()
  (project / name).write_text(first + 'another==1.0\n')
  assert installs(make(project, 'test')[2]) == ['requirements-dev.txt']
  # Back again: the stamp of the first set-up must not have survived.
  (project / name).write_text(first)
  assert installs(make(project, 'test')[2]) == ['requirements-dev.txt']


def test_a_touched_requirement_is_not_installed(project):
  make(project, 'train')
  os.utime(project / 'requirements.txt')
  assert installs(make(project, 'train')[2]) == []


def test_a_killed_install_is_made_anew(project):
  code, _, _ = make(project, 'train', PIP_KILLED='1')
  assert code != 0
  assert not stamps(project)
  (project / '.venv' / 'half_copied').touch()
  assert make(project, 'train')[0] == 0
  assert not (project / '.venv' / 'half_copied').exists()
  assert stamps(project)


def test_a_failed_install_keeps_the_environment(project):
  make(project, 'train')
  (project / '.venv' / 'kept').touch()
  code, _, log = make(project, 'test', PIP_FAILS='1')
  assert code != 0
  assert installs(log) == ['requirements-dev.txt']
  assert installs(make(project, 'train')[2]) == []
  assert installs(make(project, 'test')[2]) == ['requirements-dev.txt']
  assert (project / '.venv' / 'kept').exists()


def test_launch_fails_make(project):
  assert make(project, 'train', CODE='2')[0] == 2


@pytest.mark.parametrize('version', ['3.10', '3.14'])
def test_an_unsupported_python_is_refused_in_one_line(project, version):
  body = 'import sys\nsys.version_info = ({}, {})\n'.format(*version.split('.'))
  (project / 'old.py').write_text(body + 'exec(sys.argv[2])\n')
  (project / 'python').write_text(
    f'#!/bin/sh\nexec {sys.executable} {project}/old.py "$@"\n'
  )
  code, errors, _ = make(project, 'train')
  assert code != 0
  first, *rest = errors.splitlines()
  assert first.startswith('psa_jax needs Python 3.11, 3.12 or 3.13')
  assert f'is {version};' in first
  assert all(line.startswith('make: ') for line in rest)
  assert not (project / '.venv').exists()


def test_a_missing_python_is_named(project):
  (project / 'python').unlink()
  code, errors, _ = make(project, 'test')
  assert code != 0
  assert errors.startswith(f'{project}/python was not found;')
  assert not (project / '.venv').exists()


def test_sigterm_reaches_the_run(project):
  """A run that saves on SIGTERM must get it when make is what was told."""
  make(project, 'train')
  (project / '.venv/bin/python').write_text(
    '#!/bin/sh\ntrap "echo saved > saved; exit 0" TERM\n'
    'echo ready\nwhile :; do sleep 0.05; done\n'
  )
  running = subprocess.Popen(
    ['make', 'train'],
    cwd=project,
    env=environment(),
    stdout=subprocess.PIPE,
    text=True,
  )
  assert running.stdout is not None
  while running.stdout.readline() != 'ready\n':
    assert running.poll() is None
  running.send_signal(signal.SIGTERM)
  running.wait(timeout=60)
  running.stdout.close()
  assert (project / 'saved').read_text() == 'saved\n'
