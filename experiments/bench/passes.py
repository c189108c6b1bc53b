"""Forward, backward, and both in one, of any function of arrays."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from experiments.bench.timing import Call, Subject, lazily, timed

PASSES = FORWARD, BACKWARD, BOTH = 'forward', 'backward', 'forward+backward'


def forward_and_backward(function: Callable[..., jax.Array], inputs: int = 3):
  """One program: the output's product with a gradient, and its gradients.

  Args:
    function: takes `inputs` arrays, then what has no gradient.
    inputs: how many of its arguments have one.

  Returns:
    A function of the inputs, the output's gradient, and the rest.
  """

  def loss(*args):
    arrays, grad, rest = args[:inputs], args[inputs], args[inputs + 1 :]
    return jnp.vdot(function(*arrays, *rest), grad)

  return jax.value_and_grad(loss, argnums=tuple(range(inputs)))


def passes(
  name: str,
  function: Callable[..., jax.Array],
  inputs: Callable[[], tuple[Any, ...]],
  rest: Callable[[], tuple[Any, ...]] = tuple,
  time: Callable[..., Call] = timed,
) -> dict[Subject, Call]:
  """The three passes of one operation, each compiled at its first call.

  Args:
    name: of the contender.
    function: takes the inputs and the rest, returns one array.
    inputs: makes arrays (or trees) with gradients and, last, the output's
      gradient.
    rest: makes further arguments.
    time: `timing.timed` or `timing.queued`.
  """

  def forward():
    *arrays, _ = inputs()
    return time(jax.jit(function), *arrays, *rest())

  def backward():
    *arrays, grad = inputs()
    more, run = rest(), jax.jit(function)
    _, pullback = jax.vjp(lambda *arrays: run(*arrays, *more), *arrays)
    return time(jax.jit(lambda pullback, grad: pullback(grad)), pullback, grad)

  def both():
    given = inputs()
    program = forward_and_backward(function, len(given) - 1)
    return time(jax.jit(program), *given, *rest())

  builders = zip(PASSES, (forward, backward, both), strict=True)
  return {(name, which): lazily(build) for which, build in builders}
