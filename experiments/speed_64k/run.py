"""Times and sizes at 64k: sparse attention, dense attention, whole steps.

  make bench-peers                              once, for the PyTorch rows
  python experiments/speed_64k/run.py           everything, about 25 minutes

Three measurements, each a row set in `results.jsonl` and a table in
`README.md`:

  attention  one head of 64, f32: forward (selection included) and backward of
             psa at the recipe's final setting, our dense attention, and
             PyTorch's scaled_dot_product_attention
  step       the whole train step of `configs/lm_64k.py` at 65,536 tokens, at
             its final density and with dense attention
  memory     temporary bytes of that step at 32,768 and at 65,536 tokens

Contenders are interleaved (A B C A B C ...) in one run after a warm-up; the
table shows medians and their ratios. Nothing else should use the machine.
"""

import dataclasses
import datetime
import functools
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))

from absl import app, flags  # noqa: E402

_WHAT = flags.DEFINE_list(
  'what', ['attention', 'step', 'memory'], 'Measurements to make.'
)
_REPEATS = flags.DEFINE_integer('repeats', 3, 'Timed rounds.', lower_bound=1)
_LENGTH = flags.DEFINE_integer('length', 65_536, 'Tokens of context.')
_CONFIG = flags.DEFINE_string('config', 'configs/lm_64k.py', 'The recipe.')
_PEERS = flags.DEFINE_string(
  'peers', '.venv-peers/bin/python', 'Python with PyTorch; empty for none.'
)
_WRITE = flags.DEFINE_bool('write', True, 'Append results and update README.')

# Read by XLA when it starts: its fused CPU kernels hide their temporaries
# from memory_analysis, so sizes are taken with them off.
NO_FUSED_KERNELS = '--xla_cpu_experimental_ynn_fusion_type='


def main(argv):
  """Runs the chosen measurements and writes them down."""
  if len(argv) > 1:
    raise app.UsageError(f'unknown argument {argv[1]!r}')
  rows = []
  for what in _WHAT.value:
    rows += MEASUREMENTS[what]()
  stamp = environment()
  rows = [{**row, **stamp} for row in rows]
  from psa_jax import report

  for what in _WHAT.value:
    print(report.markdown(table(what, rows)))
  if _WRITE.value:
    write(rows)


def write(rows):
  """Appends to `results.jsonl`, and renews the tables from the newest rows."""
  from psa_jax import report

  path = HERE / 'results.jsonl'
  with path.open('a') as file:
    file.writelines(json.dumps(row) + '\n' for row in rows)
  for what in {row['what'] for row in rows}:
    text = report.markdown(table(what, rows))
    versions = ', '.join(
      f'{key} {rows[0][key]}' for key in ('date', 'commit', 'jax', 'machine')
    )
    report.replace_section(HERE / 'README.md', what, f'{text}\n\n{versions}')


def attention():
  """One head of 64 at the recipe's final sparsity, against dense."""
  contenders = our_attention(_LENGTH.value)
  peer = Peer.start(_PEERS.value)
  if peer:
    for what in ('forward', 'backward'):
      call = functools.partial(peer.seconds, what, _LENGTH.value, 64)
      contenders[peer.version, what] = call
  found = interleave(contenders, _REPEATS.value)
  return [
    {
      'what': 'attention',
      'length': _LENGTH.value,
      'contender': name,
      'pass': which,
      'seconds': seconds,
      'median': statistics.median(seconds),
    }
    for (name, which), seconds in found.items()
  ]


def our_attention(T):
  """{(name, pass): function that returns seconds}."""
  import jax
  import jax.numpy as jnp

  from psa_jax.attention import base

  config = recipe()
  final = one_head(config)
  keys = jax.random.split(jax.random.key(0), 3)
  q, k, v = (jax.random.normal(key, (1, T, 1, 64), jnp.float32) for key in keys)

  def attend(mechanism, q, k, v):
    step = sum(config.train.steps)
    return base.attend(
      q, k, v, config=final, step=step, mechanism=mechanism
    ).out

  contenders = {}
  for mechanism in ('psa', 'dense'):
    forward = jax.jit(functools.partial(attend, mechanism))
    out, pullback = jax.vjp(forward, q, k, v)
    backward = jax.jit(lambda pullback, grad: pullback(grad))
    contenders[f'psa_jax {mechanism}', 'forward'] = timed(forward, q, k, v)
    contenders[f'psa_jax {mechanism}', 'backward'] = timed(
      backward, pullback, jnp.ones_like(out)
    )
  return contenders


