"""Seconds of a forward pass: LayerNorm against a folded PRepBN.

Both have the recipe's sizes and one program each, compiled ahead; weights are
initial ones, whose values make no difference to the time. Calls alternate.
"""

import dataclasses
import statistics
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.bench import timing
from experiments.bench.grid import Run
from experiments.bench.rows import Row
from experiments.slab.grid import configure
from psa_jax import models
from psa_jax.attention.context import AttentionContext
from psa_jax.config import ImageConfig, ModelConfig
from psa_jax.models.folding import fold

BATCHES = (1, 128)
# Sizes of DeiT-T beside the recipe's own; 196 tokens, not 197.
DEIT = {'num_layers': 12, 'd_model': 192, 'num_heads': 3, 'num_kv_heads': 3}
ROUNDS = 31


def measure() -> Iterator[Row]:
  """A row for each size and batch."""
  plain, prepbn = (
    configure(Run('', arm, 0)).model for arm in ('layernorm', 'prepbn_80')
  )
  deit = {**DEIT, 'mlp_dim': 768, 'image': ImageConfig(224, 3, 16)}
  for size, changes in (('recipe', {}), ('DeiT-T', deit)):
    pair = [dataclasses.replace(x, **changes) for x in (plain, prepbn)]
    for batch in BATCHES:
      if size == 'DeiT-T' and batch > 1:
        batch = 8  # of so many pictures a call takes a second
      yield {'what': 'latency', 'size': size, 'batch': batch} | compare(
        *pair, batch=batch
      )


def compare(plain: ModelConfig, prepbn: ModelConfig, *, batch: int) -> Row:
  """Medians of both in seconds, and of the ratio within a round."""
  models = {'layernorm': plain, 'folded': folded(prepbn)}
  timings = timing.interleave(
    {
      (name, 'forward'): timing.timed(*program(model, batch))
      for name, model in models.items()
    },
    repeats=ROUNDS,
  )
  seconds = [timings[name, 'forward'].seconds for name in models]
  ratios = [a / b for a, b in zip(*seconds, strict=True)]
  low, _, high = statistics.quantiles(ratios, n=4)
  medians = zip(models, map(statistics.median, seconds), strict=True)
  return {
    **dict(medians),
    'ratio': statistics.median(ratios),
    'quartiles': [low, high],
  }


def folded(config: ModelConfig):
  """Structure and arrays of a folded model."""
  parts = _split(config)
  step = config.norm.decay_steps
  made = fold(config, *parts[1:], step=step)
  graphdef = _split(made.config)[0]
  return graphdef, made.params, made.model_state, made.config


def program(model, batch: int):
  """A compiled forward pass and its arguments."""
  if isinstance(model, ModelConfig):
    config, (graphdef, *arrays) = model, _split(model)
  else:
    graphdef, *arrays, config = model
  size = config.image.size
  shape = batch, size, size, config.image.channels
  x = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)

  def run(arrays, x):
    net = nnx.merge(graphdef, *arrays)
    return net.classify(
      net(x, context=AttentionContext(step=0, train=False)).hidden
    )

  arrays = jax.device_put(arrays)
  return jax.jit(run).lower(arrays, x).compile(), arrays, x


def _split(config: ModelConfig):
  model = models.build(config, 10, rngs=nnx.Rngs(0))
  graphdef, params, rest = nnx.split(model, nnx.Param, ...)
  return graphdef, nnx.to_pure_dict(params), nnx.to_pure_dict(rest)
