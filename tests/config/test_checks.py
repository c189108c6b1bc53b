"""Impossible values: each refused in one line that names its key."""

import typing

import pytest

from psa_jax.config import (
  Config,
  ConfigError,
  apply_overrides,
  flatten,
  leaves,
  to_dict,
)

PSA = 'model.attention.psa.'
ON_DEMAND = 'model.attention.on_demand.'
TOPK = 'model.attention.topk.'
HYBRID = 'model.attention.hybrid.'
DSA = 'model.attention.dsa.'
CASCADE = 'model.attention.cascade.'
NUMBERS = [
  leaf.path
  for leaf in leaves().values()
  if {leaf.type, *typing.get_args(leaf.type)} & {int, float}
]
STAGES = {'train.steps': (40, 1), 'train.seq_len': (8, 16)}


def problem(changes):
  """What is wrong with the defaults once `changes` are laid on them."""
  with pytest.raises(ConfigError) as caught:
    apply_overrides(Config(), changes.items())
  assert '\n' not in str(caught.value)
  return str(caught.value)


def fine(changes):
  """The changes are taken as they are."""
  config = apply_overrides(Config(), changes.items())
  values = flatten(to_dict(config))
  for path, value in changes.items():
    expected = list(value) if isinstance(value, tuple) else value
    assert values[path] == expected, path


def test_the_defaults_are_valid():
  fine({})


def test_every_number_of_the_tree_has_a_range():
  assert NUMBERS
  for leaf in leaves().values():
    assert (leaf.interval is not None) == (leaf.path in NUMBERS), leaf.path


@pytest.mark.parametrize('path', NUMBERS)
def test_no_number_is_nan_or_infinite_or_beyond_int32(path):
  kind = leaves()[path].type
  is_tuple = typing.get_origin(kind) is tuple
  is_int = int in (kind, *typing.get_args(kind))
  bad = [2**31] if is_int else [float('nan'), float('inf'), -float('inf')]
  for value in bad:
    message = problem({path: (value,) if is_tuple else value})
    assert message.startswith(f'config.{path} is ')


