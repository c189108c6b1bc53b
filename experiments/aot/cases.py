"""The kernels that are compiled, and the machines they are compiled for."""

import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple


class Machine(NamedTuple):
  """A chip that programs are compiled for.

  Attributes:
    platform: `tpu` or `gpu`.
    topology: what JAX calls one chip of it.
    kind: see `psa_jax.kernels.platform.Target`.
    capability: of a GPU, likewise.
    cores: multiprocessors of a GPU.
    memory: bytes of a GPU.
    bandwidth: bytes a second of a GPU.
    cache: bytes of a GPU's second-level cache.
    clock: GHz of a GPU.
  """

  platform: str
  topology: str
  kind: str
  capability: int = 0
  cores: int = 0
  memory: int = 0
  bandwidth: int = 0
  cache: int = 0
  clock: float = 0.0

  @property
  def arch(self) -> str:
    """What ptxas calls a GPU."""
    return f'sm_{self.capability}a'

  @property
  def gpu_config(self) -> str:
    """XLA's description of a GPU."""
    return GPU_CONFIG.format(major=self.capability // 10, **self._asdict())


# The figures are those of XLA's own descriptions (target_config/specs).
MACHINES = {
  'v4': Machine('tpu', 'v4:1x1x1', 'v4'),
  'v5e': Machine('tpu', 'v5e:1x1', 'v5e'),
  'v5p': Machine('tpu', 'v5p:1x1x1', 'v5p'),
  'v6e': Machine('tpu', 'v6e:1x1', 'v6e'),
  'tpu7x': Machine('tpu', 'tpu7x:1x1x1', 'tpu7x'),
  'sm_90a': Machine(
    'gpu',
    '1x1x1',
    'NVIDIA H100 80GB HBM3',
    capability=90,
    cores=132,
    memory=84942979072,
    bandwidth=3352320000000,
    cache=52428800,
    clock=1.98,
  ),
  'sm_100a': Machine(
    'gpu',
    '1x1x1',
    'NVIDIA B200',
    capability=100,
    cores=148,
    memory=191514411008,
    bandwidth=7672320000000,
    cache=132644864,
    clock=1.965,
  ),
}
GPU_CONFIG = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: {cores} fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: {bandwidth}
  l2_cache_size: {cache} clock_rate_ghz: {clock}
  device_memory_size: {memory} shared_memory_per_block_optin: 232448
  cuda_compute_capability {{
    major: {major} feature_extension: ACCELERATED_FEATURES
  }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 13 minor: 0 }}
