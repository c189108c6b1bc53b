"""The JAX programs that are timed.

`attention` is the operation without projections: compression, gates and all
three branches, for G query heads of 64 on one kv head, f32, the paper's sizes.
`module` is a whole layer with its projections, as the pip package has it: one
head of 64 and a model width of 64.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.bench import attention as lib
from experiments.bench.passes import passes
from experiments.bench.timing import Call, Subject, lazily, timed
from psa_jax.attention.context import AttentionContext
from psa_jax.attention.layer import SelfAttention
from psa_jax.attention.nsa import NsaConfig, branches
from psa_jax.attention.nsa import compress as compress_lib
from psa_jax.attention.nsa.parameters import NETWORK
from psa_jax.attention.rotary import rotary
from psa_jax.config import AttentionConfig, ModelConfig
from psa_jax.kernels import compressed
from psa_jax.kernels.block_sparse import block_sparse_attention
from psa_jax.types import Learned

HEAD_DIM = 64
MECHANISMS = ('nsa', 'nsa_tile')
OURS_DENSE = 'psa_jax dense'
BRANCHES = ('compress', 'compressed', 'choice', 'selected', 'window')


def config(name: str) -> AttentionConfig:
  """The paper's sizes, which are the defaults."""
  return AttentionConfig(name=name, nsa=NsaConfig())


def layer_name(mechanism: str) -> str:
  """Name of a whole layer."""
  return f'psa_jax {mechanism} layer'


@functools.cache
def inputs(length: int, heads: int) -> tuple[dict, jax.Array]:
  """What the mechanism is given, and a gradient of its output."""
  cfg = NsaConfig()
  draw = iter(jax.random.split(jax.random.key(0), 20))

  def normal(*shape, size=1.0):
    return size * jax.random.normal(next(draw), shape, jnp.float32)

  key = (1, length, 1, HEAD_DIM)
  x = {'q': normal(1, length, heads, HEAD_DIM), 'k': normal(*key)}
  x['v'] = normal(*key)
  for name in ('k_compress', 'v_compress', 'k_window', 'v_window'):
    x[name] = normal(*key)
  x['gates'] = jax.nn.sigmoid(normal(1, length, heads, 3))
  block, hidden = cfg.compress_block, cfg.compress_dim
  for which in 'kv':
    size = (block * HEAD_DIM) ** -0.5
    x[f'{which}_place'] = normal(block, HEAD_DIM, size=0.1)
    x[f'{which}_in'] = normal(block, HEAD_DIM, hidden, size=size)
    x[f'{which}_out'] = normal(hidden, HEAD_DIM, size=hidden**-0.5)
  return x, normal(1, length, heads, HEAD_DIM)


def learned(x: dict, length: int) -> Learned:
  """`x` as the mechanism takes it, with rotary positions."""
  table = rotary(jnp.arange(length)[None], head_dim=HEAD_DIM, theta=5e5)
  weights = {name: x[name] for name in NETWORK}
  heads = {
    name: value
    for name, value in x.items()
    if name not in weights and name not in 'qkv'
  }
  return Learned(heads, table._asdict(), weights)


def attend(mechanism: str, x: dict):
  """The whole operation."""
  weights = learned(x, x['q'].shape[1])
  arrays = (x[name] for name in 'qkv')
  return lib.attend(*arrays, config=config(mechanism), learned=weights)


def attend_dense(x: dict):
  """Our dense attention; it leaves out what it does not read."""
  return lib.attend_dense(x['q'], x['k'], x['v'])


def attention(length: int, heads: int) -> dict[Subject, Call]:
  """Everything of ours at one length, by (name, pass)."""
  contenders = {}

  def args():
    return inputs(length, heads)

  def some():  # dense attention takes no more than these
    x, grad = args()
    return {name: x[name] for name in 'qkv'}, grad

  for mechanism in MECHANISMS:
    whole = functools.partial(attend, mechanism)
    contenders |= passes(mechanism, whole, args)
  contenders |= passes(OURS_DENSE, attend_dense, some)
  for branch in BRANCHES:
    build = functools.partial(branch_call, branch, length, heads)
    contenders[f'nsa: {branch}', 'forward'] = lazily(build)
  return contenders


def branch_call(branch: str, length: int, heads: int) -> Call:
  """One part of `nsa`, with what it needs made beforehand."""
  x, _ = inputs(length, heads)
  made = learned(x, length)
  cfg, full = NsaConfig(), config('nsa')

  def compress(made):
    raw = made.heads['k_compress'], made.heads['v_compress']
    return compress_lib.compress_pair(
      *raw, made, block=cfg.compress_block, stride=cfg.stride
    )

  def attend_compressed(q, kc, vc):
    return compressed.compressed_attention(
      q, kc, vc, block=cfg.compress_block, stride=cfg.stride
    )

  def choose(q, kc, lse):
    blocks = -(-length // cfg.select_block)
    budget = jnp.int32(cfg.blocks.init)
    return branches.select(q, kc, lse, full, budget, None, 1, blocks)[:2]

  def selected(q, k, v, ids, counts):
    return block_sparse_attention(
      q, k, v, ids, counts, block_q=1, block_k=cfg.select_block
    )[0]

  def window(q, k, v):
    return branches.window_attention(q, k, v, full, None, None)

  if branch == 'compress':
    return timed(jax.jit(compress), made)
  if branch == 'window':
    pair = made.heads['k_window'], made.heads['v_window']
    return timed(jax.jit(window), x['q'], *pair)
  kc, vc = jax.jit(compress)(made)
  if branch == 'compressed':
    return timed(jax.jit(attend_compressed), x['q'], kc, vc)
  lse = jax.jit(attend_compressed)(x['q'], kc, vc)[1]
  if branch == 'choice':
    return timed(jax.jit(choose), x['q'], kc, lse)
  lists = jax.jit(choose)(x['q'], kc, lse)
  return timed(jax.jit(selected), x['q'], x['k'], x['v'], *lists)


def layer(mechanism: str, length: int):
  """A whole layer as a function of input and parameters, and its inputs."""
  model = ModelConfig(
    d_model=HEAD_DIM,
    num_heads=1,
    num_kv_heads=1,
    head_dim=HEAD_DIM,
    attention=dataclasses.replace(config(mechanism)),
  )
  graph, state = nnx.split(SelfAttention(model, rngs=nnx.Rngs(0)))
  state = nnx.as_pure(state)
  keys = jax.random.split(jax.random.key(1))
  x, grad = (
    jax.random.normal(key, (1, length, HEAD_DIM), jnp.float32) for key in keys
  )

  def run(args):
    state, x = args
    table = rotary(jnp.arange(length)[None], head_dim=HEAD_DIM, theta=5e5)
    return nnx.merge(graph, state)(
      x, context=AttentionContext(step=0, rope=table, train=True)
    )[0]

  return run, ((state, x), grad)


def modules(length: int) -> dict[Subject, Call]:
  """Whole layers with a gradient in input and parameters."""
  contenders = {}
  for mechanism in MECHANISMS:
    run, args = layer(mechanism, length)
    name = layer_name(mechanism)
    contenders |= passes(name, run, lambda args=args: args)
  return contenders
