"""The adaptive schedule: attention's budget as a closed loop.

A schedule says beforehand how sparse attention is at every step. The
controller finds out: it watches the softmax mass that the selection retains,
or the training loss, and moves the share of keys that attention may read.

Every `every` steps it looks at the mean of what it saw since the last look and

* lowers the share where there is room: the mass is more than `tolerance` above
  `target`, or the loss is no more than half of `tolerance` above its reference;
* backs off where there is too little: the mass is below `target`, or the loss
  more than `tolerance` above its reference. It then waits for `hold` looks, and
  its strides downwards are half as long from then on; they recover slowly;
* holds in between.

Shorter strides make it settle, however coarse the selection is: it comes back
to the edge more carefully each time. A mean that begins anew after every look
carries no memory of an earlier budget, which a running average would.

The reference of the loss is the best mean so far. It follows a loss that stays
above it by the share `forget` a look, since a new stage or harder text may have
raised it for good.

The state is a handful of scalars in the train state, saved with the rest, and
every rule is a `where`: one compilation, and a resumed run is the same run.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from psa_jax.config import ConfigError, ControllerConfig
from psa_jax.types import Scalar

RECOVERY = 1.05  # how much longer a stride is after each one that held


class ControllerState(NamedTuple):
  """What the controller knows.

  Attributes:
    keep: share of the visible keys that the next step may read, in (0, 1].
    stride: what the next lowering takes off log(keep).
    total: sum of what was seen since the last look,
    count: and of how many steps.
    wait: looks for which nothing is lowered.
    reference: loss that a mean is compared with; inf before the first look.
  """

  keep: Float[Array, '']
  stride: Float[Array, '']
  total: Float[Array, '']
  count: Int[Array, '']
  wait: Int[Array, '']
  reference: Float[Array, '']


def init(config: ControllerConfig) -> Any:
  """The state before the first step: dense; () without a controller."""
  if config.kind == 'none':
    return ()
  return ControllerState(
    keep=jnp.float32(1),
    stride=-jnp.log(jnp.float32(config.lower)),
    total=jnp.float32(0),
    count=jnp.int32(0),
    wait=jnp.int32(0),
    reference=jnp.float32(jnp.inf),
  )


def budget(state: Any) -> jax.Array | None:
  """Share of the visible keys that attention may read; None: its schedule's."""
  return state.keep if isinstance(state, ControllerState) else None


def observe(
  config: ControllerConfig,
  state: Any,
  *,
  step: Scalar,
  retained_mass: Scalar | None,
  loss: Scalar,
) -> Any:
  """The state after a step that read what `state.keep` allowed.

  Args:
    config: the rules.
    state: from `init` or the last call.
    step: optimiser updates made before this step.
    retained_mass: share of the softmax mass that was read; needed by kind
      `mass`.
    loss: training loss of the step.
  """
  if config.kind == 'none':
    return state
  observed = loss
  if config.kind == 'mass':
    if retained_mass is None:
      raise ConfigError(
        'train.controller.kind=mass needs an attention that reports '
        'retained_mass; use kind=loss'
      )
    observed = retained_mass
  began = (jnp.asarray(step) >= config.begin).astype(jnp.float32)
  count = state.count + began.astype(jnp.int32)
  total = state.total + jnp.where(began > 0, observed, 0).astype(jnp.float32)
  state = state._replace(total=total, count=count)
  due = count >= config.every
  looked = _look(config, state, total / jnp.maximum(count, 1))
  return jax.tree.map(lambda a, b: jnp.where(due, a, b), looked, state)


def _look(config, state: ControllerState, mean) -> ControllerState:
  """The state after a look at `mean`."""
  if config.kind == 'mass':
    short = mean < config.target
    spare = mean > config.target + config.tolerance
    reference = state.reference
  else:
    short = mean > state.reference + config.tolerance
    spare = mean <= state.reference + config.tolerance / 2
    behind = jnp.where(jnp.isfinite(state.reference), state.reference, mean)
    drift = behind + config.forget * (mean - behind)
    reference = jnp.where(mean < behind, mean, drift)
  spare = spare & (state.wait == 0)
  lowered = jnp.maximum(state.keep * jnp.exp(-state.stride), config.floor)
  raised = jnp.minimum(state.keep * config.back_off, 1)
  keep = jnp.where(short, raised, jnp.where(spare, lowered, state.keep))
  longest = -jnp.log(jnp.float32(config.lower))
  longer = jnp.minimum(state.stride * RECOVERY, longest)
  stride = jnp.where(spare, longer, state.stride)
  return ControllerState(
    keep=keep,
    stride=jnp.where(short, state.stride / 2, stride),
    total=jnp.zeros_like(state.total),
    count=jnp.zeros_like(state.count),
    wait=jnp.where(short, config.hold, jnp.maximum(state.wait - 1, 0)),
    reference=reference,
  )
