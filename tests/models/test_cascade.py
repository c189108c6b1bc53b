"""Cascade pruning of whole models: what leaves, what it saves, what it sees."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from psa_jax import models, sharding
from psa_jax.attention.cascade import CascadeConfig, survivors
from psa_jax.attention.context import AttentionContext
from psa_jax.config import (
  AttentionConfig,
  MeshConfig,
  ModelConfig,
  NormConfig,
  ScheduleConfig,
)
from psa_jax.models import cascade as cascade_lib
from tests import oracles
from tests.models import cascade_oracle

pytestmark = pytest.mark.tier('default')

V, T, L = 28, 24, 4
# By hand: one of four layers keeps everything, the other three fall from 0.75
# to 0.25; two of four keep all 4 kv heads, then 0.75 and 0.25 of them.
SHARES = (1024, 768, 512, 256)
HEADS = (4, 4, 3, 1)
CASCADE = CascadeConfig(
  token_keep=0.5, head_keep=0.5, value_keep=0.5, window=6, credit=2, documents=2
)
ALL_HEADS = dataclasses.replace(CASCADE, head_keep=1.0)
MODEL = ModelConfig(
  num_layers=L,
  d_model=16,
  num_heads=8,
  num_kv_heads=4,
  head_dim=4,
  mlp_dim=24,
)
SEGMENTS = jnp.asarray(
  np.stack([[1] * T, [1] * 17 + [0] * 7, [1] * 11 + [2] * 13]), jnp.int32
)


def config(kind='encoder', cascade=CASCADE, run='reference', **changes):
  attention = AttentionConfig('cascade', implementation=run, cascade=cascade)
  return dataclasses.replace(MODEL, **{
    'kind': kind, 'attention': attention, 'scan_layers': False, **changes
  })  # fmt: skip


def tokens(seed=0, rows=3, length=T):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.integers(0, V, (rows, length)), jnp.int32)


@functools.cache
def structure(cfg):
  found = []

  def init():
    graphdef, *state = nnx.split(
      models.build(cfg, V, rngs=nnx.Rngs(0)), nnx.Param, nnx.BatchStat
    )
    found.append(graphdef)
    return nnx.as_pure(state)

  shapes = jax.eval_shape(init)
  return found[0], shapes


@functools.cache
def arrays(cfg):
  """Parameters and statistics from NumPy, large enough to matter."""
  rng = np.random.default_rng(1)

  def fill(path, leaf):
    noise = rng.standard_normal(leaf.shape) * 0.4
    name = path[-1].key
    if name == 'head_importance':
      noise = np.abs(noise)
    return jnp.asarray(noise + (name == 'scale'), leaf.dtype)

  return jax.tree.map_with_path(fill, structure(cfg)[1])


def compiled(function):
  """Jitted without XLA's costly passes: many programs, each run a few times."""
  return jax.jit(
    function, compiler_options={'xla_backend_optimization_level': 0}
  )


@functools.cache
def forward_of(cfg, train=True):
  """(params, stats, tokens, step, companions) -> output, statistics, sets.

  The sets are the rows of every layer that pruned, seen on their way.
  """

  def run(state, batch, step, companions):
    companions = dict(companions)
    sets, prune = [], cascade_lib.Cascade._prune

    def spy(self, *args):
      sets.append(prune(self, *args))
      return sets[-1]

    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(cascade_lib.Cascade, '_prune', spy)
      model = nnx.merge(structure(cfg)[0], *state)
      positions = companions.pop('positions', None)
      context = AttentionContext(step=step, train=train, **companions)
      out = model(batch, context=context, positions=positions)
    one_rung = len(cascade_lib.rungs(cfg.attention.cascade)) == 1
    moved = nnx.as_pure(nnx.state(model, nnx.BatchStat))
    return out, moved, [(r.place, r.alive) for r in sets] if one_rung else []

  return compiled(run)


def read_densely(cfg):
  """The model that reads the same weights with dense attention."""
  return dataclasses.replace(cfg, attention=cfg.attention.read_by('dense'))


def forward(cfg, batch, *, step=0, train=True, **companions):
  run = forward_of(cfg, train)
  return run(arrays(cfg), batch, jnp.int32(step), companions)


def left_in(sets, b):
  """Tokens of row b in each layer that pruned."""
  return [
    np.asarray(place)[b][np.asarray(alive)[b]].tolist() for place, alive in sets
  ]


