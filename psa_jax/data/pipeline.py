"""Windows to batches: a train stream that can be resumed, and evaluation.

The train stream is grain's `ElasticIterator` over a shuffled, endlessly
repeated sequence of windows; each epoch has its own order. Host p of n takes
every n-th window from p on. The state is how many windows all hosts together
have taken, so it is the same on every host and valid for another number of
hosts or another batch size.

A window of 65,536 tokens costs 2 ms (a copy from a memory map, and grain's
shuffle, which walks 65,536 / windows steps of a permutation), so by default
nothing is read ahead. Pictures that have to be decoded, cropped and augmented
cost more than a step of a small model: with `threads` that many batches are
made at a time, in the same order and from the same random numbers. Pillow and
array_record let go of the interpreter while they work.
"""

import contextlib
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any, Protocol, runtime_checkable

import numpy as np

from psa_jax.config import ConfigError

Batch = dict[str, np.ndarray]
Augment = Callable[[Batch, np.random.Generator], Batch]


@runtime_checkable
class Source(Protocol):
  """Random access to the windows of a split, each a dict of arrays.

  One entry is `weights`, which evaluation sets to 0 in windows that only fill
  a batch.
  """

  def __len__(self) -> int: ...

  def __getitem__(self, i) -> Batch: ...


@runtime_checkable
class DataIterator(Protocol):
  """Endless batches of one stage of a run, with a JSON state."""

  def __next__(self) -> Batch: ...

  def get_state(self) -> dict[str, Any]: ...

  def set_state(self, state: Any) -> None: ...

  def close(self) -> None: ...


class TrainIterator(Iterator[Batch]):
  """Endless batches of one host; see `train_iterator`."""

  def __init__(self, elastic: Any, *, windows: int, seed: int):
    self._elastic = elastic
    self._identity = {'windows': windows, 'seed': seed}

  def __next__(self) -> Batch:
    return next(self._elastic)

  def get_state(self) -> dict[str, int]:
    """Where the stream is: plain JSON, the same on every host."""
    taken = self._elastic.get_state()['global_next_index']
    return {'next_window': taken, **self._identity}

  def close(self) -> None:
    """Begins no more batches; those under way are finished and dropped."""
    self._elastic.close()

  def set_state(self, state: dict[str, int]) -> None:
    """Continues where `get_state` was called.

    Raises:
      ConfigError: the state is of another order of windows.
    """
    for key, value in self._identity.items():
      if state.get(key) != value:
        raise ConfigError(
          f'the saved data position has {key}={state.get(key)}, this run has '
          f'{key}={value}; restore the seed, text and train.seq_len or start '
          'in a new workdir'
        )
    self._elastic.set_state({'global_next_index': state['next_window']})


class EvalBatches:
  """Batches of one host over chosen windows; see `eval_batches`."""

  def __init__(
    self,
    source: Source,
    rows: np.ndarray,
    real: np.ndarray,
    threads: int = 0,
  ) -> None:
    self._source = source
    self._rows = rows
    self._real = real
    self._threads = threads

  def __len__(self) -> int:
    return len(self._rows)

  def __iter__(self) -> Iterator[Batch]:
    with contextlib.ExitStack() as stack:
      read = map
      if self._threads:
        pool = futures.ThreadPoolExecutor(self._threads)
        read = stack.enter_context(pool).map
      for rows, real in zip(self._rows, self._real, strict=True):
        items = list(read(self._source.__getitem__, rows.tolist()))
        batch = {k: np.stack([item[k] for item in items]) for k in items[0]}
        batch['weights'] *= real[:, None]
        yield batch


def train_iterator(
  source: Source,
  *,
  batch_size: int,
  seed: int,
  shuffle: bool = True,
  augment: Augment | None = None,
  threads: int = 0,
  process_index: int = 0,
  process_count: int = 1,
) -> TrainIterator:
  """An endless, shuffled, resumable stream of this host's share of batches.

  Args:
    source: windows of the train split.
    batch_size: windows a step over all hosts.
    seed: of the shuffle, 0 to 2**32 - 1.
    shuffle: False for windows that are random already.
    augment: changes a window; its random numbers belong to the window's place
      in the stream.
    threads: that make batches ahead; 0 for none.
    process_index, process_count: which host this is, of how many.

  Returns:
    An iterator of dict batches [batch_size // process_count, T].

  Raises:
    ConfigError: the batch cannot be shared out, or the seed is out of range.
  """
  import grain
  from grain import experimental

  _check_shares(batch_size, process_count)
  if not 0 <= seed < 2**32:
    raise ConfigError(f'seed is {seed}; choose one from 0 to {2**32 - 1}')
  order = grain.MapDataset.source(source).seed(seed)
  order = order.shuffle().repeat() if shuffle else order.repeat()
  if augment is not None:
    order = order.random_map(augment)
  elastic = experimental.ElasticIterator(
    order,
    batch_size,
    grain.sharding.ShardOptions(process_index, process_count),
    # As many batches are under way or waiting as there are threads.
    read_options=grain.ReadOptions(
      num_threads=threads, prefetch_buffer_size=threads
    ),
  )
  return TrainIterator(iter(elastic), windows=len(source), seed=seed)


def eval_batches(
  source: Source,
  *,
  batch_size: int,
  limit: int,
  threads: int = 0,
  process_index: int = 0,
  process_count: int = 1,
) -> EvalBatches:
  """This host's share of a fixed sequence of batches; iterate it repeatedly.

  Windows are spread evenly over the split, because its documents are sorted
  and its beginning is not like the rest. Every host gets equally many batches
  of equal shape: what is missing is filled with windows of weight 0.

  Args:
    source: windows of the validation split.
    batch_size: windows a step over all hosts.
    limit: how many windows to take; 0 takes all.
    threads: that read the windows of a batch; 0 for none.
    process_index, process_count: which host this is, of how many.
  """
  _check_shares(batch_size, process_count)
  if limit < 0:
    raise ConfigError(f'{limit} evaluation windows; use 0 (all) or more')
  count = min(limit or len(source), len(source))
  chosen = spread(count, len(source))
  steps = -(-count // batch_size)
  filled = np.resize(chosen, steps * batch_size)
  real = np.arange(steps * batch_size) < count
  shape = (steps, process_count, batch_size // process_count)
  return EvalBatches(
    source,
    filled.reshape(shape)[:, process_index],
    real.reshape(shape)[:, process_index].astype(np.float32),
    threads,
  )


def spread(count: int, size: int) -> np.ndarray:
  """`count` of `size` places, evenly and in order."""
  return np.arange(count) * size // count


def _check_shares(batch_size: int, process_count: int) -> None:
  if batch_size < 1 or batch_size % process_count:
    raise ConfigError(
      f'a batch of {batch_size} windows cannot be shared by {process_count} '
      'hosts; use a positive multiple'
    )
