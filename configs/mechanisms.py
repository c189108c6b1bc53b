"""Real text at 8,192 tokens, by attention mechanism: a small byte-level model.

Every arm is dense at first and ends with about a tenth of the keys, where it
has a budget; model, text, steps and seed are the same. What came of it is in
experiments/mechanisms/README.md.

The argument is a key of `ARGS`:

  python launch.py --config=configs/mechanisms.py:psa
"""

from ml_collections import ConfigDict

KEEP = 0.1
STEPS = (160, 32)
SPARSE = {'kind': 'cubic', 'init': 1.0, 'begin': 100, 'length': 72}


def get_config(arg: str) -> ConfigDict:
  """The recipe named `arg`, a key of `ARGS`."""
  recipe = _base(ARGS[arg]())
  recipe['name'] = f'mechanisms_{arg}'
  if arg == 'cascade':
    recipe['model']['remat'] = 'full'
  return ConfigDict(recipe)


def dense() -> dict:
  """Every key; what the others are judged against.

  Command: python launch.py --config=configs/mechanisms.py:dense
  Cost: see experiments/mechanisms/README.md, as for all arms.
  Expected: likewise.
  """
  return {'name': 'dense'}


def window() -> dict:
  """A control: the budget of `psa`, all of it for the nearest blocks.

  Command: python launch.py --config=configs/mechanisms.py:window
  Cost: see experiments/mechanisms/README.md.
  Expected: likewise.
  """
  return _psa('recent')


def random() -> dict:
  """A control: the budget of `psa`, spent on any blocks.

  Command: python launch.py --config=configs/mechanisms.py:random
  Cost: see experiments/mechanisms/README.md.
  Expected: likewise.
  """
  return _psa('random')


def psa() -> dict:
  """Progressive sparse attention, blocks ranked by their mean key.

  Command: python launch.py --config=configs/mechanisms.py:psa
  Cost: see experiments/mechanisms/README.md.
  Expected: likewise.
  """
  return _psa('mean')


def psa_bounds() -> dict:
  """The same, blocks ranked by Quest's upper bound.

  Command: python launch.py --config=configs/mechanisms.py:psa_bounds
  Cost: see experiments/mechanisms/README.md.
  Expected: likewise.
  """
  return _psa('bounds')


def topk() -> dict:
  """The keys of largest score, for each query.

  Command: python launch.py --config=configs/mechanisms.py:topk
  Cost: see experiments/mechanisms/README.md.
  Expected: likewise.
  """
  return {'name': 'topk', 'topk': {'keep': SPARSE | {'final': KEEP}}}


def hybrid() -> dict:
  """A window, and as many blocks as the entropy asks for up to the budget.

  Command: python launch.py --config=configs/mechanisms.py:hybrid
  Cost: see experiments/mechanisms/README.md.
  Expected: likewise.
  """
  keep = SPARSE | {'final': KEEP}
  return {'name': 'hybrid', 'hybrid': _blocks() | {'keep': keep}}


def nsa() -> dict:
  """NSA: compressed, selected and window keys; 12 blocks for each token.

  Command: python launch.py --config=configs/mechanisms.py:nsa
  Cost: see experiments/mechanisms/README.md.
  Expected: likewise.
  """
  blocks = SPARSE | {'init': 256.0, 'final': 12.0}
  settings = {'select_block': 32, 'window': 256, 'tile': 32, 'blocks': blocks}
  return {'name': 'nsa', 'nsa': settings | {'compress_dim': 64, 'gate_dim': 32}}


def nsa_tile() -> dict:
  """NSA with one selection for 32 queries.

  Command: python launch.py --config=configs/mechanisms.py:nsa_tile
  Cost: see experiments/mechanisms/README.md.
  Expected: likewise.
  """
  return nsa() | {'name': 'nsa_tile'}


def dsa() -> dict:
  """A learned indexer ranks the blocks; it learns while all is dense.

  Command: python launch.py --config=configs/mechanisms.py:dsa
  Cost: see experiments/mechanisms/README.md.
  Expected: likewise.
  """
  settings = {'budget': 'ratio', 'keep': SPARSE | {'final': KEEP}, 'width': 16}
  return {'name': 'dsa', 'dsa': _blocks() | settings}


def sla() -> dict:
  """Linear attention: no keys are chosen, all are summed up.

  Command: python launch.py --config=configs/mechanisms.py:sla
  Cost: see experiments/mechanisms/README.md.
  Expected: likewise.
  """
  return {'name': 'sla', 'sla': {'positions': 8192}}


def cascade() -> dict:
  """Tokens leave: the second layer has half of them.

  Command: python launch.py --config=configs/mechanisms.py:cascade
  Cost: see experiments/mechanisms/README.md.
  Expected: likewise.
  """
  amount = SPARSE | {'init': 0.0, 'final': 1.0}
  return {'name': 'cascade', 'cascade': {'token_keep': 0.5, 'amount': amount}}


def _blocks() -> dict:
  """What mechanisms with block lists share."""
  return {'block_q': 64, 'block_k': 32, 'window': 256}


def _psa(scoring: str) -> dict:
  keep = SPARSE | {'final': KEEP}
  return {'name': 'psa', 'psa': _blocks() | {'scoring': scoring, 'keep': keep}}


def _base(attention: dict) -> dict:
  """What all arms share."""
  return {
    'task': 'language_modeling',
    'data': {'source': 'sotu', 'tokenizer': 'bytes'},
    'model': {
      'num_layers': 2,
      'd_model': 64,
      'num_heads': 2,
      'num_kv_heads': 1,
      'head_dim': 32,
      'mlp_dim': 192,
      # As in the runs that are written down; SLAB has 1e-6, the default.
      'norm': {'kind': 'rmsnorm', 'base_eps': 1e-5},
      'attention': attention,
    },
    'optim': {'learning_rate': 5e-3, 'warmup_steps': 20},
    'train': {
      'seq_len': (512, 8192),
      'batch_size': (16, 1),
      'steps': STEPS,
    },
    'eval': {'windows': 6},
    'checkpoint': {'every': 200},
    'log': {'every': 20},
  }


ARGS = {
  'dense': dense,
  'window': window,
  'random': random,
  'psa': psa,
  'psa_bounds': psa_bounds,
  'topk': topk,
  'hybrid': hybrid,
  'nsa': nsa,
  'nsa_tile': nsa_tile,
  'dsa': dsa,
  'sla': sla,
  'cascade': cascade,
}
