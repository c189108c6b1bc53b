"""A tiny run in a process of its own, which may send itself a signal.

  python -m tests.train.driver CONFIG WORKDIR TEXT [SIGNAL WHEN]

runs the function CONFIG of `tiny`, and sends itself SIGNAL. WHEN is a step: as
soon as its metrics are written and some checkpoint is complete. Or it is
MODULE:NAME:COUNT: just before the COUNTth call of a function or method of
`psa_jax.train`, counted from 1; `checkpoint:Checkpoints._seal:2` is before the
second checkpoint gets its name, `run:result_lib.save:1` before the result.
"""

import importlib
import operator
import os
import pathlib
import sys
import time

from psa_jax.train import loop
from psa_jax.train.metrics import Log
from psa_jax.train.run import CHECKPOINTS
from tests.train import tiny


def main(config, workdir, text, number=0, when=0):
  if ':' in str(when):
    kill_before(int(number), when)
  else:
    kill_at_step(int(number), int(when), workdir)
  source = tiny.write_text(pathlib.Path(text))
  config = getattr(tiny, config)(source=source)
  loop.train_and_evaluate(config, workdir)


def kill_at_step(number, step, workdir):
  write = Log.write

  def write_then_kill(self, row):
    write(self, row)
    if row['kind'] == 'train' and row['step'] == step:
      saved = pathlib.Path(workdir) / CHECKPOINTS
      while not any(path.name.isdigit() for path in saved.glob('*')):
        time.sleep(0.01)  # saved by another thread
      os.kill(os.getpid(), number)

  Log.write = write_then_kill


def kill_before(number, point):
  module, name, count = point.split(':')
  *owner, name = name.split('.')
  owner = (
    operator.attrgetter('.'.join(owner))(
      importlib.import_module(f'psa_jax.train.{module}')
    )
    if owner
    else importlib.import_module(f'psa_jax.train.{module}')
  )
  call, calls = getattr(owner, name), []

  def kill_or_call(*args, **kwargs):
    calls.append(None)
    if len(calls) == int(count):
      os.kill(os.getpid(), number)
    return call(*args, **kwargs)

  setattr(owner, name, kill_or_call)


if __name__ == '__main__':
  main(*sys.argv[1:])
