"""Recall."""

from ml_collections import ConfigDict


def get_config(arg: str = 'dense') -> ConfigDict:
  name, _, task = arg.partition(',')
  task = task or 'mqar'
  return ConfigDict(
    {
      'name': 'recall',
      'data': {
        'source': f'synthetic:{task}',
        'synthetic': {'needles': (4, 8, 16), 'vocab_size': 256},
      },
      'model': {
        'num_layers': 2,
        'd_model': 64,
        'num_heads': 2,
        'num_kv_heads': 2,
        'mlp_dim': 128,
        'attention': {'name': 'dense'},
      },
      'optim': {'learning_rate': 3e-3, 'warmup_steps': 50, 'weight_decay': 0.1},
      'train': {
        'seq_len': (64, 256),
        'batch_size': (128, 32),
        'steps': (400, 200),
      },
      'eval': {'windows': 256},
      'checkpoint': {'every': 0},
      'log': {'every': 25, 'tensorboard': False},
    }
  )