@pytest.mark.parametrize(
  ('path', 'last', 'first'),
  [
    # The last value refused and the first one allowed, on each side.
    ('model.num_layers', 0, 1),
    ('model.d_model', 0, 4),
    ('model.num_kv_heads', 0, 1),
    ('model.num_heads', -1, 1),
    ('model.mlp_dim', 0, 1),
    ('model.head_dim', -2, 0),
    ('model.vocab_size', -1, 0),
    ('model.rope_theta', 1.0, 1.5),
    ('model.norm.momentum', -0.1, 0.0),
    ('model.norm.momentum', 1.0, 0.999),
    ('model.norm.base_eps', 0.0, 1e-12),
    ('model.norm.bn_eps', 0.0, 1e-12),
    ('model.norm.decay_steps', -1, 0),
    (PSA + 'block_q', 0, 1),
    (PSA + 'block_k', 0, 1),
    (PSA + 'window', 0, 1),
    (PSA + 'sink_blocks', -1, 0),
    (PSA + 'max_blocks', -1, 0),
    (PSA + 'eval_keep', 1.01, 1.0),
    (PSA + 'keep.init', 0.0, 1e-3),
    (PSA + 'keep.final', 1.01, 1.0),
    (PSA + 'mass.init', 0.0, 0.9),
    (CASCADE + 'token_keep', 0.0, 0.1),
    (CASCADE + 'head_keep', 1.01, 1.0),
    (CASCADE + 'value_keep', 0.0, 0.01),
    (CASCADE + 'token_start', 1.01, 1.0),
    (CASCADE + 'head_start', -0.1, 0.0),
    (CASCADE + 'slope', 1.0, 0.0),
    (CASCADE + 'amount.init', 1.01, 0.0),
    (CASCADE + 'amount.values', (-0.1,), ()),
    (CASCADE + 'rungs', 0, 1),
    (CASCADE + 'documents', 0, 1),
    (CASCADE + 'window', 0, 1),
    (CASCADE + 'credit', 0, 1),
    (PSA + 'keep.begin', -1, 0),
    (PSA + 'keep.length', -1, 0),
    (ON_DEMAND + 'high_bits', 1, 2),
    (ON_DEMAND + 'high_bits', 13, 12),
    (ON_DEMAND + 'low_bits', 0, 1),
    (ON_DEMAND + 'low_bits', 9, 8),
    (ON_DEMAND + 'query_bits', 1, 2),
    (ON_DEMAND + 'query_bits', 13, 12),
    (ON_DEMAND + 'threshold', -0.1, 0.0),
    ('model.quant.levels', (17,), (16, 2)),
    ('model.quant.levels', (8, 1), (8,)),
    ('model.quant.warmup_steps', -1, 0),
    ('model.quant.quantization_interval', 0, 1),
    ('model.quant.eval_bits', 1, 0),
    ('model.quant.eval_bits', 17, 2),
    (TOPK + 'keep.init', 0.0, 1e-3),
    (TOPK + 'mix.init', 1.01, 0.0),
    (TOPK + 'clamp', -1.0, 0.0),
    (TOPK + 'sparsify_q', 0.0, 0.5),
    (TOPK + 'sparsify_k', 1.5, 1.0),
    (TOPK + 'eval_keep', 1.01, 1.0),
    (HYBRID + 'block_q', 0, 1),
    (HYBRID + 'block_k', 0, 1),
    (HYBRID + 'window', 0, 1),
    (HYBRID + 'sink_blocks', -1, 0),
    (HYBRID + 'coefficient', 0.0, 0.1),
    (HYBRID + 'min_blocks', -1, 0),
    (HYBRID + 'max_blocks', -1, 0),
    (HYBRID + 'eval_keep', -0.1, 0.0),
    (HYBRID + 'keep.final', 1.01, 1.0),
    (DSA + 'heads', 0, 1),
    (DSA + 'width', 0, 2),
    (DSA + 'block_k', 0, 1),
    (DSA + 'top_k.init', 0.5, 1.0),
    (DSA + 'keep.init', 0.0, 0.1),
    (DSA + 'warmup_steps', -1, 0),
    (DSA + 'eval_budget', -1.0, 0.0),
    ('model.attention.sla.positions', 0, 1),
    ('train.controller.target', 1.0, 0.99),
    ('train.controller.tolerance', 0.0, 0.01),
    ('train.controller.begin', -1, 0),
    ('train.controller.every', 0, 1),
    ('train.controller.floor', 0.0, 1.0),
    ('train.controller.forget', 1.1, 1.0),
    ('optim.learning_rate', 0.0, 1e-9),
    ('optim.final_lr_ratio', 1.1, 1.0),
    ('optim.b1', 1.0, 0.0),
    ('optim.b2', 1.0, 0.999),
    ('optim.clip_norm', -1.0, 0.0),
    ('optim.accumulate', 0, 8),
    ('train.steps', (-5,), (21,)),
    ('train.seq_len', (0,), (1,)),
    ('train.batch_size', (-8,), (1,)),
    ('train.loss_chunk', 0, 1),
    ('eval.windows', 0, 1),
    ('checkpoint.keep', 0, 1),
    ('mesh.data', 0, 1),
    ('mesh.fsdp', -2, 2),
    ('log.every', 0, 1),
    ('seed', -1, 0),
  ],
)
def test_boundaries(path, last, first):
  message = problem({path: last})
  assert message.startswith(f'config.{path} is {last!r}, but ')
  fine({path: first})


@pytest.mark.parametrize(
  ('path', 'value', 'text'),
  [
    ('train.steps', (0,), 'each entry must be at least 1'),
    ('optim.eps', 0.0, 'it must be above 0'),
    ('optim.eps', float('inf'), 'it must be finite and above 0'),
    (PSA + 'keep.init', 2.0, 'it must be in (0, 1]'),
    ('mesh.data', 0, 'it must be -1 or at least 1'),
    ('seed', 2**40, 'it must be below 2^31'),
  ],
)
def test_a_range_is_said_in_words(path, value, text):
  assert problem({path: value}) == f'config.{path} is {value!r}, but {text}'


