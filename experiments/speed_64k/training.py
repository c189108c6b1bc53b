"""The recipe's attention and its whole train step, sparse against dense.

Everything here is at the setting that a recipe ends with: the schedules are
read at its last step.
"""

import dataclasses
import functools
import os
import time

import jax
import jax.numpy as jnp

from experiments.speed_64k.contenders import inputs
from experiments.speed_64k.rows import ROOT
from experiments.speed_64k.timing import timed
from psa_jax import sharding, tasks
from psa_jax.attention import base
from psa_jax.data.text.corpus import build_corpus
from psa_jax.data.text.windows import windows
from psa_jax.recipe import load_recipe
from psa_jax.train import state as state_lib
from psa_jax.train import step as step_lib


def recipe(path):
  """The configuration that is measured."""
  os.chdir(ROOT)
  return load_recipe(path, [])


def attention(config, T):
  """{(name, pass): contender} of one head, selection included."""
  final = one_head(config)
  q, k, v, _ = inputs(T)

  def attend(mechanism, q, k, v):
    step = sum(config.train.steps)
    return base.attend(
      q, k, v, config=final, step=step, mechanism=mechanism
    ).out

  contenders = {}
  for mechanism in ('psa', 'dense'):
    forward = jax.jit(functools.partial(attend, mechanism))
    out, pullback = jax.vjp(forward, q, k, v)
    backward = jax.jit(lambda pullback, grad: pullback(grad))
    contenders[f'psa_jax {mechanism}', 'forward'] = timed(forward, q, k, v)
    contenders[f'psa_jax {mechanism}', 'backward'] = timed(
      backward, pullback, jnp.ones_like(out)
    )
  return contenders


def one_head(config):
  """The recipe's attention for a single head.

  A tile of the recipe has the queries of all G heads of a group as rows; one
  head gets tiles of as many rows, so G times as many queries.
  """
  attention, model = config.model.attention, config.model
  rows = attention.psa.block_q * model.num_heads // model.num_kv_heads
  psa = dataclasses.replace(attention.psa, block_q=rows)
  return dataclasses.replace(attention, name='psa', psa=psa)


class TrainStep:
  """One compiled train step with state of its own; a call is one update."""

  def __init__(self, config, mechanism, length):
    """Builds state and batch at the step that ends the recipe."""
    self.config = with_mechanism(config, mechanism)
    task, program, self.step, self.batch = parts(self.config, length)
    state = state_lib.init_state(self.config, task.vocab_size, program)
    self.state = state._replace(step=jnp.int32(sum(config.train.steps)))
    self.density = None

  def __call__(self, calls):
    """Seconds of one update."""
    began = time.perf_counter()
    for _ in range(calls):
      self.state, metrics = jax.block_until_ready(
        self.step(self.state, self.batch)
      )
    self.density = float(metrics['density'])
    return (time.perf_counter() - began) / calls


def temporaries(config, length):
  """Temporary bytes of the compiled train step."""
  with jax.set_mesh(mesh(config)):
    _, program, step, batch = parts(config, length)
    compiled = step.lower(program.abstract, batch).compile()
  return temporary_bytes(compiled)


def temporary_bytes(compiled):
  """What XLA says that a compiled program needs beside inputs and outputs."""
  analysis = compiled.memory_analysis()
  assert analysis is not None, 'this backend gives no account of memory'
  return analysis.temp_size_in_bytes


def with_mechanism(config, name):
  """The same run with another attention mechanism."""
  attention = dataclasses.replace(config.model.attention, name=name)
  model = dataclasses.replace(config.model, attention=attention)
  return dataclasses.replace(config, model=model)


def mesh(config):
  """The recipe's mesh over this machine."""
  return sharding.make_mesh(config.mesh)


def parts(config, length):
  """Task, program, jitted train step and one window of the recipe's text."""
  corpus = build_corpus(config.data)
  task = tasks.LanguageModel(config, corpus, mesh(config))
  program = state_lib.make_program(config, task.vocab_size, mesh(config))
  source = windows(
    corpus.train, seq_len=length, cut_documents=config.data.cut_documents
  )
  batch = jax.tree.map(lambda x: x[None], source[0])
  return task, program, step_lib.make_train_step(config, task, program), batch
