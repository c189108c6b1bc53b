"""One table of mechanisms, one list of properties.

A new mechanism is tested by adding a row to `ROWS`. The restricted setting
must really restrict on these shapes, and the `open` one must switch every
restriction off.
"""

import dataclasses
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psa_jax.attention import attend as library_attend
from psa_jax.attention.cascade import CascadeConfig
from psa_jax.attention.context import AttentionContext
from psa_jax.attention.dsa import DsaConfig
from psa_jax.attention.hybrid import HybridConfig
from psa_jax.attention.nsa import NsaConfig
from psa_jax.attention.psa import PsaConfig
from psa_jax.attention.topk import TopkConfig
from psa_jax.config import (
  AttentionConfig,
  ConfigError,
  ScheduleConfig,
  SoftmaxConfig,
)
from psa_jax.types import Learned
from tests import oracles, tiers

B, T, N, K, H, HV = 2, 96, 4, 2, 16, 24


def psa(keep=0.3, **kw):
  cfg = dict(block_q=16, block_k=8, window=12, sink_blocks=1)
  cfg |= dict(keep=ScheduleConfig(init=keep, final=keep))
  return AttentionConfig(name='psa', psa=PsaConfig(**cfg | kw))


def psa_mass(mass=0.5, **kw):
  schedule = ScheduleConfig(init=mass, final=mass)
  return psa(budget='mass', mass=schedule, **kw)


def approximate(kind, mix=1.0, **kw):
  softmax = SoftmaxConfig(kind, mix=ScheduleConfig(init=mix), **kw)
  keep = 0.3 if mix else 1.0
  return dataclasses.replace(psa(keep), softmax=softmax)


def topk(keep=0.25, mix=1.0, **kw):
  cfg = dict(keep=ScheduleConfig(init=keep), mix=ScheduleConfig(init=mix))
  return AttentionConfig(name='topk', topk=TopkConfig(**cfg | kw))


def hybrid(keep=0.25, **kw):
  cfg = dict(block_q=16, block_k=8, window=12, min_blocks=1)
  cfg |= dict(keep=ScheduleConfig(init=keep))
  return AttentionConfig(name='hybrid', hybrid=HybridConfig(**cfg | kw))


CUBIC = dict(coefficients=(0.3, 0.8, 0.05, 0.01), clamp=5.0)


def dsa(top_k=24, **kw):
  cfg = dict(block_q=16, block_k=8, window=12, heads=2, width=8)
  cfg |= dict(top_k=ScheduleConfig(init=float(top_k)))
  return AttentionConfig(name='dsa', dsa=DsaConfig(**cfg | kw))


def cascade(amount):
  """One layer: values are pruned; tokens and heads are a model's affair."""
  schedule = ScheduleConfig(init=amount)
  own = CascadeConfig(value_keep=0.4, amount=schedule)
  return AttentionConfig(name='cascade', cascade=own)


def nsa(name='nsa', blocks=3.0, **kw):
  cfg = dict(compress_block=8, stride=4, select_block=8, window=3, tile=4)
  cfg |= dict(blocks=ScheduleConfig(init=blocks), local_blocks=1)
  return AttentionConfig(name=name, nsa=NsaConfig(**cfg | kw))


def nsa_open(name='nsa'):
  """One block that holds everything, and none that is complete."""
  sizes = dict(compress_block=128, select_block=128, window=128, tile=128)
  return nsa(name, **sizes)


def nsa_learned(q, k, v):
  """The gates of what is not compressed add up to 1, as in no real model."""
  gate = jax.nn.sigmoid(q[..., :2].astype(jnp.float32))
  gates = jnp.stack([gate[..., 0], gate[..., 1], 1 - gate[..., 1]], -1)
  heads = dict(gates=gates, k_compress=k + 1, v_compress=v - 1)
  heads |= dict(k_window=k, v_window=v)
  weights = {}
  rng = np.random.default_rng(5)
  for name, width in (('k', k.shape[-1]), ('v', v.shape[-1])):
    for part, shape, size in (
      ('place', (8, width), 1),
      ('in', (8, width, 6), (8 * width) ** -0.5),
      ('out', (6, width), 0.5),
    ):
      draw = jnp.asarray(rng.normal(size=shape) * size, q.dtype)
      weights[f'{name}_{part}'] = draw
  return Learned(heads, {}, weights)