@pytest.mark.parametrize(
  ('changes', 'text'),
  [
    # As float32 each of these is the end of its range, or nothing.
    ({'optim.eps': 1e-60}, 'float32 has 0 for 1e-60'),
    ({'model.norm.momentum': 1 - 1e-12}, 'float32 has 1 for 0.999'),
    ({'optim.b2': 1 - 1e-12}, 'must be in [0, 1)'),
    ({'model.rope_theta': 1 + 1e-12}, 'must be above 1'),
    ({PSA + 'keep.init': 1e-60}, 'float32 has 0 for 1e-60'),
    ({'optim.learning_rate': 1e60}, 'within the range of float32'),
    # Sums and products that int32 cannot hold.
    (
      {'model.norm.warmup_steps': 2**30, 'model.norm.decay_steps': 2**30},
      'end at step 2147483648',
    ),
    ({'train.seq_len': (2**20,), 'train.batch_size': (2**11,)}, '2147483648'),
    ({PSA + 'window': 2**31 - 1}, 'positions are below 2^31'),
    ({HYBRID + 'sink_blocks': 2**31 - 1}, 'positions are below 2^31'),
    ({DSA + 'window': 2**31 - 1}, 'positions are below 2^31'),
    ({DSA + 'top_k.init': 3e9}, 'in [1, 1073741824]'),
    ({DSA + 'eval_budget': 3e9}, 'in [0, 1073741824]'),
    ({'model.attention.nsa.blocks.init': 3e9}, 'in [1, 1073741824]'),
    ({CASCADE + 'credit': 2**31 - 1}, 'in [1, 1073741824]'),
  ],
)
def test_what_a_device_cannot_hold_is_refused(changes, text):
  assert text in problem(changes)


def test_settings_that_would_not_be_read_are_refused():
  message = problem({PSA + 'keep.final': 0.1})
  assert 'not read by kind=constant' in message and 'keep.kind' in message
  fine({PSA + 'keep.final': 0.1, PSA + 'keep.kind': 'linear'})
  mass = {PSA + 'budget': 'mass', 'model.attention.name': 'psa'}
  message = problem(mass)
  assert 'constant 1, which keeps every block' in message
  fine(mass | {PSA + 'mass.init': 0.9})


def test_an_indexer():
  assert 'need an even one' in problem({DSA + 'width': 7})
  ratio = {DSA + 'budget': 'ratio'}
  message = problem(ratio | {DSA + 'eval_budget': 2.0})
  assert 'with budget=ratio it must be in [0, 1]' in message
  fine(ratio | {DSA + 'eval_budget': 0.5})
  fine({DSA + 'eval_budget': 2.0, DSA + 'top_k.init': 64.0})
  message = problem({DSA + 'top_k.final': 9.0})
  assert 'top_k.final, begin and length are not read' in message


def test_a_controller_begins_when_there_is_something_to_control():
  name = {'model.attention.name': 'dsa', DSA + 'budget': 'ratio'}
  found = name | {'train.controller.kind': 'mass', DSA + 'warmup_steps': 9}
  message = problem(found | {'train.controller.begin': 8})
  assert 'begin is 8, but attention is dense for the 9 steps' in message
  fine(found | {'train.controller.begin': 9})


@pytest.mark.parametrize(('path', 'forced'), [(PSA, 12), (HYBRID, 11)])
def test_a_block_list_holds_sink_and_window(path, forced):
  """By default 1 block of sink, 8 of window and 2 of the tile, or parts."""
  name = {'model.attention.name': path.split('.')[-2]}
  long = name | {'train.seq_len': (4096,)}
  message = problem(long | {path + 'max_blocks': forced - 1})
  words = f'is {forced - 1}, but sink and window take up to {forced} blocks'
  assert f'{path}max_blocks {words}' in message
  fine(long | {path + 'max_blocks': forced})
  fine(name | {'train.seq_len': (256,), path + 'max_blocks': 4})


@pytest.mark.parametrize('path', [TOPK, HYBRID])
def test_schedules_that_fall_to_a_quarter_by_default(path):
  """A length alone makes a ramp; constant takes any value."""
  fine({path + 'keep.length': 100})
  fine({path + 'keep.kind': 'constant', path + 'keep.init': 0.5})
  message = problem({path + 'keep.kind': 'constant', path + 'keep.final': 0.1})
  assert 'not read by kind=constant' in message


def test_a_cubic_has_four_coefficients():
  message = problem({TOPK + 'coefficients': (1.0, 0.0)})
  assert 'coefficients has 2 entries' in message and 'a0 to a3' in message
  fine({TOPK + 'coefficients': (0.0, -1.0, 0.5, 0.1)})


