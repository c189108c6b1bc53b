"""A model and a text so small that a whole run takes a second."""

import dataclasses
import functools
import random

import jax
import numpy as np

from psa_jax import sharding
from psa_jax.attention.dsa import DsaConfig
from psa_jax.attention.psa import PsaConfig
from psa_jax.config import (
  AttentionConfig,
  CheckpointConfig,
  Config,
  ControllerConfig,
  DataConfig,
  EvalConfig,
  MeshConfig,
  ModelConfig,
  NormConfig,
  OptimConfig,
  ScheduleConfig,
  SyntheticConfig,
  TrainConfig,
)
from psa_jax.data.text import windows
from psa_jax.data.text.corpus import Corpus
from psa_jax.data.text.tokenizer import ByteTokenizer
from psa_jax.tasks import LanguageModel
from psa_jax.train import state as state_lib
from psa_jax.train import step as step_lib

MODEL = ModelConfig(
  num_layers=2, d_model=16, num_heads=4, num_kv_heads=2, mlp_dim=32
)
PREPBN = NormConfig(kind='prepbn', decay_steps=6, scale_init=1.0)
WORDS = 'the of union sparse attention state and to congress'.split()


def config(
  norm=PREPBN,
  *,
  source='sotu',
  accumulate=1,
  data=1,
  fsdp=1,
  tensor=1,
  **changes,
):
  """Two stages of 4 and 3 steps; a checkpoint every 2 steps."""
  found = Config(
    name='tiny',
    data=DataConfig(source=source),
    model=dataclasses.replace(MODEL, norm=norm),
    train=TrainConfig(
      steps=(4, 3), seq_len=(16, 32), batch_size=(8, 4), loss_chunk=40
    ),
    optim=OptimConfig(
      learning_rate=0.01,
      warmup_steps=2,
      decay_steps=7,
      accumulate=accumulate,
    ),
    eval=EvalConfig(every=3, windows=3),
    checkpoint=CheckpointConfig(every=2, keep=2),
    mesh=MeshConfig(data=data, fsdp=fsdp, tensor=tensor),
  )
  return dataclasses.replace(found, **changes)


def config_for_all_devices(**changes):
  """The first steps of `config`, with the batch over all devices."""
  found = config(data=-1, **changes)
  train = dataclasses.replace(
    found.train, steps=(3,), seq_len=(16,), batch_size=(8,)
  )
  return dataclasses.replace(found, train=train, eval=EvalConfig(windows=2))


def config_psa(**changes):
  """Five steps of sparse attention as the recipes use it: PRepBN and remat."""
  found = config(accumulate=2, **changes)
  keep = ScheduleConfig('linear', init=1.0, final=0.1, length=3)
  psa = PsaConfig(block_q=8, block_k=8, window=8, keep=keep)
  model = dataclasses.replace(
    found.model, attention=AttentionConfig('psa', psa=psa), remat='attention'
  )
  return dataclasses.replace(
    found,
    model=model,
    train=TrainConfig(steps=(5,), seq_len=(64,), batch_size=(4,)),
    eval=EvalConfig(windows=2),
  )


def config_controller(**changes):
  """Six steps of `config_psa` whose budget the controller sets."""
  found = config_psa(**changes)
  rules = ControllerConfig(
    'mass', target=0.6, tolerance=0.05, every=1, lower=0.75, hold=1
  )
  psa = dataclasses.replace(found.model.attention.psa, keep=ScheduleConfig())
  attention = dataclasses.replace(found.model.attention, psa=psa)
  return dataclasses.replace(
    found,
    model=dataclasses.replace(found.model, attention=attention),
    train=dataclasses.replace(found.train, steps=(6,), controller=rules),
  )


def config_dsa(**changes):
  """A learned indexer: two steps of stage 1, then stage 2."""
  found = config(**changes)
  dsa = DsaConfig(
    heads=2,
    width=4,
    block_q=8,
    block_k=4,
    window=4,
    top_k=ScheduleConfig(init=16.0),
    warmup_steps=2,
  )
  attention = AttentionConfig('dsa', dsa=dsa)
  return dataclasses.replace(
    found,
    model=dataclasses.replace(found.model, attention=attention),
    train=TrainConfig(steps=(5,), seq_len=(32,), batch_size=(4,)),
    eval=EvalConfig(windows=2),
  )


