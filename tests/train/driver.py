"""A tiny run in a process of its own, which may send itself a signal.

  python -m tests.train.driver CONFIG WORKDIR TEXT [SIGNAL STEP]

runs the function CONFIG of `tiny`, and sends itself SIGNAL as soon as the
metrics of STEP are written and some checkpoint is complete.
"""

import os
import pathlib
import sys
import time

from psa_jax.train import loop
from psa_jax.train.metrics import Log
from psa_jax.train.run import CHECKPOINTS
from tests.train import tiny


def main(config, workdir, text, number=0, step=0):
  write = Log.write

  def write_then_kill(self, row):
    write(self, row)
    if row['kind'] == 'train' and row['step'] == int(step):
      saved = pathlib.Path(workdir) / CHECKPOINTS
      while not any(path.name.isdigit() for path in saved.glob('*')):
        time.sleep(0.01)  # saved by another thread
      os.kill(os.getpid(), int(number))

  Log.write = write_then_kill
  source = tiny.write_text(pathlib.Path(text))
  config = getattr(tiny, config)(source=source)
  loop.train_and_evaluate(config, workdir)


if __name__ == '__main__':
  main(*sys.argv[1:])
