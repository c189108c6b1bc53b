"""CIFAR-10 from TFDS: a small DeiT, any norm, DeiT's augmentation.

The data is prepared once, where there is a network:

  python -m psa_jax.data.prepare --name=cifar10
  python launch.py --config=configs/vit_cifar10.py

64 patches of 4 x 4, 6 layers of 192 channels; RandAugment, crops out of a
padded picture, flips, mixup and CutMix in turn, label smoothing, drop path.
TFDS has no validation split: every twentieth training picture judges the run,
and `--config.eval.split=test` is the test set. The argument is a key of `ARGS`:
a norm, or another attention than dense under PRepBN.

Nobody has run this yet.
"""

from ml_collections import ConfigDict

EPOCHS, PICTURES, BATCH = 100, 47_500, 256
STEPS = EPOCHS * PICTURES // BATCH


def get_config(arg: str = '') -> ConfigDict:
  """The recipe named `arg`, a key of `ARGS`."""
  steps = 20 if arg == 'quick' else STEPS
  recipe = _base(steps)
  _lay(recipe['model'], ARGS[arg](steps))
  if arg == 'quick':
    recipe['eval']['windows'] = 500
  recipe['name'] = f'vit_cifar10_{arg}' if arg else 'vit_cifar10'
  return ConfigDict(recipe)


def prepbn(steps: int) -> dict:
  """LayerNorm that becomes a batch norm over 80 % of the steps.

  Command: python launch.py --config=configs/vit_cifar10.py
  Cost: not measured; for a GPU.
  Expected: not measured.
  """
  return {'norm': {'kind': 'prepbn', 'decay_steps': steps * 4 // 5}}


def quick(steps: int) -> dict:
  """A few steps: does it run?

  Command: python launch.py --config=configs/vit_cifar10.py:quick
  Cost: not measured; minutes on two cores.
  Expected: not measured.
  """
  return prepbn(steps)


def layernorm(steps: int) -> dict:
  """LayerNorm to the end; what PRepBN is judged against.

  Command: python launch.py --config=configs/vit_cifar10.py:layernorm
  Cost: that of the default.
  Expected: not measured.
  """
  del steps
  return {'norm': {'kind': 'layernorm'}}


def batchnorm(steps: int) -> dict:
  """Batch norm from the first step.

  Command: python launch.py --config=configs/vit_cifar10.py:batchnorm
  Cost: that of the default.
  Expected: not measured; PRepBN is for where this fails to train.
  """
  del steps
  return {'norm': {'kind': 'batchnorm'}}


def repbn(steps: int) -> dict:
  """Batch norm beside the identity, from the first step.

  Command: python launch.py --config=configs/vit_cifar10.py:repbn
  Cost: that of the default.
  Expected: not measured.
  """
  del steps
  return {'norm': {'kind': 'repbn'}}


def sla(steps: int) -> dict:
  """Simplified linear attention, as in SLAB.

  Command: python launch.py --config=configs/vit_cifar10.py:sla
  Cost: not measured.
  Expected: not measured.
  """
  return prepbn(steps) | {'attention': {'name': 'sla'}}


def topk(steps: int) -> dict:
  """The best half of the patches, from half of the steps on.

  Command: python launch.py --config=configs/vit_cifar10.py:topk
  Cost: not measured.
  Expected: not measured.
  """
  keep = {'init': 1.0, 'final': 0.5, **_ramp(steps)}
  return prepbn(steps) | {'attention': {'name': 'topk', 'topk': {'keep': keep}}}


def cascade(steps: int) -> dict:
  """Half of the patches leave on the way, from half of the steps on.

  Command: python launch.py --config=configs/vit_cifar10.py:cascade
  Cost: not measured.
  Expected: not measured.
  """
  amount = {'init': 0.0, 'final': 1.0, **_ramp(steps)}
  settings = {'token_keep': 0.5, 'amount': amount}
  return prepbn(steps) | {'attention': {'name': 'cascade', 'cascade': settings}}


ARGS = {
  '': prepbn,
  'quick': quick,
  'layernorm': layernorm,
  'batchnorm': batchnorm,
  'repbn': repbn,
  'sla': sla,
  'topk': topk,
  'cascade': cascade,
}


def _base(steps):
  return {
    'task': 'image_classification',
    'data': {
      'source': 'tfds:cifar10',
      'threads': 8,
      'augment': {
        'crop': 'pad',
        'flip': True,
        'ops': 2,
        'magnitude': 9.0,
        'mixup': 0.8,
        'cutmix': 1.0,
      },
    },
    'model': {
      'kind': 'vit',
      'num_layers': 6,
      'd_model': 192,
      'num_heads': 3,
      'num_kv_heads': 3,
      'mlp_dim': 768,
      'mlp': 'gelu',
      'biases': True,
      'drop_path': 0.1,
      'image': {'size': 32, 'channels': 3, 'patch': 4},
      'norm': {'base': 'layernorm', 'scale_init': 1.0, 'eta_init': 1.0},
    },
    'optim': {
      'learning_rate': 1e-3,
      'warmup_steps': steps // 20,
      'final_lr_ratio': 0.01,
      'weight_decay': 0.05,
      'b2': 0.999,
    },
    'train': {
      'steps': (steps,),
      'seq_len': (64,),
      'batch_size': (BATCH,),
      'label_smoothing': 0.1,
    },
    'eval': {'every': max(1, steps // 10), 'windows': 10_000, 'dense': False},
    'checkpoint': {'every': max(1, steps // 20)},
    'log': {'every': max(1, steps // 200)},
  }


def _ramp(steps):
  return {'kind': 'linear', 'begin': steps // 4, 'length': steps // 4}


def _lay(model, changes):
  for key, value in changes.items():
    model[key] = (
      model.get(key, {}) | value if isinstance(value, dict) else value
    )