def config_recall(source=None, **changes):
  """Two stages of pairs to remember, with sparse attention; no text is read."""
  del source
  found = config(NormConfig(), **changes)
  keep = ScheduleConfig('linear', init=1.0, final=0.3, length=3)
  psa = PsaConfig(block_q=2, block_k=4, window=4, sink_blocks=0, keep=keep)
  return dataclasses.replace(
    found,
    task='recall',
    data=DataConfig(
      source='synthetic:mqar',
      synthetic=SyntheticConfig(vocab_size=64, needles=(2, 4)),
    ),
    model=dataclasses.replace(
      found.model, attention=AttentionConfig('psa', psa=psa)
    ),
    train=TrainConfig(steps=(3, 2), seq_len=(16, 32), batch_size=(8, 4)),
    eval=EvalConfig(windows=6),
  )


def prose(seed, words):
  """Words in a random order, the same for the same seed."""
  generator = random.Random(seed)
  return ' '.join(generator.choice(WORDS) for _ in range(words)).encode()


def corpus():
  """A corpus in memory, without the data cache."""

  def packed(split, texts):
    stream = b'\0' + b'\0'.join(texts) + b'\0'
    tokens = np.frombuffer(stream, np.uint8)
    starts = np.flatnonzero(tokens == 0)[:-1]
    return windows.Packed(tokens, starts, split)

  return Corpus(
    train=packed('train', [prose(i, 300) for i in range(4)]),
    validation=packed('validation', [prose(9, 60)]),
    tokenizer=ByteTokenizer(),
    manifest={'source': 'tiny'},
    unigram_bpb=4.0,
    bigram_bpb=3.0,
  )


def write_text(folder):
  """The same kind of text as files; returns the `data.source` of them."""
  folder.mkdir(parents=True, exist_ok=True)
  for i in range(5):
    (folder / f'{i}.txt').write_bytes(prose(i, 300))
  return f'files:{folder}/*.txt'


class Steps:
  """The parts of a run that a test of the step needs."""

  def __init__(self, config):
    self.config = config
    self.mesh = sharding.make_mesh(config.mesh)
    self.task = LanguageModel(config, corpus(), self.mesh)
    self.program = state_lib.make_program(
      config, self.task.vocab_size, self.mesh
    )
    self.train_step = self._meshed(
      step_lib.make_train_step(config, self.task, self.program)
    )
    self.eval_step = self._meshed(
      step_lib.make_eval_step(self.task, self.program)
    )

  def _meshed(self, jitted):
    def call(*args):
      with jax.set_mesh(self.mesh):
        return jitted(*args)

    call.jitted = jitted
    return call

  def init(self):
    """The first state, in arrays of its own that may be donated."""
    return jax.device_put(self._first, self.program.shardings, may_alias=False)

  @functools.cached_property
  def _first(self):
    return host(
      state_lib.init_state(self.config, self.task.vocab_size, self.program)
    )

  def put(self, batch):
    return sharding.put_batch(batch, self.mesh)

  def batch(self, *, rows=8, seq_len=16, first=0):
    source = windows.windows(
      corpus().train, seq_len=seq_len, cut_documents=False
    )
    items = [source[first + i] for i in range(rows)]
    return self.put({k: np.stack([i[k] for i in items]) for k in items[0]})


def host(tree):
  """A copy of a tree of arrays on the host; safe from donation."""
  return jax.tree.map(lambda x: np.array(x, copy=True), tree)


def assert_identical(left, right):
  """Both trees have the same leaves, bit for bit."""
  left, right = (
    jax.tree_util.tree_leaves_with_path(host(tree)) for tree in (left, right)
  )
  assert len(left) == len(right)
  for (path, a), (_, b) in zip(left, right, strict=True):
    name = jax.tree_util.keystr(path)
    assert a.dtype == b.dtype and a.tobytes() == b.tobytes(), name