@dataclasses.dataclass(frozen=True)
class Row:
  """A mechanism: restricted, and with every restriction off.

  `open` is None if it is never exact dense attention. `softmax` says that it
  is a softmax over keys, and that its schedules begin dense; linear attention
  is none and has none.
  `ramp` are the values between which its schedules move.
  """

  config: AttentionConfig
  open: AttentionConfig | None
  sparse: bool = True
  softmax: bool = True
  ramp: tuple[float, float] = (1.0, 1e-5)


ROWS = {
  'dense': Row(
    AttentionConfig('dense'), AttentionConfig('dense'), sparse=False
  ),
  'psa': Row(psa(), psa(keep=1.0)),
  # Few rows and 16 keys: these go by key block (`kernels/README.md`).
  'psa per token': Row(
    psa(block_q=1, block_k=16), psa(keep=1.0, block_q=1, block_k=16)
  ),
  'psa mass': Row(psa_mass(), psa_mass(mass=1.0)),
  'psa cubic': Row(
    approximate('polynomial', **CUBIC), approximate('polynomial', mix=0.0)
  ),
  'psa sas': Row(approximate('sas'), None),
  'psa bounds': Row(
    psa_mass(1e-5, scoring='bounds'), psa_mass(1.0, scoring='bounds')
  ),
  # Integers are never exact: its bounds are in tests/quant/test_on_demand.py.
  'on_demand': Row(AttentionConfig('on_demand'), None, sparse=False),
  'topk': Row(topk(), topk(1.0)),
  'topk cubic': Row(
    topk(sparsify_q=0.5, sparsify_k=0.75, **CUBIC),
    topk(1.0, mix=0.0, coefficients=CUBIC['coefficients']),
  ),
  'topk learned': Row(topk(learnable=True), topk(1.0, mix=0.0, learnable=True)),
  'hybrid': Row(hybrid(), hybrid(1.0)),
  'hybrid per token': Row(
    hybrid(block_q=1, block_k=16), hybrid(1.0, block_q=1, block_k=16)
  ),
  'hybrid bounds': Row(
    hybrid(scoring='bounds', sink_blocks=1), hybrid(1.0, scoring='bounds')
  ),
  'dsa': Row(dsa(), dsa(T), ramp=(T, 1.0)),
  'dsa per token, itself': Row(
    dsa(9, block_q=1, block_k=1, window=1, sink_blocks=0, keep_self=True),
    None,
    ramp=(T, 1.0),
  ),
  'dsa per token': Row(
    dsa(9, block_q=1, block_k=1, window=1, sink_blocks=0),
    dsa(T, block_q=1, block_k=1, window=1, sink_blocks=0),
    ramp=(T, 1.0),
  ),
  'dsa two stages': Row(
    dsa(pooling='mass'), dsa(warmup_steps=5), ramp=(T, 1.0)
  ),
  'sla': Row(AttentionConfig('sla'), None, softmax=False),
  'cascade': Row(cascade(1.0), cascade(0.0), sparse=False),
  'random': Row(psa(scoring='random'), psa(keep=1.0, scoring='random')),
  'window': Row(psa(scoring='recent'), psa(keep=1.0, scoring='recent')),
  'nsa': Row(nsa(blocks=2.0, select_block=12), nsa_open(), ramp=(12.0, 2.0)),
  'nsa_tile': Row(nsa('nsa_tile'), nsa_open('nsa_tile'), ramp=(12.0, 2.0)),
}
SOFTMAX = [name for name, row in ROWS.items() if row.softmax]