def step():
  """The whole train step of the recipe, at its final density and dense."""
  import jax

  config = recipe()
  contenders = {}
  with jax.set_mesh(mesh(config)):
    for mechanism in ('psa', 'dense'):
      contenders[mechanism, 'step'] = TrainStep(config, mechanism)
    found = interleave(contenders, _REPEATS.value)
  return [
    {
      'what': 'step',
      'length': _LENGTH.value,
      'contender': name,
      'pass': 'whole train step',
      'seconds': seconds,
      'median': statistics.median(seconds),
      'density': contenders[name, which].density,
    }
    for (name, which), seconds in found.items()
  ]


class TrainStep:
  """One compiled train step with state of its own; a call is one update."""

  def __init__(self, config, mechanism):
    """Builds state and batch at the step that ends the recipe."""
    import jax.numpy as jnp

    from psa_jax.train import state as state_lib

    self.config = with_mechanism(config, mechanism)
    task, program, self.step, self.batch = parts(self.config, _LENGTH.value)
    state = state_lib.init_state(self.config, task.vocab_size, program)
    self.state = state._replace(step=jnp.int32(sum(config.train.steps)))
    self.density = None

  def __call__(self):
    """Seconds of one update."""
    import jax

    began = time.perf_counter()
    self.state, metrics = jax.block_until_ready(
      self.step(self.state, self.batch)
    )
    self.density = float(metrics['density'])
    return time.perf_counter() - began


