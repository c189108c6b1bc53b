"""Recall tasks made on the fly: `data.source=synthetic:<task>`.

Every row is a function of a seed and its number. Rows are made a chunk at a
time, vectorised over it, and handed out one by one, so the pipeline of text
(`data/pipeline.py`) serves them unchanged: its state is the number of rows
taken, and a resumed run is bit-identical.

Training rows come from the stage's seed; validation rows from a stream of
their own that no run's seed reaches, so all runs are judged on the same ones.

`TASKS` names a file per task. The answers are given as where they are asked
for: logits at `answers` are judged against `targets`, nothing else counts.
"""

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from psa_jax.config import Config, ConfigError, DataConfig, SyntheticConfig
from psa_jax.data.synthetic import (
  mqar,
  needle,
  selective_copy,
  variable_tracking,
)

TASKS = {
  'mqar': mqar,
  'needle': needle,
  'selective_copy': selective_copy,
  'variable_tracking': variable_tracking,
}
ENDLESS = 2**40  # rows of a training stream
_GENERATOR = 'synthetic-1'  # change it with what a seed gives
_TRAIN, _VALIDATION = 0, 1
_CHUNK_TOKENS = 2**17


@dataclasses.dataclass(frozen=True)
class Recall:
  """What a run needs to know of its task.

  Attributes:
    task: a key of `TASKS`.
    config: its settings.
    manifest: what identifies the data; plain JSON values. Empty before
      `fitted`.
  """

  task: str
  config: SyntheticConfig
  manifest: dict[str, Any]

  def train(self, *, seq_len: int, seed: int) -> 'Rows':
    """An endless stream of rows of `seq_len` tokens.

    Raises:
      ConfigError: the task does not fit into `seq_len` or the vocabulary.
    """
    return Rows(self.task, self.config, seq_len, ENDLESS, (_TRAIN, seed))

  def validation(self, *, seq_len: int, rows: int) -> 'Rows':
    """The first `rows` rows of the validation stream; raises as `train`."""
    return Rows(self.task, self.config, seq_len, rows, (_VALIDATION,))

  def fitted(self, config: Config) -> 'Recall':
    """The same with a manifest, once it is known that a run can use it.

    Raises:
      ConfigError: it does not fit into the run's sequences or its vocabulary.
    """
    for seq_len in (*config.train.seq_len, config.eval.seq_len):
      if seq_len:
        _check(self.task, self.config, seq_len)
    sample = self.validation(seq_len=config.train.seq_len[-1], rows=1)[0]
    # Notices a NumPy whose generators give other numbers.
    digest = hashlib.sha256(b''.join(x.tobytes() for x in sample.values()))
    manifest = {
      'source': config.data.source,
      'generator': _GENERATOR,
      'sha256': digest.hexdigest(),
    }
    return dataclasses.replace(self, manifest=manifest)

  def chance(self) -> float:
    """Accuracy of guessing among the tokens that an answer may be."""
    return TASKS[self.task].chance(self.config)


class Rows(Sequence[dict[str, np.ndarray]]):
  """Random access to the rows of a stream.

  A row is a dict of

    inputs     int32 [T]
    answers    int32 [Q, L]: positions whose logits are judged
    targets    int32 [Q, L]: the tokens that should follow there
    weights    f32 [Q]: 1, or 0 where the row asks less than Q questions
    distances  int32 [Q]: from the first answer back to the fact asked for
    needles    int32 []: facts in the row

  with Q questions of L answer tokens each. A question counts as answered if
  all of its L tokens are right.
  """

  def __init__(
    self,
    task: str,
    config: SyntheticConfig,
    seq_len: int,
    rows: int,
    seed: tuple[int, ...],
  ):
    """Checks that the task fits; makes nothing yet."""
    _check(task, config, seq_len)
    self._task, self._config, self._seq_len = task, config, seq_len
    self._rows, self._seed = rows, seed
    self._size = max(1, _CHUNK_TOKENS // seq_len)
    self._made: tuple[int, dict[str, np.ndarray]] | None = None

  def __len__(self) -> int:
    return self._rows

  def __getitem__(self, i):
    if not 0 <= i < self._rows:
      raise IndexError(f'row {i} of {self._rows}')
    chunk, place = divmod(int(i), self._size)
    made = self._made
    if made is None or made[0] != chunk:
      self._made = made = chunk, self._make(chunk)
    return {name: values[place] for name, values in made[1].items()}

  def _make(self, chunk: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng((*self._seed, chunk))
    counts = rng.choice(np.array(self._config.needles), self._size)
    made = TASKS[self._task].make(rng, counts, self._seq_len, self._config)
    return {
      'inputs': made.inputs.astype(np.int32),
      'answers': made.answers.astype(np.int32),
      'targets': made.targets.astype(np.int32),
      'weights': made.asked.astype(np.float32),
      'distances': made.distances().astype(np.int32),
      'needles': counts.astype(np.int32),
    }


def load(config: DataConfig) -> Recall:
  """The task that `config.source` names.

  Raises:
    ConfigError: there is no such task.
  """
  task = config.source.partition(':')[2]
  if task not in TASKS:
    raise ConfigError(
      f'data.source is {config.source!r}, but the task must be one of '
      f'{", ".join(TASKS)}'
    )
  return Recall(task, config.synthetic, {})


def _check(task: str, config: SyntheticConfig, seq_len: int) -> None:
  needs = TASKS[task].needs(config)
  if seq_len < needs.tokens:
    raise ConfigError(
      f'synthetic:{task} with data.synthetic.needles={config.needles} needs '
      f'{needs.tokens} tokens ({needs.why}), but a train.seq_len or '
      f'eval.seq_len is {seq_len}; lengthen it or ask for fewer needles'
    )
  if config.vocab_size < needs.vocab_size:
    raise ConfigError(
      f'synthetic:{task} with data.synthetic.needles={config.needles} needs '
      f'{needs.vocab_size} ids, but data.synthetic.vocab_size is '
      f'{config.vocab_size}; raise it or ask for fewer needles'
    )
