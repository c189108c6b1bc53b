"""NSA against its definition, and every trap that others fell into.

The oracle is `nsa_oracle.py`: loops in float64. Block sizes are never all the
same and lengths are multiples of none of them.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psa_jax.attention import attend as library_attend
from psa_jax.attention.context import AttentionContext
from psa_jax.attention.nsa import NsaConfig, branches, compress
from psa_jax.attention.rotary import rotary
from psa_jax.config import AttentionConfig, ConfigError, ScheduleConfig
from psa_jax.kernels import compressed
from psa_jax.kernels.compressed import ranking, selection
from psa_jax.types import Learned
from tests import oracles
from tests.attention import nsa_oracle
from tests.attention.nsa_oracle import Sizes

pytestmark = pytest.mark.tier('default')

PAIRS = ('k_compress', 'v_compress', 'k_window', 'v_window')
SMALL = Sizes(l=6, d=2, select=8, n=4, w=5)


def config(sizes, implementation='xla', **kw):
  name = 'nsa_tile' if sizes.tile > 1 else 'nsa'
  cfg = NsaConfig(
    compress_block=sizes.l,
    stride=sizes.d,
    select_block=sizes.select,
    blocks=kw.pop('blocks', ScheduleConfig(init=float(sizes.n))),
    initial_blocks=sizes.init,
    local_blocks=sizes.local,
    window=sizes.w,
    tile=sizes.tile,
    **kw,
  )
  return AttentionConfig(name=name, nsa=cfg, implementation=implementation)


def inputs(sizes, T=37, K=2, G=2, H=8, Hv=6, B=2, shared=False, positions=True):
  """q, k, v and what NSA learns, by name."""
  rng = np.random.default_rng(T + 10 * G + H)

  def draw(*shape, size=1.0):
    return (rng.normal(size=shape) * size).astype(np.float32)

  found = {'q': draw(B, T, K * G, H, size=2), 'k': draw(B, T, K, H)}
  found['v'] = draw(B, T, K, Hv)
  found['gates'] = rng.uniform(size=(B, T, K * G, 3)).astype(np.float32)
  if not shared:
    for name in PAIRS:
      found[name] = draw(B, T, K, H if name[0] == 'k' else Hv)
  for x, width in (('k', H), ('v', Hv)):
    found[f'{x}_place'] = draw(sizes.l, width)
    found[f'{x}_in'] = draw(sizes.l, width, 5, size=(sizes.l * width) ** -0.5)
    found[f'{x}_out'] = draw(5, width, size=0.7)
  if positions:
    table = rotary(jnp.arange(T)[None], head_dim=H, theta=100.0)
    found['cos'], found['sin'] = (
      np.broadcast_to(x, (B, *x.shape[1:])) for x in table
    )
  return found


def learned(x):
  """`Learned` from the arrays of `inputs`."""
  heads = {n: x[n] for n in ('gates', *PAIRS) if n in x}
  tokens = {n: x[n] for n in ('cos', 'sin') if n in x}
  weights = {n: w for n, w in x.items() if n[:2] in ('k_', 'v_')}
  return Learned(
    heads, tokens, {n: weights[n] for n in weights if n not in heads}
  )


def attend(x, cfg, segments=None, step=0, train=True):
  x = {n: jnp.asarray(a) for n, a in x.items()}
  return library_attend(
    x['q'],
    x['k'],
    x['v'],
    config=cfg,
    learned=learned(x),
    context=AttentionContext(step=step, segment_ids=segments, train=train),
  )


run = jax.jit(attend, static_argnames=('cfg', 'train'))


def oracle(x, sizes, segments=None):
  angles = np.arctan2(x['sin'][0], x['cos'][0]) if 'cos' in x else None
  own = {n: a for n, a in x.items() if n not in ('q', 'k', 'v', 'cos', 'sin')}
  return nsa_oracle.Nsa(x['q'], x['k'], x['v'], own, sizes, segments, angles)


def documents(T, B=2):
  """Boundaries inside a compressed block and inside a selected one."""
  cut = [np.searchsorted([T // 3, T // 3 + 5], np.arange(T), 'right')]
  cut += [np.searchsorted([T // 2 + 1], np.arange(T), 'right')] * (B - 1)
  return np.stack(cut).astype(int).tolist()


def chosen(x, sizes):
  """{(b, kv head, t): blocks that are read} by the library's lists."""
  x = {n: jnp.asarray(a) for n, a in x.items()}
  cfg, raw = config(sizes).nsa, learned(x)
  q, k, v = (x[n] for n in 'qkv')
  kc, vc = compress.compress_pair(
    *compress.raw_pair(k, v, raw),
    raw,
    block=sizes.l,
    stride=sizes.d,
  )
  _, lse = compressed.compressed_attention(
    q, kc, vc, block=sizes.l, stride=sizes.d
  )
  T = q.shape[1]
  ids, counts, _ = branches.select(
    q,
    kc,
    lse,
    config(sizes),
    branches.blocks_at(cfg, 0, True),
    None,
    sizes.tile,
    -(-T // sizes.select),
  )
  ids, counts = np.asarray(ids), np.asarray(counts)
  return {
    (b, h, t): [*ids[b, h, t // sizes.tile][: counts[b, h, t // sizes.tile]]]
    for b in range(len(ids))
    for h in range(ids.shape[1])
    for t in range(T)
  }


# Sizes, shapes, and whether rows are packed with documents.
CASES = {
  'overlap, G=2': (SMALL, {}, True),
  'overlap, one document': (SMALL, {}, False),
  'one head': (SMALL, dict(K=1, G=1, B=1), True),
  'G=3, shared': (
    Sizes(l=4, d=4, select=8, n=3, w=9),
    dict(G=3, shared=True),
    True,
  ),
  'G=16': (Sizes(l=6, d=3, select=9, n=4, w=4), dict(K=1, G=16, B=1), False),
  'all sizes equal': (Sizes(l=4, d=4, select=4, n=5, w=4), dict(B=1), True),
  'l = select, no positions': (
    Sizes(l=8, d=2, select=8, n=4, w=3),
    dict(positions=False, T=41, B=1),
    True,
  ),
  'more initial and local': (
    Sizes(l=4, d=2, select=4, n=7, w=3, init=2, local=3),
    dict(B=1, G=4),
    True,
  ),
  'tile': (dataclasses.replace(SMALL, tile=4), {}, True),
  'tile of a block, G=8': (
    Sizes(l=4, d=2, select=8, n=3, w=5, tile=8, local=1),
    dict(K=1, G=8, T=43, B=1),
    False,
  ),
}


@pytest.mark.parametrize('case', list(CASES))
def test_value_and_gradients(case):
  sizes, kw, cut = CASES[case]
  x = inputs(sizes, **kw)
  segments = documents(x['q'].shape[1], len(x['q'])) if cut else None
  ids = None if segments is None else jnp.asarray(segments)
  want = oracle(x, sizes, segments)
  d_out = np.random.default_rng(1).normal(size=want.out.shape)

  def loss(x):
    out = attend(x, config(sizes), ids).out
    return (out * d_out.astype(np.float32)).sum(), out

  (_, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(x)
  oracles.check_close(out, want.out)
  for name, grad in want.grads(d_out).items():
    oracles.check_close(grads[name], grad, gradient=True, what=name)


def test_paper_head_widths_192_and_128():
  sizes = Sizes(l=4, d=2, select=8, n=3, w=4)
  x = inputs(sizes, T=21, K=1, G=2, H=192, Hv=128, B=1)
  out = run(x, config(sizes)).out
  assert out.shape == (1, 21, 2, 128)
  oracles.check_close(out, oracle(x, sizes).out)


@pytest.mark.parametrize('implementation', ['reference', 'xla'])
@pytest.mark.parametrize('T', [1, 5, 6, 7, 8, 9, 24])
def test_short_sequences(T, implementation):
  """None, one, two complete blocks; fewer blocks than n."""
  x = inputs(SMALL, T=T, B=1)
  out = run(x, config(SMALL, implementation)).out
  oracles.check_close(out, oracle(x, SMALL).out)


def test_the_block_score_counts_shared_cells():
  """Equation 9, 0-based, against a count; the paper's sizes give 1 2 2 2 1."""
  for l, d, select in (
    (32, 16, 64),
    (4, 4, 4),
    (6, 2, 8),
    (8, 2, 8),
    (9, 3, 9),
  ):
    sizes = Sizes(l=l, d=d, select=select, n=3, w=1)
    T = 5 * select + d
    C = len(nsa_oracle.blocks(T, sizes))
    blocks = -(-T // select)
    spec = compressed.api.Spec(l, d, 1.0, select, 1)
    got = jnp.exp(selection.block_scores(jnp.log(jnp.eye(C)), blocks, spec))
    want = [
      [nsa_oracle.overlap(m, j, sizes) for j in range(blocks)] for m in range(C)
    ]
    np.testing.assert_allclose(got, want, 1e-6)
  # Block 2 of 64 shares cells with compressed keys 7 .. 11.
  paper = Sizes(l=32, d=16, select=64, n=16, w=512)
  shared = [nsa_oracle.overlap(m, 2, paper) for m in range(6, 13)]
  assert shared == [0, 1, 2, 2, 2, 1, 0]


@pytest.mark.parametrize('tile', [1, 4])
@pytest.mark.parametrize('G', [1, 2, 4])
def test_selection_is_that_of_the_oracle(G, tile):
  """Softmax a head, then the sum over the group, for every query and head."""
  sizes = Sizes(l=4, d=2, select=8, n=5, w=3, tile=tile)
  x = inputs(sizes, T=93, G=G)
  found = chosen(x, sizes)
  want = oracle(x, sizes).chosen
  assert {at: set(blocks) for at, blocks in found.items()} == want
  for (_, _, t), blocks in found.items():
    own = t // sizes.select
    assert len(blocks) == len(set(blocks)) == min(sizes.n, own + 1)
    assert {0, own, max(own - 1, 0)} <= set(blocks)
  if tile == 1:  # it really is a choice a query
    last = [found[0, 0, t] for t in range(80, 88)]
    assert len({frozenset(blocks) for blocks in last}) > 1


def test_equal_scores_take_the_earlier_block():
  """The forced ones first, then by position, though all scores are the same."""
  cfg = config(Sizes(l=4, d=4, select=4, n=5, w=1)).nsa
  ranges = branches.visible_blocks(cfg, jnp.asarray([[47, 30]]), None)
  for score in (0.0, 0.25):
    scores = jnp.full((1, 1, 2, 12), score)
    ids = ranking.rank(scores, ranges, 5)
    assert ids[0, 0].tolist() == [[11, 10, 0, 1, 2], [7, 6, 0, 1, 2]]


def test_gates_choose_the_branches_and_are_not_normalised():
  x = inputs(SMALL)
  want = oracle(x, SMALL)
  for i, branch in enumerate(want.outs):
    only = np.zeros_like(x['gates'])
    only[..., i] = 0.75
    out = run({**x, 'gates': only}, config(SMALL)).out
    oracles.check_close(out, 0.75 * branch)
  out = run({**x, 'gates': np.ones_like(x['gates'])}, config(SMALL)).out
  oracles.check_close(out, sum(want.outs))


def test_rows_without_a_complete_block_are_zero_and_have_no_nan():
  x = inputs(SMALL)
  gates = np.zeros_like(x['gates'])
  gates[..., 0] = 1
  x['gates'] = gates

  def loss(x):
    out = attend(x, config(SMALL)).out
    return (out**2).sum(), out

  grads, out = jax.jit(jax.grad(loss, has_aux=True))(x)
  assert (np.asarray(out[:, : SMALL.l - 1]) == 0).all()
  assert (np.asarray(out[:, SMALL.l - 1]) != 0).all()
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


@pytest.mark.parametrize('tile', [1, 8])
def test_all_blocks_and_the_gate_of_selection_alone_are_dense(tile):
  sizes = Sizes(l=6, d=2, select=8, n=9, w=2, tile=tile)
  x = inputs(sizes, T=67)
  x['gates'] = np.zeros_like(x['gates']) + np.float32([0, 1, 0])
  mask = oracles.causal_mask(2, 2, 67, 67)
  out, aux = run(x, config(sizes))
  oracles.check_close(out, oracles.attention(x['q'], x['k'], x['v'], mask)[0])
  assert aux['density'] == 1


def test_n_follows_its_schedule_without_compiling_again():
  schedule = ScheduleConfig(kind='linear', init=9.0, final=3.0, length=3)
  x, traces = inputs(SMALL, T=67), []
  cfg = config(SMALL, blocks=schedule, eval_blocks=4)

  def count(x, step):
    traces.append(1)
    return attend(x, cfg, step=step)

  step = jax.jit(count)
  for at, n in enumerate((9, 7, 5, 3)):
    out, aux = step(x, jnp.int32(at))
    want = oracle(x, dataclasses.replace(SMALL, n=n))
    oracles.check_close(out, want.out)
    mean = np.mean([len(blocks) for blocks in want.chosen.values()])
    np.testing.assert_allclose(aux['selected_blocks'], mean, 1e-6)
  assert len(traces) == 1
  out = run(x, cfg, step=3, train=False).out
  oracles.check_close(out, oracle(x, dataclasses.replace(SMALL, n=4)).out)


def test_density_counts_the_rows_that_are_read():
  x, T = inputs(SMALL, T=67), 67
  segments = documents(T)
  for seg in (None, segments):
    want = oracle(x, SMALL, seg)
    read = sum(mask.sum(-1).astype(float) for _, _, mask in want.branches)
    visible = oracles.causal_mask(2, 2, T, T, seg and (seg, seg)).sum(-1)
    share = np.minimum(read / visible, 1).mean()
    ids = None if seg is None else jnp.asarray(seg)
    aux = run(x, config(SMALL), ids).aux
    np.testing.assert_allclose(aux['density'], share, 1e-6)


def test_a_block_that_straddles_documents_is_seen_by_nobody():
  """Its keys change nothing in the compressed branch of either document."""
  T, cut = 37, 15
  x = inputs(SMALL, T=T, B=1)
  gates = np.zeros_like(x['gates'])
  gates[..., 0] = 1
  x['gates'] = gates
  segments = jnp.asarray((np.arange(T) >= cut).astype(int))[None]
  want = run(x, config(SMALL), segments).out
  # Tokens 14 and 15: the first lies in straddling blocks and in one that ends
  # with it; token 15 is in straddling ones only, as documents begin at 16 for
  # a grid of 2.
  other = {**x, 'k_compress': x['k_compress'].copy()}
  other['k_compress'][:, cut] += 5
  np.testing.assert_array_equal(run(other, config(SMALL), segments).out, want)
  assert not np.array_equal(run(other, config(SMALL)).out, want)


def test_a_needle_far_back_is_selected():
  """Scores of thousands of blocks do not collapse: it is found at any depth."""
  T, H, sizes = 4096, 8, Sizes(l=32, d=16, select=64, n=4, w=8)
  rng = np.random.default_rng(0)
  q = np.zeros((1, 1, 1, H), np.float32)
  q[..., 0] = 12
  for depth in (130, 1000, 2900):
    k = rng.normal(size=(1, T, 1, H)).astype(np.float32)
    k[0, depth : depth + 32, 0, 0] = 8
    kc = np.stack(
      [k[:, i : i + 32].mean(1) for i in nsa_oracle.blocks(T, sizes)], 1
    )
    t = jnp.full((1, 1), T - 1)
    lse = jax.nn.logsumexp(jnp.einsum('bckh,bqkh->bqkc', kc, q) * H**-0.5, -1)
    ids = compressed.top_blocks(
      jnp.asarray(q),
      jnp.asarray(kc),
      lse,
      t,
      branches.visible_blocks(config(sizes).nsa, t, None),
      block=32,
      stride=16,
      select_block=64,
      blocks=64,
      width=4,
    )
    assert set(np.asarray(ids).ravel()) == {0, 62, 63, depth // 64}


def test_implementations_agree_in_half_precision():
  """Sums are f32: with all blocks read there is no choice to differ in."""
  sizes = Sizes(l=6, d=2, select=8, n=5, w=5)
  x = inputs(sizes)
  half = {n: jnp.asarray(a, jnp.bfloat16) for n, a in x.items()}
  half |= {n: x[n] for n in ('gates', 'cos', 'sin')}
  exact = {n: np.asarray(a, np.float32) for n, a in half.items()}
  want = oracle(exact, sizes).out
  out = run(half, config(sizes)).out
  assert out.dtype == jnp.bfloat16
  oracles.check_close(out, want, 'bfloat16')


def test_scan_and_vmap_and_grad_trace():
  """What another implementation could not do under jit."""
  x = inputs(SMALL, T=20)

  def once(carry, _):
    out = attend({**x, 'q': carry}, config(SMALL)).out
    return carry + out.mean(), None

  def scanned(q):
    return jax.lax.scan(once, q, length=2)[0].sum()

  assert np.isfinite(jax.jit(jax.grad(scanned))(jnp.asarray(x['q']))).all()
  weights = {n: a for n, a in x.items() if a.shape[0] != 2}
  rows = {n: a[:, None] for n, a in x.items() if a.shape[0] == 2}
  one = jax.vmap(lambda rows: attend({**weights, **rows}, config(SMALL)).out)
  oracles.check_close(one(rows)[:, 0], run(x, config(SMALL)).out)


def test_what_cannot_be_is_refused():
  x = {n: jnp.asarray(a) for n, a in inputs(SMALL, T=9).items()}
  with pytest.raises(ConfigError, match='causal'):
    library_attend(
      x['q'],
      x['k'],
      x['v'],
      config=config(SMALL),
      learned=learned(x),
      context=AttentionContext(step=0, causal=False),
    )
  with pytest.raises(ConfigError, match='learned is None'):
    library_attend(
      x['q'],
      x['k'],
      x['v'],
      config=config(SMALL),
      context=AttentionContext(step=0),
    )
  with pytest.raises(ConfigError, match=r'network \(6, 8, 5\)'):
    attend(x, config(dataclasses.replace(SMALL, l=4)))
  with pytest.raises(
    ConfigError,
    match='tile is 3, but it must divide',
  ):
    attend(x, config(dataclasses.replace(SMALL, tile=3)))
  with pytest.raises(ConfigError, match='goes down to 2, but'):
    attend(x, config(dataclasses.replace(SMALL, n=2)))
  with pytest.raises(ValueError, match='multiple of .*stride, which is 4'):
    attend(x, config(dataclasses.replace(SMALL, d=4)))
  with pytest.raises(ValueError, match='select_block, which is 4'):
    attend(x, config(dataclasses.replace(SMALL, select=4)))
