"""The measurements that `run.py` makes; each adds rows to a book.

lengths    forward, backward and both in one, every contender and length
decode     one query over a full cache, selection included
peak       memory of forward and backward at every length
attention  one head at the recipe's final setting, one length
step       the recipe's whole train step, final density and dense
memory     temporary bytes of that step at half the length and at all of it
"""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys

import jax

from experiments.speed_64k import contenders as lib
from experiments.speed_64k import pipe, rows, timing, training

# Read by XLA when it starts: its fused CPU kernels hide their temporaries
# from memory_analysis, so sizes are taken with them off.
NO_FUSED_KERNELS = '--xla_cpu_experimental_ynn_fusion_type='


@dataclasses.dataclass(frozen=True)
class Settings:
  """What the command line says.

  Attributes:
    lengths: of `lengths`, `decode` and `peak`.
    blocks: sizes of the block lists.
    repeats: timed rounds of everything; 0 gives long calls fewer.
    python: the PyTorch interpreter, below the root; empty for none.
    peer_gib: memory that a PyTorch process may take.
    quadratic_gib: largest [T, T] f32 array that `jax.nn` may want.
    length: of the measurements of the recipe.
    recipe: of `attention`, `step` and `memory`.
  """

  lengths: tuple[int, ...]
  blocks: tuple[int, ...]
  repeats: int
  python: str
  peer_gib: float
  quadratic_gib: float
  length: int
  recipe: str


@contextlib.contextmanager
def started_peers(settings, kinds=tuple(pipe.NAMES)):
  """The peers that there are; ended afterwards."""
  peers = pipe.start(settings.python, settings.peer_gib, kinds)
  try:
    yield peers
  finally:
    for peer in peers:
      peer.close()


