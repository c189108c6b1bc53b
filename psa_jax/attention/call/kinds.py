"""The mechanisms as library calls see them; no other file here asks for one."""

import functools
from typing import Any

import jax

from psa_jax.attention import registry
from psa_jax.attention.attend import attend
from psa_jax.attention.call import steps
from psa_jax.attention.context import AttentionContext
from psa_jax.attention.registry import MechanismSpec
from psa_jax.config import AttentionConfig, ConfigError, SoftmaxConfig, nearest
from psa_jax.config.attention import names
from psa_jax.kernels import platform
from psa_jax.types import AttnOut, Learned, Scalar


def find(name: object) -> MechanismSpec:
  """The mechanism `name`.

  Raises:
    ConfigError: there is none; the nearest is named.
  """
  known = registry.names()
  if name not in known:
    raise ConfigError(
      f'kind={name!r} is no mechanism; did you mean '
      f'{nearest(str(name), known)!r}? choose from {", ".join(known)} and auto'
    )
  return registry.get(str(name))


def bidirectional() -> tuple[str, ...]:
  """Names of the mechanisms that need not be causal."""
  return names(causal_only=False)


def configure(
  kind: MechanismSpec,
  settings: Any,
  softmax: SoftmaxConfig,
  implementation: str,
) -> AttentionConfig:
  """The configuration of a call."""
  return AttentionConfig(
    kind.name, implementation, softmax=softmax, **{kind.section: settings}
  )


def run(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  config: AttentionConfig,
  step: Scalar,
  segment_ids: jax.Array | None,
  train: bool,
  causal: bool,
  learned: Learned | None,
) -> AttnOut:
  """Self-attention by the configured mechanism, compiled if nothing else is.

  Run operation by operation, a mechanism's loops would compile anew at every
  call. Which kernel is taken depends on the machine that is traced for, so a
  program belongs to one.
  """
  context = AttentionContext(
    step=step, segment_ids=segment_ids, train=train, causal=causal
  )
  if steps.inside_jit():
    return _attend(q, k, v, context, learned, config)
  return _compiled(q, k, v, context, learned, config, platform.current())


def _attend(q, k, v, context, learned, config):
  return attend(q, k, v, config=config, context=context, learned=learned)


@functools.partial(jax.jit, static_argnums=(5, 6))
def _compiled(*args):
  return _attend(*args[:-1])
