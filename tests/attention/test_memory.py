"""Memory of every mechanism grows linearly with the length, by XLA's account.

XLA's fused CPU kernels hide their temporaries from `memory_analysis`, and the
flag that turns them off is read once at start, so a child process compiles.
"""

import json
import os
import subprocess
import sys

import pytest

from tests.attention.test_contract import ROWS

pytestmark = pytest.mark.tier('default')

LENGTHS = 8192, 16_384
CHILD = """
import json, sys
import jax
import jax.numpy as jnp
from psa_jax.attention import AttentionContext, attend as library_attend
from tests.attention.test_contract import LEARNED, ROWS, changed

def temporaries(config, T):
  if hasattr(getattr(config, config.name.removesuffix('_tile')), 'max_blocks'):
    config = changed(config, max_blocks=32)
  make = LEARNED.get(config.name, lambda *args: None)
  def loss(q, k, v):
    learned = make(q, k, v)
    context = AttentionContext()
    out, aux = library_attend(
      q, k, v, config=config, context=context, learned=learned
    )
    return out.sum() + sum(x for n, x in aux.items() if n[:5] == 'loss/')
  shape = jax.ShapeDtypeStruct((1, T, 1, 16), jnp.float32)
  step = jax.jit(jax.grad(loss, (0, 1, 2))).lower(shape, shape, shape)
  return step.compile().memory_analysis().temp_size_in_bytes

names, lengths = json.loads(sys.argv[1])
found = {n: [temporaries(ROWS[n].config, T) for T in lengths] for n in names}
print(json.dumps(found))
"""
# A block list is as wide as the largest budget needs, a share of the length;
# what is linear is the memory at a given width.
NAMES = list(ROWS)


@pytest.fixture(scope='module')
def temporaries():
  # Buffers are assigned before LLVM sees anything, so it need not optimise.
  flags = (
    '--xla_cpu_experimental_ynn_fusion_type= '
    '--xla_backend_optimization_level=0 '
    '--xla_cpu_parallel_codegen_split_count=1'
  )
  done = subprocess.run(
    [sys.executable, '-c', CHILD, json.dumps([NAMES, LENGTHS])],
    env={**os.environ, 'XLA_FLAGS': flags, 'JAX_NUM_CPU_DEVICES': '1'},
    cwd=os.path.dirname(os.path.dirname(os.path.dirname(__file__))),
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize('name', NAMES)
def test_temporaries_are_linear_in_the_length(name, temporaries):
  short, long = temporaries[name]
  assert long <= 2.2 * short
  # A [T, T] array of one byte an entry would not fit.
  assert long < LENGTHS[1] ** 2 / 4