def test_an_exponential_mix_cannot_start_at_nothing():
  changes = {TOPK + 'mix.kind': 'exponential', TOPK + 'mix.length': 5}
  assert 'mix.kind=linear' in problem(changes | {TOPK + 'mix.init': 0.0})
  fine(changes | {TOPK + 'mix.init': 1e-3})


def test_random_importance_is_no_control_of_a_decoder():
  name = {'model.attention.name': 'cascade', CASCADE + 'importance': 'random'}
  assert 'a decoder, whose caches' in problem(name)
  fine(name | {'model.kind': 'encoder', 'data.source': 'verse_genre'})


def test_cascade_pruning_prunes_something():
  name = {'model.attention.name': 'cascade'}
  fine(name)
  message = problem(name | {CASCADE + 'token_keep': 1.0})
  assert 'which prunes nothing' in message
  fine(name | {CASCADE + 'token_keep': 1.0, CASCADE + 'value_keep': 0.5})
  fine({CASCADE + 'token_keep': 1.0})
  message = problem(name | {'train.seq_len': (2**21,)})
  assert 'counts up to 2097151 tokens a row' in message
  message = problem({CASCADE + 'amount.final': 0.5})
  assert 'amount.final, begin and length are not read' in message


def test_all_problems_are_named_at_once():
  message = problem({'log.every': 0, 'checkpoint.keep': 0})
  assert message.count('; ') == 1
  assert 'config.log.every' in message
  assert 'config.checkpoint.keep' in message


def test_heads():
  message = problem({'model.num_heads': 3, 'model.num_kv_heads': 2})
  assert 'config.model.num_heads is 3' in message
  assert 'config.model.num_kv_heads, which is 2' in message
  message = problem({'model.d_model': 100, 'model.num_heads': 8})
  assert 'config.model.d_model is 100, not a multiple of' in message
  assert 'set config.model.head_dim' in message
  fine({'model.d_model': 100, 'model.num_heads': 8, 'model.head_dim': 16})


def test_rope_needs_an_even_head():
  assert 'is 15, but RoPE' in problem({'model.head_dim': 15})
  # 126 / 2 = 63: the derived dimension counts too.
  assert 'is 63, but RoPE' in problem({'model.d_model': 126})


def test_stages_of_different_lengths():
  message = problem({**STAGES, 'train.batch_size': (2,)})
  assert 'have 2, 2 and 1' in message
  fine({**STAGES, 'train.batch_size': (2, 1)})
  empty = dict.fromkeys((*STAGES, 'train.batch_size'), ())
  assert 'have 0, 0 and 0' in problem(empty)


def test_every_batch_is_a_multiple_of_accumulate():
  stages = {**STAGES, 'train.batch_size': (8, 6)}
  message = problem({**stages, 'optim.accumulate': 4})
  assert 'config.train.batch_size is (8, 6)' in message
  assert 'config.optim.accumulate, which is 4' in message
  fine({**stages, 'optim.accumulate': 2})


def schedule(**changes):
  return {f'{PSA}keep.{key}': value for key, value in changes.items()}


@pytest.mark.parametrize(
  ('changes', 'text'),
  [
    ({'boundaries': (4,), 'values': (1.0,)}, 'values has 1 entries'),
    ({'values': ()}, 'values has 0 entries'),
    ({'boundaries': (4, 4), 'values': (1.0, 0.5, 0.1)}, 'must rise strictly'),
    ({'boundaries': (9, 4), 'values': (1.0, 0.5, 0.1)}, 'must rise strictly'),
    ({'boundaries': (0,), 'values': (1.0, 0.5)}, 'must be at least 1'),
    ({'boundaries': (4,), 'values': (1.0, 1.5)}, 'must be in (0, 1]'),
  ],
)
def test_piecewise_schedules(changes, text):
  message = problem(schedule(kind='piecewise', **changes))
  assert f'config.{PSA}keep' in message
  assert text in message


def test_only_piecewise_reads_boundaries():
  steps = {'boundaries': (4, 9), 'values': (1.0, 0.5, 0.1)}
  fine(schedule(kind='piecewise', **steps))
  fine(schedule(kind='piecewise', values=(0.5,)))
  assert 'kind=piecewise only' in problem(schedule(kind='linear', **steps))


