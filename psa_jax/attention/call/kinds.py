"""The mechanisms as library calls see them; no other file here asks for one."""

import difflib
import functools
from typing import Any, NamedTuple

import jax

from psa_jax.attention import base
from psa_jax.attention.call import steps
from psa_jax.config import AttentionConfig, ConfigError, SoftmaxConfig
from psa_jax.kernels import platform
from psa_jax.types import AttnOut, Learned, Scalar


class Kind(NamedTuple):
  """What a call has to know of a mechanism.

  Attributes:
    name: of the mechanism.
    section: of its settings in `AttentionConfig`.
    settings: their class.
    causal_only: whether it cannot be bidirectional.
    needs_learned: whether it has parameters that it cannot do without.
  """

  name: str
  section: str
  settings: Any
  causal_only: bool
  needs_learned: bool


def find(name: object) -> Kind:
  """The mechanism `name`.

  Raises:
    ConfigError: there is none; the nearest is named.
  """
  if name not in base.MECHANISMS:
    close = difflib.get_close_matches(str(name), base.MECHANISMS, 1, 0.3)
    hint = f'did you mean {close[0]!r}? ' if close else ''
    raise ConfigError(
      f'kind={name!r} is no mechanism; {hint}choose from '
      f'{", ".join(base.MECHANISMS)} and auto'
    )
  name = str(name)
  section = name.removesuffix('_tile')
  settings = type(getattr(AttentionConfig(), section))
  causal_only = name in ('psa', 'hybrid', 'dsa', 'nsa', 'nsa_tile')
  learned = name in ('dsa', 'sla', 'nsa', 'nsa_tile')
  return Kind(name, section, settings, causal_only, learned)


def bidirectional() -> list[str]:
  """Names of the mechanisms that need not be causal."""
  return [name for name in base.MECHANISMS if not find(name).causal_only]


def configure(
  kind: Kind, settings: Any, softmax: SoftmaxConfig, implementation: str
) -> AttentionConfig:
  """The configuration of a call."""
  return AttentionConfig(
    name=kind.name,
    implementation=implementation,
    softmax=softmax,
    **{kind.section: settings},
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
  traced = q, k, v, step, segment_ids, learned
  if steps.inside_jit():
    return _attend(*traced, config, train, causal)
  return _compiled(*traced, config, train, causal, platform.current())


def _attend(q, k, v, step, segment_ids, learned, config, train, causal):
  return base.attend(
    q,
    k,
    v,
    config=config,
    step=step,
    segment_ids=segment_ids,
    train=train,
    causal=causal,
    learned=learned,
  )


@functools.partial(jax.jit, static_argnums=(6, 7, 8, 9))
def _compiled(*args):
  return _attend(*args[:-1])