# What stands in for a mechanism's parameters, by its name: a function of q, k
# and v, token by token, so that a leak through it is seen as one through them.
def indexed(q, k, v):
  del v
  queries = q.mean(2)
  weights = 1 + jnp.sin(3 * queries[..., :2].astype(jnp.float32))
  index = queries.reshape(*q.shape[:2], 2, -1)
  return Learned(
    tokens={
      'q': index,
      'weights': weights,
      'k': k.mean(2)[..., : q.shape[3] // 2],
    }
  )


def positioned(q, k, v):
  rng = np.random.default_rng(5)
  table = jnp.asarray(rng.normal(size=(1, 7, *k.shape[2:])), k.dtype)
  taps = jnp.asarray(rng.normal(size=(5, v.shape[3])), jnp.float32)
  weights = {'conv': taps, 'conv_bias': taps[0]}
  table = jnp.broadcast_to(table, (len(q), *table.shape[1:]))
  return Learned(heads={'position': table}, weights=weights)


LEARNED: dict[str, Callable[..., Learned]] = {
  'topk': lambda q, k, v: Learned(
    weights={'coefficients': jnp.asarray(CUBIC['coefficients'])}
  ),
  'dsa': indexed,
  'sla': positioned,
  'nsa': nsa_learned,
  'nsa_tile': nsa_learned,
}
IMPLEMENTATIONS = ('reference', 'xla')
# Between edits four mechanisms that choose keys in other ways; then every
# row; and what costs a program of its own, or many, with one row a mechanism.
QUICK = ('psa', 'topk', 'dsa', 'nsa')
VARIANTS = (
  *('psa per token', 'psa sas', 'psa bounds', 'topk cubic', 'hybrid per token'),
  *('hybrid bounds', 'dsa per token', 'dsa per token, itself'),
  *('random', 'window'),
)
every = pytest.mark.parametrize('name', list(ROWS))
some = pytest.mark.parametrize('name', tiers.cases(ROWS, quick=QUICK))
kinds = pytest.mark.parametrize(
  'name',
  tiers.cases(ROWS, quick=[x for x in ROWS if x not in VARIANTS], tier='all'),
)
default = pytest.mark.tier('default')


def arrays(seed=0, t=T, dtype=jnp.float32, k_heads=K, n_heads=N, h=H):
  rng = np.random.default_rng(seed)
  shapes = (B, t, n_heads, h), (B, t, k_heads, h), (B, t, k_heads, HV)
  # Large queries make the softmax peaked, so that selection matters.
  return tuple(
    jnp.asarray(rng.normal(size=s) * c, dtype)
    for s, c in zip(shapes, (2, 1, 1), strict=True)
  )


def documents(t=T):
  """Segment ids with a boundary inside a tile and inside a block."""
  cut = np.stack([np.arange(t) >= 37, np.arange(t) >= 51])
  return jnp.asarray(1 + cut.astype(np.int32))


def eager(q, k, v, config, segment_ids=None, step=0, train=True):
  make = LEARNED.get(config.name)
  return library_attend(
    q,
    k,
    v,
    config=config,
    learned=None if make is None else make(q, k, v),
    context=AttentionContext(step=step, segment_ids=segment_ids, train=train),
  )


attend = jax.jit(eager, static_argnames=('config', 'train'))


def changed(config, **changes):
  """`config` with other settings of its own mechanism."""
  section = config.mechanism.section
  new = dataclasses.replace(config.mechanism_config, **changes)
  return dataclasses.replace(config, **{section: new})


def scheduled(config, schedule):
  """`config` with every schedule of its own mechanism replaced."""
  own = vars(config.mechanism_config)
  names = [n for n, x in own.items() if isinstance(x, ScheduleConfig)]
  if config.name == 'dsa':  # its other budget is a share
    names = ['top_k']
  return changed(config, **dict.fromkeys(names, schedule))


def using(config, implementation):
  return dataclasses.replace(config, implementation=implementation)


@default
@every
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_shapes_dtypes_and_scalars(name, dtype):
  out, aux = attend(*arrays(dtype=dtype), ROWS[name].config)
  assert out.shape == (B, T, N, HV) and out.dtype == jnp.dtype(dtype)
  assert np.isfinite(np.asarray(out, np.float32)).all()
  assert all(x.shape == () and x.dtype == jnp.float32 for x in aux.values())
  density = float(aux['density'])
  assert 0 < density < 0.9 if ROWS[name].sparse else density == 1


@default
@pytest.mark.parametrize('name', [n for n, r in ROWS.items() if r.open])
@pytest.mark.parametrize(
  ('implementation', 'cut'),
  tiers.cases(
    itertools.product(IMPLEMENTATIONS, (False, True)),
    quick=[('reference', False), ('xla', True)],
    tier='all',
  ),
)
def test_the_limit_is_dense(name, implementation, cut):
  q, k, v = arrays()
  seg = documents() if cut else None
  config = using(ROWS[name].open, implementation)
  pair = (seg, seg) if cut else None
  mask = oracles.causal_mask(B, K, T, T, pair)
  out, aux = attend(q, k, v, config, seg)
  oracles.check_close(out, oracles.attention(q, k, v, mask)[0])
  assert aux['density'] == 1
  d_out = np.random.default_rng(1).normal(size=out.shape)

  def loss(*args):
    return (attend(*args, config, seg)[0] * d_out).sum()

  grads = jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v)
  zero = np.zeros(d_out.shape[:-1])
  want = oracles.attention_grads(q, k, v, mask, d_out, zero)
  for got, grad in zip(grads, want, strict=True):
    oracles.check_close(got, grad, gradient=True)


