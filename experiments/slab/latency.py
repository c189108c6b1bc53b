"""Seconds of a forward pass: LayerNorm against a folded PRepBN.

Both have the recipe's sizes and one program each, compiled ahead; weights are
initial ones, whose values make no difference to the time. Calls alternate.
"""

import dataclasses
import statistics
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.slab.grid import Cell
from psa_jax import models
from psa_jax.attention.context import AttentionContext
from psa_jax.config import ImageConfig, ModelConfig
from psa_jax.models.folding import fold

BATCHES = (1, 128)
# Sizes of DeiT-T beside the recipe's own; 196 tokens, not 197.
DEIT = {'num_layers': 12, 'd_model': 192, 'num_heads': 3, 'num_kv_heads': 3}
ROUNDS, CALLS = 31, 3.0  # calls a round: as many as take 3 ms


def measure() -> Iterator[dict[str, Any]]:
  """A row for each size and batch."""
  plain, prepbn = (
    Cell(arm, 0).config().model for arm in ('layernorm', 'prepbn_80')
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


def compare(
  plain: ModelConfig, prepbn: ModelConfig, *, batch: int
) -> dict[str, Any]:
  """Medians of both in seconds, and of the ratio within a round."""
  programs = [program(x, batch) for x in (plain, folded(prepbn))]
  calls = max(1, round(CALLS / 1e3 / _seconds(*programs[0], 1)))
  found = [[_seconds(*one, calls) for one in programs] for _ in range(ROUNDS)]
  ratios = [a / b for a, b in found]
  low, _, high = statistics.quantiles(ratios, n=4)
  return {
    'layernorm': statistics.median(a for a, _ in found),
    'folded': statistics.median(b for _, b in found),
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
  """A compiled forward pass and its arguments; a call has ended once before."""
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
  compiled = jax.jit(run).lower(arrays, x).compile()
  jax.block_until_ready(compiled(arrays, x))
  return compiled, (arrays, x)


def _split(config: ModelConfig):
  model = models.build(config, 10, rngs=nnx.Rngs(0))
  graphdef, params, rest = nnx.split(model, nnx.Param, ...)
  return graphdef, nnx.to_pure_dict(params), nnx.to_pure_dict(rest)


def _seconds(compiled, args, calls: int) -> float:
  began = time.perf_counter()
  for _ in range(calls):
    jax.block_until_ready(compiled(*args))
  return (time.perf_counter() - began) / calls
