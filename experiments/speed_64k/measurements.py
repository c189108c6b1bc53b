"""The measurements of this experiment; each adds rows to a book.

lengths    forward, backward and both in one, every contender and length
decode     one query over a full cache, selection included
peak       memory of forward and backward at every length
attention  one head at the recipe's final setting, one length
step       the recipe's whole train step, final density and dense
memory     temporary bytes of that step at half the length and at all of it
"""

import dataclasses
import json
import os
import subprocess
import sys

import jax

from experiments.bench import attention as lib
from experiments.bench import cli, memory, passes, peers, timing
from experiments.bench.rows import ROOT, Book
from experiments.bench.settings import Settings, option
from experiments.speed_64k import contenders
from psa_jax.config.recipe import load_recipe

# Read by XLA when it starts: its fused CPU kernels hide their temporaries
# from memory_analysis, so sizes are taken with them off.
NO_FUSED_KERNELS = '--xla_cpu_experimental_ynn_fusion_type='
WHAT = ('lengths', 'decode', 'peak', 'attention', 'step', 'memory')


@dataclasses.dataclass(frozen=True)
class SpeedSettings(Settings):
  """What `--set` changes."""

  what: tuple[str, ...] = option(
    tuple(x for x in WHAT if x != 'attention'), 'Measurements.', choices=WHAT
  )
  lengths: tuple[int, ...] = option(
    (2048, 4096, 8192, 16_384, 32_768, 65_536),
    'Tokens, for lengths, decode and peak.',
    least=1,
  )
  blocks: tuple[int, ...] = option(
    (24, 48, 96), 'Key blocks of 64 that a tile reads at most.', least=1
  )
  repeats: int = option(
    0, 'Timed rounds of everything; 0: fewer for what takes long.'
  )
  length: int = option(65_536, 'Tokens, for attention, step, memory.', least=1)
  recipe: str = option(
    'configs/lm_64k.py', 'Recipe of attention, step and memory.'
  )
  peers: str = option(peers.INTERPRETER, 'Python with PyTorch; empty for none.')
  peer_gib: float = option(8.0, 'Memory that PyTorch may take, in GiB.')
  quadratic_gib: float = option(
    1.0,
    'Largest [T, T] f32 array for jax.nn.dot_product_attention, in GiB; its '
    'backward pass has six of them at once.',
  )


