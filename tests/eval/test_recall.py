"""Accuracy by bucket: the counts against a loop, and their sums."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psa_jax import sharding
from psa_jax.config import MeshConfig, RunError
from psa_jax.eval import recall as lib
from psa_jax.tasks import Loss

pytestmark = pytest.mark.tier('default')

B, Q = 6, 4
BY = lib.buckets(seq_len=100, needles=(4, 1, 2, 2))


@pytest.fixture(scope='module')
def mesh():
  return sharding.make_mesh(MeshConfig(data=1))


def example(seed=0):
  rng = np.random.default_rng(seed)
  positions = rng.integers(1, 100, (B, Q))
  distances = rng.integers(1, positions + 1)
  distances[0] = [1, 15, 16, 64]
  positions[0] = [1, 15, 99, 99]
  return {
    'hits': rng.random((B, Q)) < 0.5,
    'asked': (rng.random((B, Q)) < 0.7).astype(np.float32),
    'distances': distances.astype(np.int32),
    'positions': positions.astype(np.int32),
    'needles': rng.choice([1, 2, 4], B).astype(np.int32),
  }


def counted(x):
  """The same counts by a loop: {kind: {bucket: [hits, questions]}}."""
  counts = {'distance': {}, 'depth': {}, 'needles': {}}
  for row in range(B):
    for question in range(Q):
      if not x['asked'][row, question]:
        continue
      distance = int(x['distances'][row, question])
      position = int(x['positions'][row, question])
      low = 0
      while distance >= max(16, 2 * low):
        low = max(16, 2 * low)
      keys = {
        'distance': {0: 0, 16: 1, 32: 2, 64: 3}[low],
        'depth': min(int((position - distance) / position * 5 + 1e-9), 4),
        'needles': [1, 2, 4].index(x['needles'][row]),
      }
      for kind, key in keys.items():
        cell = counts[kind].setdefault(key, [0, 0])
        cell[0] += int(x['hits'][row, question])
        cell[1] += 1
  return counts


def tally(x):
  args = {name: jnp.asarray(value) for name, value in x.items()}
  hits, asked = args.pop('hits'), args.pop('asked')
  return lib.tally(hits, asked, **args, by=BY)


def test_buckets():
  assert BY.distances == (0, 16, 32, 64)
  assert BY.needles == (1, 2, 4)
  labels = BY.labels()
  assert labels['distance'] == ('0 to 15', '16 to 31', '32 to 63', '64 or more')
  assert labels['depth'][0] == '0 to 20 %' and len(labels['depth']) == 5
  assert labels['needles'] == ('1', '2', '4')


@pytest.mark.parametrize('seed', range(5))
def test_counts_are_those_of_a_loop(seed):
  x = example(seed)
  counts = jax.jit(tally)(x)
  for kind, want in counted(x).items():
    got = np.asarray(counts[kind])
    assert got.shape == (2, len(BY.labels()[kind]))
    for bucket in range(got.shape[1]):
      assert got[:, bucket].tolist() == want.get(bucket, [0, 0]), (kind, bucket)


def eval_step(state, batch):
  x = {name: np.asarray(value) for name, value in batch.items()}
  asked, hits = x['asked'], x['hits']
  sums = tally(x) | {
    'hits': (hits * asked).sum(),
    'questions': asked.sum(),
  }
  nats = jnp.float32(state * asked.sum())
  return Loss(nats, asked.sum(), sums, {'density': jnp.float32(0.25)})


def test_batches_add_up(mesh):
  batches = [example(seed) for seed in range(3)]
  result = lib.evaluate_recall(eval_step, 2.0, batches, mesh=mesh, by=BY)
  hits = sum((x['hits'] * x['asked']).sum() for x in batches)
  questions = sum(x['asked'].sum() for x in batches)
  assert result['questions'] == questions
  assert result['accuracy'] == pytest.approx(hits / questions)
  assert result['loss'] == pytest.approx(2.0)
  assert result['density'] == pytest.approx(0.25)
  for rows in result['by'].values():
    assert sum(asked for _, asked, _ in rows) == questions
    right = sum(asked * (share or 0) for _, asked, share in rows)
    assert right == pytest.approx(hits)


def test_the_table_has_a_column_a_mechanism_and_no_empty_row(mesh):
  x = example()
  x['asked'] = np.where(x['distances'] < 16, 0, x['asked']).astype(np.float32)
  result = lib.evaluate_recall(eval_step, 1.0, [x], mesh=mesh, by=BY)
  rows = dict(lib.table({'psa': result, 'dense': result}))
  assert not any(name.startswith('distance 0 to 15') for name in rows)
  label, asked, share = result['by']['distance'][2]
  text = rows[f'distance {label}, {asked:,} questions']
  assert text == f'psa {share:6.1%}  dense {share:6.1%}'
  assert lib.table({'psa': {'bits_per_byte': 2.0}}) == []


def test_no_question_is_an_error(mesh):
  x = example()
  x['asked'] = np.zeros((B, Q), np.float32)
  for batches in ([], [x]):
    with pytest.raises(RunError, match='no question'):
      lib.evaluate_recall(eval_step, 1.0, batches, mesh=mesh, by=BY)


def test_it_can_be_stopped_between_batches(mesh):
  def before_batch():
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    lib.evaluate_recall(
      eval_step, 1.0, [example()], mesh=mesh, by=BY, before_batch=before_batch
    )