device_description_str: "{kind}"
"""
# Tried on each platform, those that an op registers.
IMPLEMENTATIONS = {
  'tpu': ('pallas_tpu', 'xla', 'lax'),
  'gpu': ('pallas_gpu', 'cudnn', 'xla', 'lax'),
}


class Case(NamedTuple):
  """One program of the table.

  Attributes:
    name: op, sizes and pass.
    op: a folder of `psa_jax/kernels`.
    build: takes an implementation; gives a function and its arguments as
      (shape, dtype) pairs.
    also: implementations that are not the op's own but compared with it.
    only: the implementations to try; none named means all.
  """

  name: str
  op: str
  build: Callable[[str], tuple[Callable[..., Any], list[tuple]]]
  also: tuple[str, ...] = ()
  only: tuple[str, ...] = ()


def tried(case: Case, platform: str) -> Iterator[str]:
  """The implementations of this case for a platform."""
  try:
    op = importlib.import_module(f'psa_jax.kernels.{case.op}')
  except ModuleNotFoundError:
    return
  for name in IMPLEMENTATIONS[platform]:
    if case.only and name not in case.only:
      continue
    if name in op.IMPLEMENTATIONS or name in case.also:
      yield name


def with_gradients(call, inputs):
  """`call`, and its pullback in the first `inputs` arguments.

  The cotangents are the last two arguments: of the output and of the
  log-sum-exp.
  """

  def both(*args):
    import jax

    *args, d_out, d_lse = args
    fixed = args[inputs:]
    out, pullback = jax.vjp(lambda *xs: call(*xs, *fixed), *args[:inputs])
    return out, pullback((d_out, d_lse))

  return both


def attention(op, T, N, K, H, dtype, backward=False, **settings):
  """`build` of a case of attention over T tokens; see `Case`.

  Args:
    op: `dense` or `block_sparse`.
    T: queries and keys.
    N: query heads.
    K: kv heads.
    H: head width.
    dtype: of queries, keys and values.
    backward: whether to differentiate in them.
    **settings: `block_q`, `block_k` and `M`, the room of a list, of
      `block_sparse`, and its `softmax`.
  """

  def build(implementation):
    module = importlib.import_module(f'psa_jax.kernels.{op}')
    function = getattr(module, f'{op}_attention')
    fixed = {k: v for k, v in settings.items() if k != 'M'}
    call = functools.partial(function, implementation=implementation, **fixed)
    kv = (1, T, K, H), dtype
    args: list[tuple] = [((1, T, N, H), dtype), kv, kv]
    if settings:
      tiles = T // settings['block_q']
      args += [((1, K, tiles, settings['M']), 'int32')]
      args += [((1, K, tiles), 'int32')]
    if settings.get('softmax') == 'polynomial':
      exact, cubic = call, ((4,), 'float32')

      def call(q, k, v, coefficients, *lists):
        return exact(q, k, v, *lists, coefficients=coefficients)

      args.insert(3, cubic)
    if backward:
      call = with_gradients(call, len(args) - 2 if settings else 3)
      args += [((1, T, N, H), dtype), ((1, T, N), 'float32')]
    return call, args

  return build


def decode(B, S, N, K, H, dtype, block_k, M, heads_first=False):
  """`build` of one decoding step over S cached keys; see `decode_attention`."""

  def build(implementation):
    from psa_jax.kernels.decode import decode_attention

    def call(q, k, v, *lists):
      if heads_first:
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
      return decode_attention(
        q,
        k,
        v,
        *lists,
        block_k=block_k,
        heads_first=heads_first,
        implementation=implementation,
      )

    kv = (B, K, S, H) if heads_first else (B, S, K, H), dtype
    lists = [((B, K, M), 'int32'), ((B, K), 'int32'), ((B,), 'int32')]
    return call, [((B, 1, N, H), dtype), kv, kv, *lists]

  return build


def top_k(rows, n, k):
  """`build` of a selection in each row; `lax` is what JAX offers for it."""

  def build(implementation):
    if implementation == 'lax':
      from jax import lax

      return lambda x: lax.top_k(x, k), [((rows, n), 'float32')]
    module = importlib.import_module('psa_jax.kernels.topk')
    call = functools.partial(module.top_k, k=k, implementation=implementation)
    return call, [((rows, n), 'float32')]

  return build


def block_scores(T, N, K, H, block_q, block_k, M):
  """`build` of the lists of T tokens, from pooled keys; see `top_blocks`."""
  tiles, blocks = T // block_q, T // block_k

  def build(implementation):
    from psa_jax.kernels import block_scores as op

    def call(queries, total, size, *ranges):
      return op.top_blocks(
        queries,
        op.Pooled(total, size, None, None),
        op.Ranges(*ranges),
        width=M,
        implementation=implementation,
      )

    keys = ((1, K, blocks, H), 'float32'), ((1, blocks), 'int32')
    ranges = [((1, tiles), 'int32')] * len(op.Ranges._fields)
    return call, [((1, tiles, N, H), 'bfloat16'), *keys, *ranges]

  return build


LONG = dict(T=65536, N=16, K=4, H=128, dtype='bfloat16')
SHORT = dict(T=8192, N=16, K=4, H=64, dtype='float32')
LISTS = dict(block_q=128, block_k=64, M=32)
PASSES = {
  '64k bf16 forward': LONG,
  '64k bf16 forward+backward': LONG | {'backward': True},
  '8k f32 forward+backward': SHORT | {'backward': True},
}
CASES = [
  *(
    Case(f'{op} {name}', op, attention(op, **sizes, **lists))
    for op, lists in (('block_sparse', LISTS), ('dense', {}))
    for name, sizes in PASSES.items()
  ),
  *(
    Case(
      f'block_sparse 64k bf16 forward+backward, {softmax}',
      'block_sparse',
      attention(
        'block_sparse', **LONG, backward=True, **LISTS, softmax=softmax
      ),
      only=('pallas_tpu',),
    )
    for softmax in ('polynomial', 'sas')
  ),
  Case(
    'decode 8x64k bf16',
    'decode',
    decode(8, 65536, 16, 4, 128, 'bfloat16', 64, 32),
  ),
  Case(
    'decode 8x64k bf16 heads first',
    'decode',
    decode(8, 65536, 16, 4, 128, 'bfloat16', 64, 32, heads_first=True),
    only=('pallas_tpu',),
  ),
  Case(
    'decode 8x64k f32',
    'decode',
    decode(8, 65536, 16, 4, 128, 'float32', 64, 32),
  ),
  Case(
    'block_scores 64k bf16',
    'block_scores',
    block_scores(65536, 16, 4, 128, **LISTS),
  ),
  Case('topk 64x64k f32', 'topk', top_k(64, 65536, 1024), ('lax',)),
]
