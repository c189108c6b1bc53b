"""The pages of the GPU benchmark from made-up rows, and its contenders."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.bench import attention, cli, timing
from experiments.bench.rows import Book
from experiments.bench.timing import Unavailable
from experiments.speed_gpu import __main__ as run
from experiments.speed_gpu import contenders, plot, tables

pytestmark = pytest.mark.tier('default')

STAMP = dict(date='2026-01-01', commit='abc', jax='1', python='3', gpu='H100')


def row(contender, seconds, which='forward', length=65_536, **fields):
  return {
    'what': 'lengths',
    'length': length,
    'head_dim': 128,
    'contender': contender,
    'pass': which,
    'median': seconds,
    **STAMP,
    **fields,
  }


def made():
  gemm = row(contenders.GEMM, 1e-3, length=0) | {'what': 'ceilings'}
  size = contenders.GEMM_SIZE
  # As many operations in 2 ms as the product makes in 1 ms.
  pairs = 2 * size**3 / (2 * 128 * 2)
  return [
    gemm,
    row(contenders.DENSE, 20e-3),
    row('PyTorch SDPA, flash', 18e-3, version='PyTorch 2'),
    row(contenders.WHOLE, 3e-3),
    row(contenders.KERNEL, 2e-3, pairs_read=pairs, pairs_visible=pairs / 2),
    row('FlexAttention, same lists', 0) | {'error': 'no such thing'},
    row(contenders.DENSE, 1e-4, length=4096),
    row(contenders.WHOLE, 2e-4, length=4096, commit='older'),
  ]


def test_ratios_are_against_the_fastest_dense_at_the_longest_length():
  rows = made()
  del rows[5]['median']
  text = tables.sections(rows)
  assert (
    '| 128 | forward | 18 ms (PyTorch SDPA, flash) | 3 ms, 6.0x '
    '| 2 ms, 9.0x | 50 % | 25 % |'
  ) in text['ratios']
  assert '| psa | forward | 200 us | 3 ms |' in text['lengths']
  assert 'FlexAttention, same lists, forward: no such thing' in text['lengths']
  assert 'commit abc older' in text['lengths']
  assert 'PyTorch 2' in text['lengths']
  assert 'decode' not in text


def test_newest_row_counts():
  rows = [row('psa', 1.0), row('psa', 2.0), row('psa', 3.0, 'backward')]
  assert [x['median'] for x in run.EXPERIMENT.shown(rows)] == [2.0, 3.0]


def test_a_picture_is_drawn():
  (axis,) = plot.draw(made()).axes
  assert len(axis.lines) == 5 and axis.get_title() == 'forward'


@pytest.fixture
def shape():
  attention.clear()
  return attention.Shape(2048, 2, 1, 16, 'bfloat16')


def test_the_whole_operation_is_selection_and_kernel(shape):
  q, k, v, _ = attention.inputs(shape)
  sparse = contenders.SPARSE
  lists = attention.lists(shape, sparse)
  attend = functools.partial(attention.attend_sparse, sparse)
  whole = jax.jit(attend)(q, k, v)
  alone = attention.attend_listed(
    sparse, q, k, v, lists.ids, lists.counts, implementation='xla'
  )
  np.testing.assert_array_equal(
    whole.astype(jnp.float32), alone.astype(jnp.float32)
  )


def test_the_lists_reach_flex_attention_as_they_are(shape, tmp_path):
  lists = attention.lists(shape, contenders.SPARSE)
  with np.load(run.save_lists(shape, tmp_path)) as file:
    np.testing.assert_array_equal(file['ids'], np.asarray(lists.ids)[0])
    np.testing.assert_array_equal(file['counts'], np.asarray(lists.counts)[0])
    assert (file['block_q'], file['block_k']) == (64, 64)


def test_every_contender_decodes(shape, monkeypatch):
  monkeypatch.setattr(timing, 'CHAIN', 1)
  found = contenders.all_decodes(shape)
  assert all(call(1) > 0 for call in found.values())
  assert {name for name, _ in found} >= {contenders.WHOLE, contenders.KERNEL}


def test_without_a_gpu_it_says_so(capsys):
  assert cli.main(run.EXPERIMENT, ['--quick']) == 2
  assert 'there is no GPU' in capsys.readouterr().err


class Server:
  """PyTorch as a test has it: flash attention dies."""

  about = {'version': 'PyTorch 2'}

  def __init__(self):
    self.asked = []

  def ask(self, **request):
    self.asked.append(request)
    if 'flash' in request['contender']:
      raise Unavailable('PyTorch died, exit code 3')
    return {'rows': [{'pass': 'forward', 'seconds': [1.0, 5.0, 2.0]}]}


def test_what_pytorch_answers_and_its_death_are_rows(shape):
  server, book = Server(), Book(None, run.EXPERIMENT.key, STAMP)
  run.ask(server, book, 'lengths', shape, {'gpu': 'H100'})
  flash, cudnn, flex = book.rows
  assert flash['error'] == 'PyTorch died, exit code 3'
  assert cudnn['median'] == 2.0 and cudnn['version'] == 'PyTorch 2'
  assert flex['contender'] == tables.FLEX and flex['length'] == 2048
  assert all('lists' in request for request in server.asked)
  run.ask(server, book, 'decode', shape, {})
  assert len(book.rows) == 5 and 'lists' not in server.asked[-1]