@some
@pytest.mark.parametrize('t', [15, 16, 31, 50, 63])
def test_future_tokens_change_no_bit_of_the_past(name, t):
  """A leak through a discrete choice has no gradient, so perturb."""
  args = arrays()
  want = attend(*args, ROWS[name].config)[0]
  after = (jnp.arange(T) > t)[None, :, None, None]
  for seed in (7, 8):
    other = arrays(seed)
    mixed = [
      jnp.where(after, 5 * b, a) for a, b in zip(args, other, strict=True)
    ]
    got = attend(*mixed, ROWS[name].config)[0]
    np.testing.assert_array_equal(got[:, : t + 1], want[:, : t + 1])
    assert not np.array_equal(got[:, t + 1 :], want[:, t + 1 :])


@default
@every
def test_packed_documents_never_mix(name):
  """Changing one document changes no bit of the others, and all their past."""
  args, seg = arrays(), documents()
  want = attend(*args, ROWS[name].config, seg)[0]
  for which in (1, 2):
    inside = (seg == which)[..., None, None]
    mixed = [
      jnp.where(inside, 3 * b, a) for a, b in zip(args, arrays(9), strict=True)
    ]
    got = attend(*mixed, ROWS[name].config, seg)[0]
    same = np.asarray(got == want).all(-1).all(-1)
    assert same[np.asarray(seg) != which].all()
    assert not same[np.asarray(seg) == which].all()


@default
@every
@pytest.mark.parametrize(
  'implementation', tiers.cases(IMPLEMENTATIONS, quick=['xla'], tier='all')
)
def test_what_is_not_read_changes_no_bit(name, implementation):
  """Finite numbers, NaN and infinity there give the bits of zeros.

  So do all gradients, which are exactly 0 there. Once another document is not
  read, once what comes after the last query that counts. The tokens' own
  outputs may be NaN, and nothing depends on them.
  """
  check_what_is_not_read(name, implementation, (None, (np.nan, np.inf)))


def check_what_is_not_read(name, implementation, others):
  """What has zeros where nothing reads, and what has each of `others` there."""
  config = using(ROWS[name].config, implementation)
  make = LEARNED.get(config.name, lambda *args: None)

  @jax.jit
  def step(args, learned, seg, read):
    def loss(args, learned):
      out = library_attend(
        *args,
        config=config,
        learned=learned,
        context=AttentionContext(step=0, segment_ids=seg, train=True),
      ).out
      out = jnp.where(read[..., None, None], out, 0)
      return (out * jnp.cos(jnp.arange(out.size).reshape(out.shape))).sum(), out

    grads, out = jax.grad(loss, (0, 1), has_aux=True)(args, learned)
    return out, grads

  def run(seg, read, values):
    """With `values` [B] in all that is not read; None leaves what is there."""
    args = arrays()
    if values is not None:
      values = jnp.asarray(values).reshape(B, 1, 1, 1)
      args = [jnp.where(read[..., None, None], x, values) for x in args]
    return step(tuple(args), make(*args), seg, read)

  two, one = documents(), jnp.ones((B, T), jnp.int32)
  past = jnp.broadcast_to(jnp.arange(T) <= 40, one.shape)
  for seg, read in ((two, two == 1), (two, two == 2), (one, past)):
    want = run(seg, read, (0.0, 0.0))
    for values in others:
      got = run(seg, read, values)
      jax.tree.map(np.testing.assert_array_equal, got, want)
    for grad in want[1][0]:
      assert (np.asarray(grad)[~np.asarray(read)] == 0).all()
      assert (np.asarray(grad)[np.asarray(read)] != 0).any()


