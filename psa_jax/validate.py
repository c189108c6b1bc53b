"""What a configuration may hold: one range for every number, and the rest.

`validate` looks at values only. What depends on the machine (devices of the
mesh), on the data (vocabulary, document lengths) or on files is checked where
it is known.
"""

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

from psa_jax import validate_attention
from psa_jax.config import Config, ConfigError

_SHARE = '(0, 1]'
_COUNT = '[1, inf)'
_OPTIONAL = '[0, inf)'
_POSITIVE = '(0, inf)'
_DEVICES = '-1 or [1, inf)'

# Intervals as in mathematics; `inf` itself and NaN are never allowed. For a
# tuple the range is that of each entry. Every number of the tree is here; whole
# numbers end below 2^31, because steps and sizes are int32 on the device.
RANGES = {
  'seed': _OPTIONAL,
  'data.shift': _OPTIONAL,
  'data.augment.ops': _OPTIONAL,
  'data.augment.magnitude': '[0, 10]',
  'data.augment.mixup': '[0, inf)',
  'data.augment.cutmix': '[0, inf)',
  'data.word_dropout': '[0, 1)',
  'data.threads': '[0, 256]',
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
  'model.dropout': '[0, 1)',
  'model.drop_path': '[0, 1)',
  'model.image.size': _COUNT,
  'model.image.channels': _COUNT,
  'model.image.patch': _COUNT,
  'model.rope_theta': '(1, inf)',
  'model.norm.eps': _POSITIVE,
  'model.norm.momentum': '[0, 1)',
  'model.norm.warmup_steps': _OPTIONAL,
  'model.norm.decay_steps': _OPTIONAL,
  'model.norm.scale_init': '(-inf, inf)',
  'model.norm.eta_init': '(-inf, inf)',
  'model.quant.levels': '[2, 16]',
  'model.quant.warmup_steps': _OPTIONAL,
  'model.quant.quantization_interval': _COUNT,
  'model.quant.eval_bits': '0 or [2, 16]',
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
  'train.label_smoothing': '[0, 1)',
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
  'eval.reestimate': _OPTIONAL,
  'eval.beam': _COUNT,
  'eval.length_penalty': '[0, inf)',
  'checkpoint.every': _OPTIONAL,
  'checkpoint.keep': _COUNT,
  'mesh.data': _DEVICES,
  'mesh.fsdp': _DEVICES,
  'mesh.tensor': _DEVICES,
  'log.every': _COUNT,
  **validate_attention.RANGES,
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
  tokenizer = config.data.tokenizer
  if not config.data.text_key:
    yield 'config.data.text_key is empty'
  kind, _, size = tokenizer.partition(':')
  bpe = kind == 'bpe' and size.isdecimal() and int(size) >= _MIN_BPE
  if tokenizer != 'bytes' and not bpe:
    yield (
      f'config.data.tokenizer is {tokenizer!r}, but it must be bytes or '
      f'bpe:<vocabulary size of at least {_MIN_BPE}>'
    )


def _check_encoder_decoder(config: Config) -> Iterator[str]:
  """What an encoder_decoder does not have."""
  name = config.model.attention.name
  if config.model.kind != 'encoder_decoder':
    return
  if name not in ('dense', 'topk'):
    yield (
      f'config.model.attention.name is {name}, but an encoder_decoder takes '
      'dense or topk'
    )
  if config.model.quant.enabled:
    yield 'config.model.quant.enabled is on, but an encoder_decoder has none'


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


def _check_quant(config: Config) -> Iterator[str]:
  quant = config.model.quant
  levels = quant.levels
  falls = all(a > b for a, b in zip(levels, levels[1:], strict=False))
  if not levels or not falls:
    yield (
      f'config.model.quant.levels is {levels}, but it must have an entry and '
      'fall strictly'
    )
  if quant.enabled and config.model.attention.name == 'cascade':
    yield (
      'config.model.quant.enabled is on, but cascade attention does not '
      'quantise what it has pruned; turn one of them off'
    )
  last = quant.warmup_steps + len(levels) * quant.quantization_interval
  if last >= 2**31:
    yield (
      'config.model.quant.warmup_steps and quantization_interval end at step '
      f'{last}, but steps are below 2^31'
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
  _check_encoder_decoder,
  _check_heads,
  *validate_attention.RULES,
  _check_quant,
  _check_optim,
  _check_stages,
  _check_mesh,
)
