"""Recall of facts that lie far back, by attention mechanism.

A model of two layers learns a synthetic task: first on short rows, then on rows
of 128 tokens. Sparse arms read everything until the model has learnt to recall,
and end with `KEEP` of the keys, or what their own budget says. At the end the
accuracy is printed by distance, by depth and by number of needles.

The argument is a mechanism, a key of `ARGS`, perhaps with a task, a key of
`OPTIONS`, after a comma:

  python launch.py --config=configs/recall.py:psa
  python launch.py --config=configs/recall.py:dense,needle

A mechanism joins by a function below and a line in `ARGS`. What came of `mqar`
and `needle` is in experiments/mechanisms/README.md; the other tasks were not
trained to the end yet.
"""

from ml_collections import ConfigDict

KEEP = 0.25


def get_config(arg: str) -> ConfigDict:
  """The recipe named `arg`: a mechanism, perhaps a comma and a task."""
  mechanism, _, task = arg.partition(',')
  recipe = _base(OPTIONS[task or 'mqar'](), ARGS[mechanism]())
  recipe['data']['source'] = f'synthetic:{task or "mqar"}'
  recipe['name'] = f'recall_{arg.replace(",", "_")}'
  if mechanism == 'quick':
    recipe['train'] |= {'steps': (60, 20), 'batch_size': (32, 8)}
    recipe['eval'] = {'windows': 64}
  return ConfigDict(recipe)


def dense() -> dict:
  """Every key; what the others are judged against.

  Command: python launch.py --config=configs/recall.py:dense
  Cost: see experiments/mechanisms/README.md.
  Expected: likewise.
  """
  return {'name': 'dense'}


def window() -> dict:
  """A control: the budget of `psa`, all of it for the nearest blocks.

  Command: python launch.py --config=configs/recall.py:window
  Cost: see experiments/mechanisms/README.md.
  Expected: likewise.
  """
  return _psa('recent')


def random() -> dict:
  """A control: the budget of `psa`, spent on any blocks.

  Command: python launch.py --config=configs/recall.py:random
  Cost: see experiments/mechanisms/README.md.
  Expected: likewise.
  """
  return _psa('random')


def psa() -> dict:
  """Progressive sparse attention, blocks ranked by their mean key.

  Command: python launch.py --config=configs/recall.py:psa
  Cost: see experiments/mechanisms/README.md.
  Expected: likewise.
  """
  return _psa('mean')


def psa_bounds() -> dict:
  """The same, blocks ranked by Quest's upper bound.

  Command: python launch.py --config=configs/recall.py:psa_bounds
  Cost: see experiments/mechanisms/README.md.
  Expected: likewise.
  """
  return _psa('bounds')


def topk() -> dict:
  """The keys of largest score, for each query.

  Command: python launch.py --config=configs/recall.py:topk
  Cost: see experiments/mechanisms/README.md.
  Expected: likewise.
  """
  return {'name': 'topk', 'topk': {'keep': _schedule(1.0, KEEP)}}


def hybrid() -> dict:
  """A window, and as many blocks as the entropy asks for up to the budget.

  Command: python launch.py --config=configs/recall.py:hybrid
  Cost: see experiments/mechanisms/README.md.
  Expected: likewise.
  """
  return {
    'name': 'hybrid',
    'hybrid': _blocks() | {'keep': _schedule(1.0, KEEP), 'min_blocks': 1},
  }


def nsa() -> dict:
  """NSA: compressed, selected and window keys; 4 blocks of 8 for each token.

  Command: python launch.py --config=configs/recall.py:nsa
  Cost: see experiments/mechanisms/README.md.
  Expected: likewise.
  """
  return {
    'name': 'nsa',
    'nsa': {
      'compress_block': 8,
      'stride': 4,
      'select_block': 8,
      'window': 8,
      'tile': 8,
      'blocks': _schedule(16.0, 4.0),
      'compress_dim': 64,
      'gate_dim': 32,
    },
  }


def nsa_tile() -> dict:
  """NSA with one selection for 8 queries.

  Command: python launch.py --config=configs/recall.py:nsa_tile
  Cost: see experiments/mechanisms/README.md.
  Expected: likewise.
  """
  return nsa() | {'name': 'nsa_tile'}