def oracle_rows(cfg, state, batch, segments):
  params, stats = jax.tree.map(lambda x: np.asarray(x, np.float64), state)
  causal = cfg.kind == 'decoder_lm'
  statistics = None
  if causal:
    statistics = stats['layers']['attention']['mechanism']['head_importance']
  own = cfg.attention.cascade
  return [
    cascade_oracle.row(
      params, np.asarray(batch)[b], np.asarray(segments)[b], shares=SHARES,
      head_counts=HEADS, causal=causal, statistics=statistics,
      value_keep=own.value_keep, documents=own.documents, window=own.window,
      credit=own.credit,
    )
    for b in range(batch.shape[0])
  ]  # fmt: skip


@pytest.mark.parametrize('kind', ['encoder', 'decoder_lm'])
def test_whole_model_equals_the_oracle(kind):
  """Four layers, tokens, heads and values pruned, documents and padding."""
  cfg = config(kind)
  out, _, sets = forward(cfg, tokens(), segment_ids=SEGMENTS)
  rows = oracle_rows(cfg, arrays(cfg), tokens(), SEGMENTS)
  shares = []
  for b, (hidden, left, heads) in enumerate(rows):
    assert left_in(sets, b) == left[1:]
    assert [len(h) for h in heads] == list(HEADS)
    assert len(left[-1]) <= 8
    real = np.asarray(SEGMENTS[b] > 0) | (kind == 'decoder_lm')
    oracles.check_close(out.hidden[b][real], hidden[real], 'float32', True)
    shares.append([len(x) for x in left])
  kept = np.asarray(shares).sum(0)
  np.testing.assert_allclose(
    out.aux['kept_tokens'], (kept / kept[0]).mean(), 1e-6
  )
  np.testing.assert_allclose(out.aux['kept_heads'], np.mean(HEADS) / 4, 1e-6)


def test_gradient_equals_differences_of_the_oracle():
  """Of a weighted sum of the encoder's output, along a random direction."""
  cfg = config()
  rng = np.random.default_rng(5)
  weight = rng.standard_normal((3, T, 16)) * np.asarray(SEGMENTS > 0)[..., None]

  @compiled
  def gradient(state, batch):
    def loss(params):
      model = nnx.merge(structure(cfg)[0], params, state[1])
      out = model(
        batch,
        context=AttentionContext(step=0, train=False, segment_ids=SEGMENTS),
      )
      return (out.hidden * weight).sum()

    return jax.grad(loss)(state[0])

  params, stats = arrays(cfg)
  way = jax.tree.map(lambda x: rng.standard_normal(x.shape), params)
  grads = jax.tree.leaves(gradient((params, stats), tokens()))
  got = sum(
    (np.asarray(g, np.float64) * d).sum()
    for g, d in zip(grads, jax.tree.leaves(way), strict=True)
  )

  def value(size):
    moved = jax.tree.map(
      lambda x, d: np.asarray(x, np.float64) + size * d, params, way
    )
    rows = oracle_rows(cfg, (moved, stats), tokens(), SEGMENTS)
    return sum((row[0] * weight[b]).sum() for b, row in enumerate(rows))

  want = (value(1e-6) - value(-1e-6)) / 2e-6
  np.testing.assert_allclose(got, want, rtol=2e-4)


