"""Recall tasks: every row is read back by a solver that knows the rules."""

import dataclasses

import numpy as np
import pytest

from psa_jax.config import (
  Config,
  ConfigError,
  DataConfig,
  EvalConfig,
  SyntheticConfig,
  TrainConfig,
)
from psa_jax.data import pipeline, synthetic
from psa_jax.data.synthetic import parts

NEEDLES = (1, 2, 5)
SETTINGS = SyntheticConfig(vocab_size=120, needles=NEEDLES, value_len=3, hops=2)
T = 101
every = pytest.mark.parametrize('task', synthetic.TASKS)


def config(task, seq_len=(T,), *, evaluated=0, **changes):
  return Config(
    data=DataConfig(
      source=f'synthetic:{task}',
      synthetic=dataclasses.replace(SETTINGS, **changes),
    ),
    train=TrainConfig(
      steps=(100,) * len(seq_len),
      seq_len=seq_len,
      batch_size=(8,) * len(seq_len),
    ),
    eval=EvalConfig(seq_len=evaluated),
  )


def load_data(config):
  return synthetic.load(config.data).fitted(config)


def rows(task, count=40, seq_len=T, **changes):
  data = load_data(config(task, (seq_len,), **changes))
  stream = data.train(seq_len=seq_len, seed=3)
  return [stream[i] for i in range(count)]


def asked(row):
  """(facts, answers, targets) of the questions that a row really asks."""
  real = row['weights'] == 1
  assert set(row['weights'].tolist()) <= {0.0, 1.0}
  facts = row['answers'][:, 0] - row['distances']
  return [x[real].tolist() for x in (facts, row['answers'], row['targets'])]


def solve_mqar(tokens, needles, settings):
  """Every later place of a key is a question, its value the answer."""
  pairs = {tokens[2 * i]: (2 * i, tokens[2 * i + 1]) for i in range(needles)}
  assert len(pairs) == needles
  return [
    (pairs[tokens[at]][0], [at], [pairs[tokens[at]][1]])
    for at in range(2 * needles, len(tokens))
    if tokens[at] in pairs
  ]


def solve_needle(tokens, needles, settings):
  questions, length = [], settings.value_len
  hidden = {
    tokens[i + 1]: (i, tokens[i + 2 : i + 2 + length])
    for i in range(len(tokens))
    if tokens[i] == 1
  }
  for at in range(len(tokens)):
    if tokens[at] == 2:
      fact, value = hidden[tokens[at + 1]]
      questions.append((fact, [at + 1 + j for j in range(length)], value))
  return questions


def solve_selective_copy(tokens, needles, settings):
  ask = tokens.index(1)
  places = [i for i in range(ask) if tokens[i]]
  return [(place, [ask + i], [tokens[place]]) for i, place in enumerate(places)]


def solve_variable_tracking(tokens, needles, settings):
  ask = tokens.index(2)
  value, questions = tokens[ask + 1], []
  assignments = [i for i in range(ask) if tokens[i] == 1]
  for i in assignments:
    if tokens[i + 2] == value:
      value = tokens[i + 1]
      questions.append((i, [ask + 1 + len(questions)], [value]))
  return questions


@every
def test_a_solver_that_knows_the_rules_finds_every_answer(task):
  solve = globals()[f'solve_{task}']
  for row in rows(task):
    tokens, needles = row['inputs'].tolist(), int(row['needles'])
    questions = solve(tokens, needles, SETTINGS)
    questions = sorted(questions, key=lambda question: question[1])
    want = sorted(zip(*asked(row), strict=True), key=lambda q: q[1])
    assert questions == want


@every
def test_the_answers_so_far_are_in_the_row(task):
  if task == 'mqar':
    pytest.skip('its answers are not written down')
  for row in rows(task):
    for places, values in zip(*asked(row)[1:], strict=True):
      for place, value in zip(places, values, strict=True):
        if place + 1 < T:
          assert row['inputs'][place + 1] == value


@every
def test_every_number_of_needles_is_drawn_and_told(task):
  examples = rows(task, 60)
  counts = [int(row['needles']) for row in examples]
  assert set(counts) == set(NEEDLES)
  for row, needles in zip(examples, counts, strict=True):
    questions = SETTINGS.hops + 1 if task == 'variable_tracking' else needles
    assert row['weights'].sum() == questions
    assert row['inputs'].min() >= 0
    assert row['inputs'].max() < SETTINGS.vocab_size
    real = row['weights'] == 1
    assert (row['distances'][real] > 0).all()


def test_all_chains_are_in_the_row():
  for row in rows('variable_tracking'):
    assert (row['inputs'] == 1).sum() == 3 * row['needles']


def test_gaps_of_mqar_follow_the_power_law():
  """A small gap is drawn far more often than a large one: p(i) ~ 1 / i."""
  first = [
    row['answers'][0, 0] // 2 - 1 for row in rows('mqar', 2000, needles=(1,))
  ]
  counts = np.bincount(first, minlength=49)
  p = np.arange(1, 50) ** -0.99
  p /= p.sum()
  assert counts.sum() == 2000 and len(counts) == 49
  np.testing.assert_allclose(counts[:4] / 2000, p[:4], atol=0.035)


def test_mqar_without_noise_has_one_filler():
  for row in rows('mqar', noise=False):
    keys = 2 * row['needles'] + row['needles']
    assert (row['inputs'] != 0).sum() == keys


