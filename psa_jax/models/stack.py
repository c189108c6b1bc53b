"""The stack of L blocks that every Transformer here is built round.

The layers' parameters are stacked along a leading axis of length L, always:
`scan_layers=False` runs the same arrays in an unrolled Python loop, so
checkpoints and numbers do not depend on that choice, only compile time does.
Inside the loop each layer is merged from plain arrays, and the running
statistics that it moved come back as the loop's outputs and are written to
the module. A caller under `jax.jit` has to return them in turn.

Layers of cascade pruning differ in size; `cascade.py` runs them, unrolled
whatever `scan_layers` says.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from psa_jax.attention import registry
from psa_jax.attention.context import AttentionContext
from psa_jax.config import ModelConfig
from psa_jax.models import cascade
from psa_jax.models.blocks import Block, remat
from psa_jax.models.drop import drops


def make_layers(config: ModelConfig, *, rngs: nnx.Rngs) -> Block:
  """One `Block` whose arrays have a leading axis of length L."""
  stack = nnx.vmap(lambda rngs: Block(config, rngs=rngs))
  return stack(rngs.split(config.num_layers))


def apply_layers(
  layers: Block,
  config: ModelConfig,
  x: Float[Array, 'B T D'],
  *,
  context: AttentionContext,
) -> tuple[Float[Array, 'B T D'], dict[str, jax.Array]]:
  """Runs the layers and moves their statistics.

  Args:
    layers: from `make_layers`.
    config: the model.
    x: embedded tokens.
    context: what varies by call, the same for all layers.

  Returns:
    The residual stream after the last layer, and means of the layers' f32
    scalars.
  """
  graphdef, params, stats = nnx.split(layers, nnx.Param, nnx.BatchStat)
  arrays = nnx.as_pure((params, stats))
  train = context.train
  if registry.get(config.attention.name).prunes_stack:
    x, stats, aux = cascade.Cascade(graphdef, config, context)(x, arrays)
  else:

    def layer(x, inputs):
      arrays, drop = inputs
      block = nnx.merge(graphdef, *arrays)
      x, aux = block(x, context=context, drop=drop)
      stats = nnx.as_pure(nnx.state(block, nnx.BatchStat)) if train else None
      return x, (stats, aux)

    scan = config.scan_layers
    layer = remat(layer, config.remat, in_scan=scan)
    loop = jax.lax.scan if scan else unrolled
    x, (stats, aux) = loop(
      layer, x, (arrays, drops(config, context.step, train=train))
    )
    aux = {name: jnp.mean(values) for name, values in aux.items()}
  if train:
    nnx.update(layers, stats)
  return x, aux


def unrolled(body, carry, stacked):
  """`lax.scan` as a Python loop."""
  outputs = []
  for index in range(jax.tree.leaves(stacked)[0].shape[0]):
    layer = jax.tree.map(lambda array, i=index: array[i], stacked)
    carry, output = body(carry, layer)
    outputs.append(output)
  return carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)
