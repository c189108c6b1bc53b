"""What the settings of attention may hold; see `validate.py`."""

from collections.abc import Callable, Iterator

from psa_jax.config import (
  APPROXIMATED,
  BUDGETED,
  Config,
  HybridConfig,
  ScheduleConfig,
  SoftmaxConfig,
  TopkConfig,
)

_SHARE = '(0, 1]'
_COUNT = '[1, inf)'
_OPTIONAL = '[0, inf)'
_POSITIVE = '(0, inf)'
_DEFAULT = ScheduleConfig()
_LONGEST_CASCADE = 2**21 - 1


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


# See `validate.RANGES`.
RANGES = {
  'model.attention.softmax.coefficients': '(-inf, inf)',
  'model.attention.softmax.clamp': _OPTIONAL,
  **_schedule_ranges('model.attention.softmax.mix', '[0, 1]'),
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
}


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


def _check_softmax(config: Config) -> Iterator[str]:
  attention, path = config.model.attention, 'config.model.attention.softmax'
  softmax = attention.softmax
  yield from _check_schedule(f'{path}.mix', softmax.mix)
  yield from _check_cubic(path, softmax.coefficients, softmax.mix)
  if softmax.kind != 'exact' and attention.name not in APPROXIMATED:
    yield (
      f'{path}.kind is {softmax.kind}, but attention {attention.name} does not '
      f'read it; it is for {" and ".join(APPROXIMATED)}, set it to exact'
    )
  default = SoftmaxConfig(softmax.kind)
  if softmax.kind != 'polynomial' and softmax != default:
    yield (
      f'{path}.coefficients, clamp and mix are read by kind=polynomial only, '
      f'but the kind is {softmax.kind}'
    )


def _check_cubic(path, coefficients, mix) -> Iterator[str]:
  if len(coefficients) != 4:
    yield (
      f'{path}.coefficients has {len(coefficients)} entries, but a cubic '
      'has four, a0 to a3; (0, 1, 0, 0) is the plain softmax'
    )
  if mix.kind == 'exponential' and not (mix.init and mix.final):
    yield (
      f'{path}.mix is exponential, which cannot begin or end at 0; set '
      f'{path}.mix.kind=linear'
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
  if cascade.importance == 'random' and model.kind == 'decoder_lm':
    yield (
      f'{path}.importance is random, but a decoder, whose caches are pruned by '
      'attention, cannot have this control; set it to attention'
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
  yield from _check_cubic(path, topk.coefficients, topk.mix)


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


RULES: tuple[Callable[[Config], Iterator[str]], ...] = (
  _check_schedules,
  _check_softmax,
  _check_topk,
  _check_hybrid,
  _check_dsa,
  _check_controller,
  _check_cascade,
  _check_list_width,
  _check_nsa,
)
