"""SIGTERM, SIGHUP and Ctrl-C, once and twice."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from psa_jax.train.interrupt import SIGNALS, Interrupt, Stopped

CHILD = """
import time
from psa_jax.train.interrupt import Interrupt
say = lambda line: print(line, flush=True)
with Interrupt(say, before_abort=lambda: say('terminal restored')):
  print('ready', flush=True)
  time.sleep(60)
"""


@pytest.fixture(autouse=True)
def hangups():
  """SIGHUP as a terminal has it: these tests may be run by nohup."""
  old = signal.signal(signal.SIGHUP, signal.SIG_DFL)
  yield
  signal.signal(signal.SIGHUP, old)


def wait_for_stop(interrupt):
  """Checks as the loop does, until the watching thread has set the flag."""
  for _ in range(500):
    interrupt.check()
    time.sleep(0.01)


@pytest.mark.parametrize('number', SIGNALS)
def test_a_signal_stops_at_the_next_check(number):
  before = [signal.getsignal(n) for n in SIGNALS]
  said = []
  with Interrupt(said.append) as interrupt:
    interrupt.check()
    os.kill(os.getpid(), number)
    with pytest.raises(Stopped):
      wait_for_stop(interrupt)
    with pytest.raises(Stopped):
      interrupt.check_step(3)
  assert [signal.getsignal(n) for n in SIGNALS] == before
  (line,) = said
  assert signal.Signals(number).name in line and 'again to abort' in line


def test_nohup_stays_nohup():
  old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
  try:
    with Interrupt(lambda _: None) as interrupt:
      os.kill(os.getpid(), signal.SIGHUP)
      time.sleep(0.1)
      interrupt.check()
  finally:
    signal.signal(signal.SIGHUP, old)


def test_sigterm_may_come_twice():
  with Interrupt(lambda _: None) as interrupt:
    for _ in range(3):
      os.kill(os.getpid(), signal.SIGTERM)
      with pytest.raises(Stopped):
        wait_for_stop(interrupt)


def test_other_threads_leave_signals_alone():
  before = [signal.getsignal(n) for n in SIGNALS]
  seen = []

  def run():
    with Interrupt():
      seen.extend(signal.getsignal(n) for n in SIGNALS)

  thread = threading.Thread(target=run)
  thread.start()
  thread.join()
  assert seen == before


def test_a_second_ctrl_c_aborts_at_once():
  child = subprocess.Popen(
    [sys.executable, '-c', CHILD], stdout=subprocess.PIPE, text=True
  )
  try:
    assert child.stdout.readline() == 'ready\n'
    child.send_signal(signal.SIGINT)
    assert 'SIGINT: saving' in child.stdout.readline()
    child.send_signal(signal.SIGINT)
    assert child.wait(timeout=30) == 130
    assert child.stdout.read() == 'terminal restored\n'
  finally:
    child.kill()
    child.stdout.close()
