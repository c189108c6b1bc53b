"""A recipe's whole train step, as a contender.

Everything here is at the setting that a recipe ends with: the schedules are
read at its last step.
"""

import dataclasses
import time

import jax
import jax.numpy as jnp

from experiments.bench import memory
from experiments.bench.timing import Call, timed
from psa_jax import sharding, tasks
from psa_jax.data.text.corpus import build_corpus
from psa_jax.data.text.windows import windows
from psa_jax.train import state as state_lib
from psa_jax.train import step as step_lib


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
  return memory.temporary_bytes(compiled)


def forward(step: TrainStep, length: int) -> Call:
  """A contender: the loss of one window, as validation reads it."""
  config = step.config
  task, program, _, batch = parts(config, length)
  state = state_lib.init_state(config, task.vocab_size, program)
  state = state._replace(step=jnp.int32(sum(config.train.steps)))
  loss = step_lib.make_eval_step(task, program)
  return timed(loss, state, batch)


def with_mechanism(config, name):
  """The same run with another attention mechanism."""
  attention = config.model.attention
  if name != attention.name:
    attention = attention.read_by(name)
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