@pytest.mark.parametrize('levels', [(), (8, 8), (4, 6), (16, 4, 5)])
def test_bits_fall(levels):
  message = problem({'model.quant.levels': levels})
  assert message.startswith(f'config.model.quant.levels is {levels}, but ')
  assert 'fall strictly' in message
  fine({'model.quant.levels': (16, 12, 3)})


def test_an_approximate_softmax():
  path = 'model.attention.softmax.'
  psa = {'model.attention.name': 'psa'}
  assert 'dense does not read it' in problem({path + 'kind': 'sas'})
  fine(psa | {path + 'kind': 'sas'})
  message = problem(psa | {path + 'kind': 'sas', path + 'clamp': 2.0})
  assert 'are read by kind=polynomial only' in message
  cubic = psa | {path + 'kind': 'polynomial'}
  message = problem(cubic | {path + 'coefficients': (0.0, 1.0)})
  assert 'coefficients has 2 entries, but a cubic has four' in message
  fine(cubic | {path + 'coefficients': (0.0, 1.0, 0.1, 0.0)})


def test_pruned_layers_are_not_quantised():
  cascade = {'model.attention.name': 'cascade'}
  message = problem(cascade | {'model.quant.enabled': True})
  assert 'quant.enabled is on, but cascade' in message
  fine({'model.quant.enabled': True})


def test_the_last_level_begins_below_int32():
  long = {'model.quant.quantization_interval': 2**29}
  assert 'below 2^31' in problem(long)
  fine(long | {'model.quant.levels': (8, 4, 2)})


def test_the_cosine_ends_after_the_warm_up():
  message = problem({'optim.decay_steps': 20, 'optim.warmup_steps': 20})
  assert 'config.optim.warmup_steps is 20' in message
  assert 'below config.optim.decay_steps, which is 20' in message
  fine({'optim.decay_steps': 21, 'optim.warmup_steps': 20})
  # Without an end of its own the cosine ends with the run.
  message = problem({'train.steps': (20,), 'optim.warmup_steps': 20})
  assert 'below the sum of config.train.steps, which is 20' in message
  fine({'train.steps': (21,), 'optim.warmup_steps': 20})
  fine({'train.steps': (2,), 'optim.warmup_steps': 0})


def test_one_axis_of_the_mesh_takes_what_is_left():
  assert 'only one may be -1' in problem({'mesh.fsdp': -1})
  fine({'mesh.fsdp': -1, 'mesh.data': 2})


@pytest.mark.parametrize(
  ('path', 'bad', 'good'),
  [
    ('data.tokenizer', ('byte', 'bpe', 'bpe:', 'bpe:256'), 'bpe:257'),
    ('data.tokenizer', ('bpe:-5', 'bpe:1e4', 'bytes:8'), 'bytes'),
    ('data.text_key', ('',), 'book_text'),
    ('name', ('', '  '), 'run'),
  ],
)
def test_text(path, bad, good):
  for value in bad:
    message = problem({path: value})
    assert message.startswith(f'config.{path} is ')
  fine({path: good})


NSA = 'model.attention.nsa.'


@pytest.mark.parametrize(
  ('changes', 'says'),
  [
    ({'stride': 5}, ['compress_block is 32', 'select_block is 64']),
    ({'compress_block': 128}, ['must be at most', 'select_block, which is 64']),
    ({'tile': 48}, ['tile is 48', 'must divide']),
    ({'blocks.init': 2.0}, ['goes down to 2', 'are 3 together']),
    ({'blocks.kind': 'linear'}, ['goes down to 1', 'are 3 together']),
    ({'eval_blocks': 2}, ['goes down to 2']),
    ({'local_blocks': 20}, ['are 21 together']),
    ({'blocks.kind': 'piecewise'}, ['values has 0 entries']),
  ],
)
def test_nsa_blocks_that_do_not_fit(changes, says):
  message = problem({NSA + key: value for key, value in changes.items()})
  assert all(text in message for text in says)


def test_nsa_settings_that_fit():
  fine({NSA + 'compress_block': 16, NSA + 'stride': 16, NSA + 'tile': 1})
  fine({NSA + 'blocks.kind': 'linear', NSA + 'blocks.final': 3.0})