def most_rounds(settings, length):
  """Most rounds of a contender: the whole run has to end in 25 minutes."""
  return max(5, min(timing.MOST, 2**18 // length))


def lengths(settings, book):
  """Every pass of every contender."""
  with started_peers(settings) as peers:
    for length in sorted(settings.lengths):
      quadratic = 4 * length**2 <= settings.quadratic_gib * 2**30
      found = lib.all_passes(length, list(settings.blocks), quadratic)
      for peer in peers:
        for which in lib.PASSES:
          found[peer.name, which] = peer.call(which, length)
      _sweep('lengths', settings, book, length, found, peers)


def decode(settings, book):
  """One query at the end of a full cache."""
  with started_peers(settings) as peers:
    for length in sorted(settings.lengths):
      found = lib.all_decodes(length, list(settings.blocks))
      for peer in peers:
        found[peer.name, 'decode'] = peer.call('decode', length)
        if peer.name == pipe.NAMES['sdpa']:
          # Its threads cost more than they bring where the cache is short.
          found[pipe.ONE_THREAD, 'decode'] = peer.call(
            'decode', length, threads=1
          )
      _sweep('decode', settings, book, length, found, peers)


def _sweep(what, settings, book, length, found, peers):
  """Times what is not in the book yet, at one length, and adds the rows."""
  found = {
    k: call for k, call in found.items() if not _settled(book, what, length, k)
  }
  most = most_rounds(settings, length)
  timings = timing.interleave(found, most, settings.repeats)
  about = _about(length, settings.blocks, what == 'lengths')
  for peer in peers:
    fields = {'version': peer.version, 'sizes': peer.sizes}
    about[peer.name] = fields
    if peer.name == pipe.NAMES['sdpa']:
      about[pipe.ONE_THREAD] = fields
  for (name, which), took in timings.items():
    book.add({
      'what': what,
      'length': length,
      'contender': name,
      'pass': which,
      **took.row(),
      **about.get(name, {}),
    })  # fmt: skip
  for made in (lib.inputs, lib.lists, lib.cache):
    made.cache_clear()


def _settled(book, what, length, key):
  """Whether a contender was measured, or failed at a shorter length.

  A peer that ran out of memory is not asked for more; the row says so.
  """
  name, which = key
  if book.has(what, length, name, which):
    return True
  short = [
    row
    for row in book.rows
    if (row['what'], row['contender'], row['pass']) == (what, name, which)
    and row['length'] < length
    and 'out of memory' in row.get('error', '')
  ]
  if not short:
    return False
  reason = f'not tried: out of memory at {short[0]["length"]:,} tokens'
  book.add({
    'what': what,
    'length': length,
    'contender': name,
    'pass': which,
    'error': reason,
  })  # fmt: skip
  return True


def _about(length, blocks, counted):
  """{contender: further fields} of what is ours."""
  about = {lib.GEMM: {'flops': 2 * lib.GEMM_SIZE**3}}
  for n in (n for n in blocks if lib.is_sparse(length, n)):
    for block_q in lib.tiles(n, blocks):
      fields = {'blocks': n}
      if counted:
        fields |= lib.work(length, n, block_q)._asdict()
        fields |= {'head_dim': lib.HEAD_DIM}
      about[lib.kernel(n, block_q)] = fields
    about[lib.whole(n)] = about[lib.kernel(n)]
  return about


def peak(settings, book):
  """Memory of forward and backward: XLA's account, and peak RSS of peers."""
  which = lib.PASSES[2]
  wanted = sorted(settings.lengths)
  for line in _child(settings, 'program_sizes'):
    row = json.loads(line)
    if not book.has('peak', row['length'], row['contender'], which):
      book.add({'what': 'peak', 'pass': which, 'of': 'XLA temporaries', **row})
  for kind, name in pipe.NAMES.items():
    for length in wanted:
      if _settled(book, 'peak', length, (name, which)):
        continue
      row = _peer_peak(settings, kind, length, which)
      if row is not None:
        book.add({
          'what': 'peak',
          'length': length,
          'contender': name,
          'pass': which,
          'of': 'growth of peak RSS in a fresh process',
          **row,
        })  # fmt: skip


def _peer_peak(settings, kind, length, which):
  """Bytes that a fresh process takes for one call, or why it cannot."""
  with started_peers(settings, (kind,)) as peers:
    for peer in peers:
      about = {'version': peer.version, 'sizes': peer.sizes}
      try:
        before = peer.ask('peak')['bytes']
        peer.ask(which, length)
        rss = peer.ask('peak')['bytes']
      except timing.Unavailable as error:
        return {'error': str(error), **about}
      return {'bytes': rss - before, 'rss': rss, **about}
  return None


def program_sizes(settings, book):
  """Prints the sizes of our programs; the child side of `peak`."""
  for length in sorted(settings.lengths):
    shape = (1, length, 1, lib.HEAD_DIM)
    array = jax.ShapeDtypeStruct(shape, jax.numpy.float32)
    for name, attend in lib.compilable(length, settings.blocks).items():
      program = jax.jit(lib.forward_and_backward(attend))
      compiled = program.lower(array, array, array, array).compile()
      size = training.temporary_bytes(compiled)
      row = {'length': length, 'contender': name, 'bytes': size}
      print(json.dumps(row), flush=True)


def attention(settings, book):
  """One head of 64 at the recipe's final sparsity, against dense."""
  # Ratios are of one run, so `--resume` keeps or repeats it as a whole.
  if book.has('attention', settings.length, 'psa_jax psa', 'forward'):
    return
  config, T = training.recipe(settings.recipe), settings.length
  found = training.attention(config, T)
  with started_peers(settings, ('sdpa',)) as peers:
    for peer in peers:
      for which in lib.PASSES[:2]:
        found[peer.version, which] = peer.call(which, T)
    timings = timing.interleave(found, repeats=settings.repeats or 3)
  for (name, which), took in timings.items():
    book.add({
      'what': 'attention',
      'length': T,
      'contender': name,
      'pass': which,
      **took.row(),
    })  # fmt: skip


def step(settings, book):
  """The whole train step of the recipe, at its final density and dense."""
  config = training.recipe(settings.recipe)
  which = 'whole train step'
  with jax.set_mesh(training.mesh(config)):
    found = {
      (mechanism, which): training.TrainStep(config, mechanism, settings.length)
      for mechanism in ('psa', 'dense')
      if not book.has('step', settings.length, mechanism, which)
    }
    timings = timing.interleave(found, timing.FEWEST, settings.repeats)
  for (name, _), took in timings.items():
    book.add({
      'what': 'step',
      'length': settings.length,
      'contender': name,
      'pass': which,
      **took.row(),
      'density': found[name, which].density,
    })  # fmt: skip


def memory(settings, book):
  """Temporary bytes of the compiled train step at two lengths."""
  for length in (settings.length // 2, settings.length):
    if book.has('memory', length, None, None):
      continue
    at = dataclasses.replace(settings, length=length)
    size = json.loads(_child(at, 'temporaries')[0])['bytes']
    book.add({'what': 'memory', 'length': length, 'bytes': size})


def temporaries(settings, book):
  """Prints the temporary bytes at the length; the child side of `memory`."""
  config = training.recipe(settings.recipe)
  size = training.temporaries(config, settings.length)
  print(json.dumps({'bytes': size}))


def _child(settings, what):
  """Lines that this program prints when sizes are honest."""
  flagged = ' '.join([os.environ.get('XLA_FLAGS', ''), NO_FUSED_KERNELS])
  lengths, blocks = (
    ','.join(map(str, some)) for some in (settings.lengths, settings.blocks)
  )
  command = [sys.executable, rows.HERE / 'run.py', f'--what={what}']
  command += [f'--lengths={lengths}', f'--blocks={blocks}', '--nowrite']
  command += [f'--recipe={settings.recipe}', f'--length={settings.length}']
  done = subprocess.run(
    command,
    env={**os.environ, 'XLA_FLAGS': flagged.strip()},
    check=True,
    stdout=subprocess.PIPE,
    text=True,
  )
  return [s for s in done.stdout.splitlines() if s.startswith('{')]


# In the order in which they are made; the last two are for child processes.
MEASUREMENTS = {
  'lengths': lengths,
  'decode': decode,
  'peak': peak,
  'attention': attention,
  'step': step,
  'memory': memory,
}
CHILDREN = {'temporaries': temporaries, 'program_sizes': program_sizes}