def memory():
  """Temporary bytes of the compiled train step at two lengths."""
  rows = []
  for length in (_LENGTH.value // 2, _LENGTH.value):
    flagged = ' '.join([os.environ.get('XLA_FLAGS', ''), NO_FUSED_KERNELS])
    child = [sys.executable, __file__, f'--config={_CONFIG.value}']
    child += ['--what=temporaries', f'--length={length}', '--nowrite']
    done = subprocess.run(
      child,
      env={**os.environ, 'XLA_FLAGS': flagged.strip()},
      check=True,
      capture_output=True,
      text=True,
    )
    size = json.loads(done.stdout.splitlines()[0])['bytes']
    rows.append({'what': 'memory', 'length': length, 'bytes': size})
  return rows


def temporaries():
  """Prints the temporary bytes at `--length`; the child side of `memory`."""
  import jax

  config = recipe()
  with jax.set_mesh(mesh(config)):
    _, program, step, batch = parts(config, _LENGTH.value)
    compiled = step.lower(program.abstract, batch).compile()
  size = compiled.memory_analysis().temp_size_in_bytes
  print(json.dumps({'bytes': size}))
  return []


MEASUREMENTS = {
  'attention': attention,
  'step': step,
  'memory': memory,
  'temporaries': temporaries,
}


def recipe():
  """The configuration that is measured."""
  from psa_jax.recipe import load_recipe

  os.chdir(ROOT)
  return load_recipe(_CONFIG.value, [])


def one_head(config):
  """The recipe's attention for a single head.

  A tile of the recipe has the queries of all G heads of a group as rows; one
  head gets tiles of as many rows, so G times as many queries.
  """
  attention, model = config.model.attention, config.model
  rows = attention.psa.block_q * model.num_heads // model.num_kv_heads
  psa = dataclasses.replace(attention.psa, block_q=rows)
  return dataclasses.replace(attention, name='psa', psa=psa)


def with_mechanism(config, name):
  """The same run with another attention mechanism."""
  attention = dataclasses.replace(config.model.attention, name=name)
  model = dataclasses.replace(config.model, attention=attention)
  return dataclasses.replace(config, model=model)


def mesh(config):
  """The recipe's mesh over this machine."""
  from psa_jax import sharding

  return sharding.make_mesh(config.mesh)


def parts(config, length):
  """Task, program, jitted train step and one window of the recipe's text."""
  import jax

  from psa_jax.data import lm
  from psa_jax.train import state as state_lib
  from psa_jax.train import step as step_lib
  from psa_jax.train import tasks

  corpus = lm.build_corpus(config.data)
  task = tasks.LanguageModel(config, corpus, mesh(config))
  program = state_lib.make_program(config, task.vocab_size, mesh(config))
  source = lm.windows(
    corpus.train, seq_len=length, cut_documents=config.data.cut_documents
  )
  batch = jax.tree.map(lambda x: x[None], source[0])
  return task, program, step_lib.make_train_step(config, task, program), batch


def timed(function, *args):
  """A call without arguments that returns the seconds it took."""
  import jax

  def call():
    began = time.perf_counter()
    jax.block_until_ready(function(*args))
    return time.perf_counter() - began

  return call


def interleave(contenders, repeats):
  """{key: [seconds]} of `repeats` rounds after one warm-up round."""
  seconds = {key: [] for key in contenders}
  for number in range(repeats + 1):
    for key, call in contenders.items():
      took = call()
      if number:
        seconds[key].append(took)
      label = f'round {number}' if number else 'warm-up'
      print(f'{label}: {" ".join(key)} {took:.3f} s', file=sys.stderr)
  return seconds


class Peer:
  """PyTorch in its own environment, asked over a pipe."""

  def __init__(self, python):
    """Starts the server."""
    self.server = subprocess.Popen(
      [python, HERE / 'peer.py', str(os.cpu_count())],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )
    self.version = self._read()['version']

  @classmethod
  def start(cls, python):
    """The peer, or None with a line that says how to get it."""
    if python and (ROOT / python).exists():
      return cls(ROOT / python)
    print('no PyTorch rows: run `make bench-peers` first', file=sys.stderr)
    return None

  def seconds(self, what, T, H):
    """Seconds of one call."""
    assert self.server.stdin is not None
    self.server.stdin.write(json.dumps({'what': what, 'T': T, 'H': H}) + '\n')
    self.server.stdin.flush()
    return self._read()['seconds']

  def _read(self):
    assert self.server.stdout is not None
    return json.loads(self.server.stdout.readline())


def table(what, rows):
  """Header and rows of the table of one measurement."""
  rows = [row for row in rows if row['what'] == what]
  if what == 'memory':
    first = rows[0]['bytes']
    return [
      ('tokens', 'temporary MiB', 'ratio'),
      *(
        (
          f'{row["length"]:,}',
          f'{row["bytes"] / 2**20:,.0f}',
          f'{row["bytes"] / first:.2f}x',
        )
        for row in rows
      ),
    ]
  ours = {
    row['pass']: row['median']
    for row in rows
    if 'psa' in row['contender'].split()[-1]
  }
  return [
    ('contender', 'pass', 'median s', 'lowest-highest s', 'psa is faster by'),
    *(
      (
        row['contender'],
        row['pass'],
        f'{row["median"]:.3f}',
        f'{min(row["seconds"]):.3f}-{max(row["seconds"]):.3f}',
        f'{row["median"] / ours[row["pass"]]:.1f}x',
      )
      for row in rows
    ),
  ]


def environment():
  """Date, commit, versions and machine of a result."""
  import jax

  commit = subprocess.run(
    ['git', 'rev-parse', '--short', 'HEAD'],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  ).stdout.strip()
  return {
    'date': datetime.date.today().isoformat(),
    'commit': commit or 'unknown',
    'jax': jax.__version__,
    'python': platform.python_version(),
    'machine': f'{os.cpu_count()} cores, {cpu_name()}',
  }


def cpu_name():
  """The processor's model, where Linux tells."""
  try:
    text = pathlib.Path('/proc/cpuinfo').read_text()
  except OSError:
    return platform.machine()
  names = [s for s in text.splitlines() if s.startswith('model name')]
  return names[0].split(':')[1].strip() if names else platform.machine()


if __name__ == '__main__':
  app.run(main)