@pytest.mark.parametrize('kind', ['encoder', 'decoder_lm'])
def test_survivors_are_nested_and_exactly_as_many(kind):
  cfg, nobody = config(kind), [0]
  for seed in range(4):
    batch = tokens(seed)
    _, _, sets = forward(cfg, batch, segment_ids=SEGMENTS)
    for b in range(3):
      before = set(range(T))
      for kept, share in zip(left_in(sets, b), SHARES[1:], strict=True):
        assert kept == sorted(set(kept)) and set(kept) <= before
        before = set(kept)
        for document in set(np.asarray(SEGMENTS[b]).tolist()):
          at = np.flatnonzero(SEGMENTS[b] == document)
          inside = [j for j in kept if j in at]
          if kind == 'encoder':
            room = 0 if document in nobody else -(-len(at) * share // 1024)
            assert len(inside) == room
          for m, j in enumerate(inside, 1):  # every prefix, in a causal model
            rank = j - at[0] + 1
            assert kind == 'encoder' or m <= -(-rank * share // 1024)


def test_random_importance_gives_every_token_the_same_chance():
  cascade = dataclasses.replace(ALL_HEADS, importance='random')
  cfg = config(cascade=cascade)

  def kept(seed, step):
    _, _, sets = forward(cfg, tokens(seed), segment_ids=SEGMENTS, step=step)
    return [left_in(sets, b) for b in range(3)]

  one = kept(0, step=3)
  assert one == kept(0, step=3)
  assert one not in (kept(1, step=3), kept(0, step=4))
  for b, layers in enumerate(one):
    real = int((np.asarray(SEGMENTS[b]) != 0).sum())
    before = set(range(real))
    for found, share in zip(layers, SHARES[1:], strict=True):
      assert set(found) <= before
      ids = np.asarray(SEGMENTS[b])[found]
      for document in set(ids.tolist()):
        size = int((np.asarray(SEGMENTS[b]) == document).sum())
        assert (ids == document).sum() == -(-size * share // 1024)
      before = set(found)
  left = np.zeros(T)
  for step in range(60):
    for j in kept(0, step)[0][-1]:
      left[j] += 1
  assert abs(left.mean() - 15) < 1e-6 and left.min() > 3 and left.max() < 30


@pytest.mark.parametrize('train', [True, False])
def test_later_tokens_change_no_bit_of_earlier_outputs(train):
  """Nor what is left of them: the discrete choice is causal too."""
  cfg = config('decoder_lm')
  batch, one = tokens(), jnp.ones_like(SEGMENTS)
  want, _, sets = forward(cfg, batch, train=train, segment_ids=one)
  for t in (1, 5, 6, 11, 12, 17, 23):
    for shift in (3, 11):
      other = batch.at[:, t:].set((batch[:, t:] + shift) % V)
      got, _, new = forward(cfg, other, train=train, segment_ids=one)
      np.testing.assert_array_equal(got.hidden[:, :t], want.hidden[:, :t])
      assert not np.array_equal(got.hidden[:, t:], want.hidden[:, t:])
      for b in range(3):
        for kept, again in zip(left_in(sets, b), left_in(new, b), strict=True):
          assert [j for j in kept if j < t] == [j for j in again if j < t]


def test_an_encoder_does_use_later_tokens():
  """The test above can fail: column sums let the future choose."""
  cfg = config('encoder')
  one = jnp.ones_like(SEGMENTS)
  want, _, sets = forward(cfg, tokens(), segment_ids=one)
  other = tokens().at[:, 12:].set(3)
  got, _, new = forward(cfg, other, segment_ids=one)
  assert not np.array_equal(got.hidden[:, :12], want.hidden[:, :12])
  assert [left_in(sets, b) for b in range(3)] != [
    left_in(new, b) for b in range(3)
  ]


@pytest.mark.parametrize('kind', ['encoder', 'decoder_lm'])
def test_documents_never_mix(kind):
  """Only the heads of an encoder are one choice for the whole row."""
  cfg = config(kind, ALL_HEADS if kind == 'encoder' else CASCADE)
  want = forward(cfg, tokens(), segment_ids=SEGMENTS)[0].hidden
  for which in (0, 1, 2):
    inside = SEGMENTS == which
    mixed = jnp.where(inside, (tokens() + 7) % V, tokens())
    got = forward(cfg, mixed, segment_ids=SEGMENTS)[0].hidden
    same = np.asarray(got == want).all(-1)
    assert same[~np.asarray(inside)].all()
    assert not same[np.asarray(inside)].any()


def test_padding_has_no_say():
  """Not in the choice of heads either."""
  cfg, padding = config(), SEGMENTS == 0
  want = forward(cfg, tokens(), segment_ids=SEGMENTS)[0].hidden
  mixed = jnp.where(padding, (tokens() + 7) % V, tokens())
  got = forward(cfg, mixed, segment_ids=SEGMENTS)[0].hidden
  same = np.asarray(got == want).all(-1)
  np.testing.assert_array_equal(same, ~np.asarray(padding))


@pytest.mark.parametrize('kind', ['encoder', 'decoder_lm'])
def test_a_document_is_pruned_as_if_alone(kind):
  """Up to `documents` of a row, wherever they lie."""
  cfg = config(kind, ALL_HEADS if kind == 'encoder' else CASCADE)
  batch = tokens()
  positions = jnp.asarray(np.r_[:11, :13], jnp.int32)[None].repeat(3, 0)
  packed = forward(
    cfg, batch, segment_ids=SEGMENTS, positions=positions, train=False
  )[0].hidden[2, 11:]
  fill = jnp.zeros((3, 11), jnp.int32)
  alone = forward(
    cfg,
    jnp.concatenate([batch[:, 11:], fill], 1),
    segment_ids=jnp.asarray([1] * 13 + [0] * 11, jnp.int32)[None].repeat(3, 0),
    positions=jnp.asarray(np.r_[:13, :11], jnp.int32)[None].repeat(3, 0),
    train=False,
  )[0].hidden[2, :13]
  oracles.check_close(packed, alone, gradient=True)


@pytest.mark.parametrize('kind', ['encoder', 'decoder_lm'])
def test_keep_one_is_bit_equal_to_dense(kind):
  everything = CascadeConfig(token_keep=1.0, head_keep=1.0, value_keep=1.0)
  cfg = config(kind, everything, 'xla')
  for segments in (None, SEGMENTS):
    got, *_ = forward(cfg, tokens(), segment_ids=segments)
    dense, *_ = forward(read_densely(cfg), tokens(), segment_ids=segments)
    np.testing.assert_array_equal(got.hidden, dense.hidden)
    assert [float(got.aux[k]) for k in sorted(got.aux)] == [1, 1, 1, 1]


def test_the_schedule_climbs_its_rungs_in_one_program():
  """Amount 0 is dense to the bit, 1 is the whole pruning; none recompiles."""
  ramp = ScheduleConfig('linear', init=0.0, final=1.0, begin=2, length=4)
  whole = dataclasses.replace(CASCADE, value_keep=1.0, rungs=2)
  moving = dataclasses.replace(whole, amount=ramp)
  moving = config('decoder_lm', moving, 'xla')
  seen, hidden = [], {}
  for step in range(8):
    out, *_ = forward(moving, tokens(), step=step)
    seen.append([float(out.aux[k]) for k in ('kept_tokens', 'kept_heads')])
    hidden[step] = out.hidden
  assert forward_of(moving, True)._cache_size() == 1
  assert seen[0] == seen[1] == seen[2] == seen[3] == [1, 1]
  assert seen[4] == seen[5] and seen[6] == seen[7]
  assert all(a > b for a, b in zip(seen[3], seen[4], strict=True))
  assert all(a > b for a, b in zip(seen[5], seen[6], strict=True))
  dense, *_ = forward(read_densely(moving), tokens())
  np.testing.assert_array_equal(hidden[0], dense.hidden)
  still, *_ = forward(config('decoder_lm', whole, 'xla'), tokens())
  oracles.check_close(hidden[7], still.hidden, gradient=True)


def test_rungs():
  def of(*args, **kw):
    schedule = ScheduleConfig(*args, **kw)
    return cascade_lib.rungs(CascadeConfig(amount=schedule, rungs=4))

  assert of() == (1.0,)
  assert of('linear', init=0.0, final=1.0) == (0, 0.25, 0.5, 0.75, 1)
  assert of('cubic', init=1.0, final=0.5) == (0.5, 0.625, 0.75, 0.875, 1)
  steps = dict(boundaries=(4, 9), values=(0.0, 0.9, 0.0))
  assert of('piecewise', **steps) == (0, 0.9)


def flops(cfg, length):
  """Of the compiled forward pass, by XLA's own account."""

  def run(state, batch):
    model = nnx.merge(structure(cfg)[0], *state)
    return model(batch, context=AttentionContext(step=0, train=False)).hidden

  batch = jax.ShapeDtypeStruct((2, length), jnp.int32)
  program = compiled(run).lower(structure(cfg)[1], batch).compile()
  return program.cost_analysis()['flops']


@pytest.mark.parametrize(
  'kind, keep', [('encoder', 0.5), ('encoder', 0.25), ('decoder_lm', 0.5)]
)
def test_flops_of_the_compiled_program_fall(kind, keep):
  """By what the shapes say: projections and SwiGLU by rows, scores squared."""
  length, D, H, F = 96, 64, 16, 192
  own = CascadeConfig(token_keep=keep, head_keep=keep)
  cfg = config(
    kind, own, d_model=D, num_heads=4, head_dim=H, mlp_dim=F, num_layers=4
  )
  sizes = survivors.plan(
    own, 4, tokens=length, kv_heads=4, amount=1.0, packed=False
  )

  def work(sizes, measured):
    total = 0
    for i, (n, heads, _) in enumerate(sizes):
      again = measured and kind == 'encoder' and i < 3
      total += 4 * n * D * heads * H + 3 * n * D * F
      total += (2 + again) * n * n * heads * H
    return 2 * 2 * total

  every = [survivors.LayerSize(length, 4, 1024)] * 4
  got, dense = flops(cfg, length), flops(read_densely(cfg), length)
  assert dense == pytest.approx(work(every, False), rel=0.15)
  assert got == pytest.approx(work(sizes, True), rel=0.2)
  assert got < 0.75 * dense if keep == 0.5 else got < 0.55 * dense


def test_heads_of_a_causal_model_come_from_earlier_batches():
  """This batch moves the statistics and has no say in its own pruning."""
  cfg = config('decoder_lm')
  params, stats = arrays(cfg)
  old = np.asarray(stats['layers']['attention']['mechanism']['head_importance'])
  _, moved, _ = forward(cfg, tokens())
  new = np.asarray(moved['layers']['attention']['mechanism']['head_importance'])
  # Heads that a layer lacks are not seen there, and keep what they had.
  assert [int((new[l] != old[l]).sum()) for l in range(L)] == list(HEADS)
  _, same, _ = forward(cfg, tokens(), train=False)
  np.testing.assert_array_equal(
    same['layers']['attention']['mechanism']['head_importance'], old
  )
  # What remains is chosen by the sum over the layers so far.
  ranked = np.argsort(-(old[0] + old[1]), kind='stable')
  assert set(np.flatnonzero(new[2] != old[2])) == set(ranked[:3])
  lifted = np.array(old)
  lifted[:2, ranked[3]] += 10
  stats = {
    'layers': {
      'attention': {'mechanism': {'head_importance': jnp.asarray(lifted)}}
    }
  }
  run = forward_of(cfg, True)
  _, moved, _ = run((params, stats), tokens(), jnp.int32(0), {})
  after = np.asarray(
    moved['layers']['attention']['mechanism']['head_importance']
  )
  assert after[2, ranked[3]] != lifted[2, ranked[3]]


def test_pruned_tokens_stay_out_of_norm_statistics():
  """A layer's batch statistics are those of the tokens that it holds."""
  norm = NormConfig(kind='prepbn', decay_steps=8, scale_init=0.5, eta_init=0.5)
  own = dataclasses.replace(CASCADE, value_keep=1.0, head_keep=1.0)
  cfg = config('decoder_lm', own, norm=norm)
  take = cascade_lib._take

  @compiled
  def run(state, batch):
    streams = []

    def spy(x, at):
      streams.append(take(x, at))
      return streams[-1]

    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(cascade_lib, '_take', spy)
      _, moved, sets = forward_of(cfg).__wrapped__(state, batch, 8, {})
    return moved, sets, [x for x in streams if x.ndim == 3 and x.shape[2] == 16]

  moved, sets, rows = run(arrays(cfg), tokens())
  stats = arrays(cfg)[1]['layers']['attention_norm']['mean']
  assert len(rows) == len(sets) == 3
  for layer, (x, (_, alive)) in enumerate(zip(rows, sets, strict=True), 1):
    inside = np.asarray(x)[np.asarray(alive)].mean(0)
    want = 0.9 * np.asarray(stats[layer]) + 0.1 * inside
    got = moved['layers']['attention_norm']['mean'][layer]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
    assert not np.asarray(alive).all()


@pytest.mark.parametrize('kind', ['encoder', 'decoder_lm'])
def test_a_mesh_changes_nothing(kind):
  cfg = config(kind, ALL_HEADS)
  batch = jnp.tile(tokens(), (2, 1))[:4]
  segments = jnp.tile(SEGMENTS, (2, 1))[:4]
  want, *_ = forward(cfg, batch, segment_ids=segments, train=False)
  mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=1, tensor=2))
  with jax.set_mesh(mesh):
    state = tuple(
      jax.device_put(x, sharding.tree_shardings(x, mesh)) for x in arrays(cfg)
    )
    rows = sharding.batch_sharding(mesh)
    got, *_ = forward_of.__wrapped__(cfg, False)(
      state,
      jax.device_put(batch, rows),
      jnp.int32(0),
      {'segment_ids': jax.device_put(segments, rows)},
    )
  oracles.check_close(got.hidden, want.hidden, gradient=True)
  for name, value in want.aux.items():
    np.testing.assert_allclose(got.aux[name], value, rtol=1e-5)


def test_head_statistics_belong_to_a_model_that_has_them():
  cfg = config('decoder_lm', CASCADE)
  paths = jax.tree_util.tree_leaves_with_path(structure(cfg)[1:])
  names = {jax.tree_util.keystr(path).split("'")[-2] for path, _ in paths}
  assert 'head_importance' in names
  paths = jax.tree_util.tree_leaves_with_path(structure(read_densely(cfg))[1:])
  names = {jax.tree_util.keystr(path).split("'")[-2] for path, _ in paths}
  assert 'head_importance' not in names