def most_rounds(length):
  """Most rounds of a contender: the whole run has to end in 25 minutes."""
  return max(5, min(timing.MOST, 2**18 // length))


def lengths(settings, book):
  """Every pass of every contender."""
  with peers.started(settings.peers, settings.peer_gib) as servers:
    for length in sorted(settings.lengths):
      quadratic = 4 * length**2 <= settings.quadratic_gib * 2**30
      found = contenders.all_passes(length, settings.blocks, quadratic)
      for peer in servers:
        for which in passes.PASSES:
          found[peer.name, which] = peer.call(which, length)
      sweep('lengths', settings, book, length, found, servers)


def decode(settings, book):
  """One query at the end of a full cache."""
  with peers.started(settings.peers, settings.peer_gib) as servers:
    for length in sorted(settings.lengths):
      found = contenders.all_decodes(length, settings.blocks)
      for peer in servers:
        found[peer.name, 'decode'] = peer.call('decode', length)
        if peer.name == peers.SDPA:
          # Its threads cost more than they bring where the cache is short.
          found[peers.ONE_THREAD, 'decode'] = peer.call(
            'decode', length, threads=1
          )
      sweep('decode', settings, book, length, found, servers)


def sweep(what, settings, book: Book, length, found, servers):
  """Times the contenders of one length, unless memory ran out before."""
  found = {
    subject: call
    for subject, call in found.items()
    if not ran_out(book, what, length, subject)
  }
  about = described(length, settings.blocks, what == 'lengths')
  for peer in servers:
    about[peer.name] = peer.fields
    if peer.name == peers.SDPA:
      about[peers.ONE_THREAD] = peer.fields
  book.sweep(
    found,
    most=most_rounds(length),
    repeats=settings.repeats,
    about=about,
    what=what,
    length=length,
  )
  lib.clear()


def ran_out(book: Book, what, length, subject) -> bool:
  """Whether a contender ran out of memory at a shorter length.

  It is not asked for more; a row says so.
  """
  name, which = subject
  fields = {'what': what, 'length': length, 'contender': name, 'pass': which}
  if book.has(**fields):
    return False
  short = [
    row['length']
    for row in book.current()
    if (row['what'], row['contender'], row['pass']) == (what, name, which)
    and row['length'] < length
    and 'out of memory' in row.get('error', '')
  ]
  if not short:
    return False
  reason = f'not tried: out of memory at {short[0]:,} tokens'
  book.add({**fields, 'error': reason})
  return True


def described(length, blocks, counted):
  """{contender: further fields} of what is ours."""
  about = {contenders.GEMM: {'flops': 2 * contenders.GEMM_SIZE**3}}
  shape = lib.Shape(length)
  for n in (n for n in blocks if contenders.is_sparse(length, n)):
    for block_q in contenders.tiles(n, blocks):
      fields = {'blocks': n}
      if counted:
        work = lib.work(shape, contenders.sparse(n, block_q))
        fields |= work._asdict() | {'head_dim': shape.head_dim}
      about[contenders.kernel(n, block_q)] = fields
    about[contenders.whole(n)] = about[contenders.kernel(n)]
  return about


def peak(settings, book):
  """Memory of forward and backward: XLA's account, and peak RSS of peers."""
  which = passes.BOTH
  for row in answer(settings, 'program_sizes'):
    about = {'what': 'peak', 'pass': which}
    if not book.has(**about, **row):
      book.add({**about, 'of': 'XLA temporaries', **row})
  for kind, name in peers.NAMES.items():
    for length in sorted(settings.lengths):
      about = {'what': 'peak', 'length': length, 'contender': name}
      about['pass'] = which
      if ran_out(book, 'peak', length, (name, which)) or book.has(**about):
        continue
      of = {'of': 'growth of peak RSS in a fresh process'}
      with peers.started(settings.peers, settings.peer_gib, (kind,)) as servers:
        for peer in servers:
          book.add(about | of | peer.growth(which, length) | peer.fields)


def program_sizes(settings):
  """Sizes of our programs, in a process of their own; see `peak`."""
  rows = []
  for length in sorted(settings.lengths):
    shape = (1, length, 1, lib.Shape(length).head_dim)
    array = jax.ShapeDtypeStruct(shape, jax.numpy.float32)
    programs = contenders.compilable(length, settings.blocks)
    for name, attend in programs.items():
      program = jax.jit(passes.forward_and_backward(attend))
      compiled = program.lower(array, array, array, array).compile()
      size = memory.temporary_bytes(compiled)
      rows.append({'length': length, 'contender': name, 'bytes': size})
  return rows


def attention(settings, book):
  """One head of 64 at the recipe's final sparsity, against dense."""
  config, T = load_recipe(str(ROOT / settings.recipe)), settings.length
  about = {'what': 'attention', 'length': T}
  # Ratios are of one run, so `resume` keeps or repeats it as a whole.
  if book.has(**about, contender='psa_jax psa', **{'pass': passes.FORWARD}):
    return
  found = contenders.recipe_attention(config, T)
  with peers.started(settings.peers, settings.peer_gib, ('sdpa',)) as servers:
    for peer in servers:
      for which in (passes.FORWARD, passes.BACKWARD):
        found[peer.about['version'], which] = peer.call(which, T)
    book.sweep(found, repeats=settings.repeats or 3, **about)


def step(settings, book):
  """The whole train step of the recipe, at its final density and dense."""
  from experiments.bench import training  # the trainer: seconds of imports

  config, which = load_recipe(str(ROOT / settings.recipe)), 'whole train step'
  about = {'what': 'step', 'length': settings.length}
  with jax.set_mesh(training.mesh(config)):
    steps = {
      (mechanism, which): training.TrainStep(config, mechanism, settings.length)
      for mechanism in ('psa', 'dense')
      if not book.has(**about, contender=mechanism, **{'pass': which})
    }
    timings = timing.interleave(steps, timing.FEWEST, settings.repeats)
  for (name, _), took in timings.items():
    density = steps[name, which].density
    row = {**about, 'contender': name, 'pass': which, **took.row()}
    book.add({**row, 'density': density})


def step_memory(settings, book):
  """Temporary bytes of the compiled train step at two lengths."""
  for length in (settings.length // 2, settings.length):
    if not book.has(what='memory', length=length):
      at = dataclasses.replace(settings, length=length)
      size = answer(at, 'temporaries')
      book.add({'what': 'memory', 'length': length, 'bytes': size})


def temporaries(settings):
  """Temporary bytes at the length, in a process of its own; see `memory`."""
  from experiments.bench import training

  return training.temporaries(
    load_recipe(str(ROOT / settings.recipe)), settings.length
  )


def answer(settings, name):
  """What one of `CHILDREN` returns in a process whose sizes are honest."""
  flagged = ' '.join([os.environ.get('XLA_FLAGS', ''), NO_FUSED_KERNELS])
  done = subprocess.run(
    [sys.executable, *cli.child_command('speed_64k', settings, name)],
    env={**os.environ, 'XLA_FLAGS': flagged.strip()},
    cwd=ROOT,
    check=True,
    stdout=subprocess.PIPE,
    text=True,
  )
  return json.loads(done.stdout.rstrip().split('\n')[-1])


# In the order in which they are made.
MEASUREMENTS = dict(
  zip(
    WHAT,
    (lengths, decode, peak, attention, step, step_memory),
    strict=True,
  )
)
CHILDREN = {'temporaries': temporaries, 'program_sizes': program_sizes}