@default
@every
def test_a_document_does_not_see_where_it_lies_in_the_pack(name):
  """The first document alone gives what it gives in front of another."""
  args, seg = arrays(), documents()
  want = attend(*args, ROWS[name].config, seg)[0][:, :37]
  alone = [x[:, :37] for x in args]
  got = attend(*alone, ROWS[name].config)[0]
  oracles.check_close(got[:1], want[:1])


@default
@kinds
def test_groups_equal_repeated_heads(name):
  """With equal queries in a group, GQA is attention over repeated heads."""
  q, k, v = arrays(n_heads=K)
  one = attend(q, k, v, ROWS[name].config)[0]
  for g in (3, 16):
    many = attend(jnp.repeat(q, g, 2), k, v, ROWS[name].config)[0]
    oracles.check_close(many, jnp.repeat(one, g, 2))


@some
def test_implementations_agree(name):
  args, config = arrays(), ROWS[name].config
  want = attend(*args, using(config, 'reference'))[0]
  oracles.check_close(attend(*args, using(config, 'xla'))[0], want)


@default
@kinds
def test_jit_equals_eager(name):
  args, config = arrays(), using(ROWS[name].config, 'xla')
  oracles.check_close(eager(*args, config).out, attend(*args, config)[0])


def _lengths():
  """Of every row two lengths, 17 and another in turn; all four in `all`."""
  lengths = (1, 7, 95)
  for i, name in enumerate(ROWS):
    yield from tiers.cases(
      [(name, t) for t in (17, *lengths)],
      quick=[(name, 17), (name, lengths[i % 3])],
      tier='all',
    )


@default
@pytest.mark.parametrize(('name', 't'), list(_lengths()))
def test_odd_lengths(name, t):
  q, k, v = arrays(t=t)
  config = ROWS[name].config
  out = attend(q, k, v, using(config, 'xla'))[0]
  want = attend(q, k, v, using(config, 'reference'))[0]
  oracles.check_close(out, want)
  if ROWS[name].softmax:
    np.testing.assert_allclose(out[:, 0], np.repeat(v[:, 0], N // K, 1), 1e-6)


@default
@kinds
def test_a_mesh_changes_nothing(name):
  """Rows over data, groups over tensor, inside shard_map: same numbers."""
  args, seg = arrays(), documents()
  want, want_aux = attend(*args, ROWS[name].config, seg)
  axes = (jax.sharding.AxisType.Auto,) * 3
  mesh = jax.make_mesh((2, 1, 2), ('data', 'fsdp', 'tensor'), axes)
  with jax.set_mesh(mesh):
    run = jax.jit(lambda *args: eager(*args, ROWS[name].config, seg))
    got, aux = run(*args)
    text = str(jax.make_jaxpr(run)(*args))
  oracles.check_close(got, want)
  assert set(aux) == set(want_aux)
  np.testing.assert_allclose(aux['density'], want_aux['density'], 1e-6)
  for name in aux:
    if name.startswith('loss/'):
      np.testing.assert_allclose(aux[name], want_aux[name], 1e-5)
  assert 'shard_map' in text


@default
@pytest.mark.parametrize('name', SOFTMAX)
def test_one_compilation_for_all_steps(name):
  """A schedule that really moves: density falls, nothing is traced again."""
  traces, config = [], ROWS[name].config
  init, final = ROWS[name].ramp
  ramp = ScheduleConfig('linear', float(init), float(final), length=3)
  config = scheduled(config, ramp)

  @jax.jit
  def run(step, *args):
    traces.append(1)
    return eager(*args, config, step=step).aux['density']

  seen = [float(run(jnp.int32(step), *arrays())) for step in range(4)]
  assert len(traces) == 1
  assert seen[0] == 1
  assert seen[3] < seen[0] if ROWS[name].sparse else seen[3] == 1


def test_unknown_mechanism_is_named():
  with pytest.raises(ConfigError, match=r"unknown 'nsaa'; did you mean 'nsa'"):
    AttentionConfig('nsaa')