def dsa() -> dict:
  """A learned indexer ranks the blocks; it learns while all is dense.

  Command: python launch.py --config=configs/recall.py:dsa
  Cost: see experiments/mechanisms/README.md.
  Expected: likewise.
  """
  settings = {'budget': 'ratio', 'keep': _schedule(1.0, KEEP), 'width': 16}
  return {'name': 'dsa', 'dsa': _blocks() | settings}


def sla() -> dict:
  """Linear attention: no keys are chosen, all are summed up.

  Command: python launch.py --config=configs/recall.py:sla
  Cost: see experiments/mechanisms/README.md.
  Expected: likewise.
  """
  return {'name': 'sla', 'sla': {'positions': 128}}


def cascade() -> dict:
  """Tokens leave: the second layer has half of them.

  Command: python launch.py --config=configs/recall.py:cascade
  Cost: see experiments/mechanisms/README.md.
  Expected: likewise.
  """
  settings = {'token_keep': 0.5, 'amount': _schedule(0.0, 1.0)}
  return {'name': 'cascade', 'cascade': settings}


def quick() -> dict:
  """The code path of `psa` in little: what to run after a change.

  Command: python launch.py --config=configs/recall.py:quick
  Cost: not measured.
  Expected: nothing is learnt in so few steps.
  """
  attention = _psa('mean')
  attention['psa']['keep'] |= {'begin': 20, 'length': 40}
  return attention


def mqar() -> dict:
  """Key-value pairs, each key asked for once (multi-query recall)."""
  return {'vocab_size': 64, 'needles': (2, 4, 8)}


def needle() -> dict:
  """Needles of three tokens in noise, all asked for at the end."""
  return {'vocab_size': 64, 'needles': (1, 2), 'value_len': 1}


def selective_copy() -> dict:
  """Tokens among blanks, to be written down in order."""
  return {'vocab_size': 64, 'needles': (2, 4, 8)}


def variable_tracking() -> dict:
  """Chains of three assignments, one of them to be followed."""
  return {'vocab_size': 64, 'needles': (1, 2), 'hops': 2}


def _blocks() -> dict:
  """What mechanisms with block lists share: a list for every query."""
  # The pairs of `mqar` open the row; a sink would hand them to the controls.
  return {'block_q': 1, 'block_k': 4, 'window': 8, 'sink_blocks': 0}


def _psa(scoring: str) -> dict:
  settings = {'scoring': scoring, 'keep': _schedule(1.0, KEEP)}
  return {'name': 'psa', 'psa': _blocks() | settings}


def _schedule(init: float, final: float) -> dict:
  begin, length = SPARSE
  return {
    'kind': 'cubic',
    'init': init,
    'final': final,
    'begin': begin,
    'length': length,
  }


def _kernels(attention: dict) -> str:
  lists = attention['name'] in ('psa', 'hybrid', 'dsa', 'nsa', 'nsa_tile')
  return 'reference' if lists else 'auto'


def _base(synthetic: dict, attention: dict) -> dict:
  """What all arms share."""
  return {
    'task': 'recall',
    'data': {'synthetic': synthetic},
    'model': {
      'remat': 'full' if attention['name'] == 'cascade' else 'none',
      'num_layers': 2,
      'd_model': 64,
      'num_heads': 2,
      'num_kv_heads': 2,
      'mlp_dim': 128,
      # As in the runs that are written down; SLAB has 1e-6, the default.
      'norm': {'base_eps': 1e-5},
      # Rows are short: masks are faster here than lists for every query.
      'attention': attention | {'implementation': _kernels(attention)},
    },
    'optim': {'learning_rate': 5e-3, 'warmup_steps': 50},
    'train': {
      'seq_len': (32, 128),
      'batch_size': (64, 16),
      'steps': STEPS,
    },
    'eval': {'windows': 512},
    'checkpoint': {'every': 500},
    'log': {'every': 50},
  }


STEPS = (1000, 400)
SPARSE = (950, 250)

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
  'quick': quick,
}
OPTIONS = {
  'mqar': mqar,
  'needle': needle,
  'selective_copy': selective_copy,
  'variable_tracking': variable_tracking,
}