@pytest.mark.parametrize(('low', 'high'), [(0.0, 0.25), (0.5, 0.5), (0.9, 1.0)])
@pytest.mark.parametrize('task', ['needle', 'selective_copy'])
def test_depth_says_where_facts_lie(task, low, high):
  for row in rows(task, needles=(1,), depth_min=low, depth_max=high):
    (fact,), (answer,), _ = asked(row)
    text = answer[0] - (1 if task == 'needle' else 0)
    free = text - (5 if task == 'needle' else 1)
    assert np.floor(low * (free + 1)) - 1 <= fact <= high * (free + 1)


@every
def test_a_row_depends_on_its_seed_and_number_only(task):
  data = load_data(config(task))
  first, second = (data.train(seq_len=T, seed=3) for _ in range(2))
  assert len(first) == synthetic.ENDLESS
  far = 3 * 2**17 // T
  for i in (far, 0, 5):
    for name, value in first[i].items():
      np.testing.assert_array_equal(value, second[i][name])
  assert (first[0]['inputs'] != first[5]['inputs']).any()
  other = data.train(seq_len=T, seed=4)[0]
  assert (first[0]['inputs'] != other['inputs']).any()


@every
def test_validation_is_none_of_the_training_rows(task):
  data = load_data(config(task))
  held_out = data.validation(seq_len=T, rows=50)
  assert len(held_out) == 50
  inputs = {row['inputs'].tobytes() for row in rows(task, 300)}
  assert not inputs & {held_out[i]['inputs'].tobytes() for i in range(50)}
  with pytest.raises(IndexError, match='row 50 of 50'):
    held_out[50]


@every
def test_the_stream_resumes_bit_for_bit_on_any_number_of_hosts(task):
  data = load_data(config(task))

  def iterator(**host):
    return pipeline.train_iterator(
      data.train(seq_len=T, seed=3), batch_size=6, seed=3, shuffle=False, **host
    )

  whole = iterator()
  next(whole)
  state = whole.get_state()
  assert state['next_window'] == 6
  want = [next(whole) for _ in range(2)]
  again = iterator()
  again.set_state(state)
  for batch in want:
    for name, value in next(again).items():
      np.testing.assert_array_equal(value, batch[name])
  hosts = [iterator(process_index=i, process_count=2) for i in range(2)]
  for host in hosts:
    host.set_state(state)
  shares = [next(host)['inputs'] for host in hosts]
  merged = np.stack(shares, 1).reshape(6, T)
  assert {r.tobytes() for r in merged} == {
    r.tobytes() for r in want[0]['inputs']
  }


def test_what_identifies_the_data():
  one, same = (load_data(config('mqar')) for _ in range(2))
  assert one.manifest == same.manifest
  assert one.manifest['source'] == 'synthetic:mqar'
  other = load_data(config('mqar', needles=(1, 2)))
  assert one.manifest['sha256'] != other.manifest['sha256']


@pytest.mark.parametrize(
  ('task', 'changes', 'tokens', 'ids'),
  [
    ('mqar', {'needles': (2, 6)}, 24, 14),
    ('needle', {'needles': (4,), 'value_len': 2}, 32, 35),
    ('selective_copy', {'needles': (7,)}, 14, 9),
    ('variable_tracking', {'needles': (2,), 'hops': 1}, 15, 15),
  ],
)
def test_the_smallest_row_and_vocabulary(task, changes, tokens, ids):
  """The last size refused and the first one allowed, both in one line."""
  made = rows(task, 30, tokens, vocab_size=ids, **changes)
  assert all(np.isfinite(row['weights']).all() for row in made)
  for row in made:
    assert 0 <= row['inputs'].min() and row['inputs'].max() < ids
  with pytest.raises(ConfigError) as error:
    load_data(config(task, (99, tokens - 1), vocab_size=ids, **changes))
  assert f'needs {tokens} tokens' in str(error.value)
  assert f'is {tokens - 1}' in str(error.value) and '\n' not in str(error.value)
  with pytest.raises(ConfigError) as error:
    load_data(config(task, (tokens,), vocab_size=ids - 1, **changes))
  assert f'needs {ids} ids' in str(error.value)
  assert f'data.synthetic.vocab_size is {ids - 1}' in str(error.value)


def test_the_evaluation_length_is_checked_too():
  with pytest.raises(ConfigError, match='needs 20 tokens'):
    load_data(config('mqar', evaluated=19))


@every
def test_chance_is_a_guess_among_what_answers_may_be(task):
  chance = load_data(config(task)).chance()
  values = {tuple(v) for row in rows(task, 400) for v in asked(row)[2]}
  tokens = {token for value in values for token in value}
  assert chance == pytest.approx(
    len(tokens) ** -len(next(iter(values))), rel=0.1
  )


def test_distinct_ids_are_uniform():
  rng = np.random.default_rng(0)
  draws = parts.distinct(rng, 4000, 3, 10, 15)
  assert all(len(set(row)) == 3 for row in draws.tolist())
  for column in draws.T:
    counts = np.bincount(column - 10, minlength=5)
    np.testing.assert_allclose(counts / 4000, 0.2, atol=0.03)


def test_scattered_pieces_do_not_overlap():
  rng = np.random.default_rng(0)
  counts = np.repeat([0, 1, 4], 100)
  room = np.tile(np.arange(12, 37), 12)
  starts = parts.scatter(rng, counts, 4, 3, room)
  for row, count, limit in zip(starts, counts, room, strict=True):
    ends = [*row[1:count], limit]
    assert all(a + 3 <= b for a, b in zip(row[:count], ends, strict=False))
    assert (row[count:] == limit).all()
