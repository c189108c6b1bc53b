"""NSA in NumPy float64, written from the paper in loops over queries.

Nothing here imports psa_jax. Selection counts shared cells one by one, and
not by the sums of equation 9; gradients are the chain rule by hand.
"""

import dataclasses

import numpy as np

from tests import oracles


@dataclasses.dataclass(frozen=True)
class Sizes:
  """The letters of the paper; `init` and `local` are blocks, inside n."""

  l: int
  d: int
  select: int
  n: int
  w: int
  init: int = 1
  local: int = 2
  tile: int = 1


def rotate(x, angle):
  """Turns channels i and i + H/2 of x [..., H] by angle [..., H/2]."""
  half = x.shape[-1] // 2
  a, b = x[..., :half], x[..., half:]
  cos, sin = np.cos(angle), np.sin(angle)
  return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def silu(x):
  """Returns x sigmoid(x)."""
  return x / (1 + np.exp(-x))


def blocks(T, sizes):
  """First tokens of the complete blocks."""
  return [i for i in range(0, T, sizes.d) if i + sizes.l <= T]


def compress(x, place, w_in, w_out, sizes, angles=None):
  """[B, C, K, H] from x [B, T, K, H]; `angles` [T, H/2] of its tokens."""
  B, T, K, H = x.shape
  begins = blocks(T, sizes)
  out = np.zeros((B, len(begins), K, H))
  for b, (m, i), h in (
    (b, mi, h) for b in range(B) for mi in enumerate(begins) for h in range(K)
  ):
    flat = (x[b, i : i + sizes.l, h] + place).reshape(-1)
    out[b, m, h] = silu(flat @ w_in.reshape(-1, w_in.shape[-1])) @ w_out
    if angles is not None:
      out[b, m, h] = rotate(out[b, m, h], angles[i + sizes.l - 1])
  return out


def compress_grads(x, place, w_in, w_out, sizes, dy, angles=None):
  """Gradients of sum(dy * compress(...)): x, place, w_in, w_out."""
  dx, dplace, dw_in, dw_out = (
    np.zeros_like(a) for a in (x, place, w_in, w_out)
  )
  flat_in = w_in.reshape(-1, w_in.shape[-1])
  for b, h in np.ndindex(x.shape[0], x.shape[2]):
    for m, i in enumerate(blocks(x.shape[1], sizes)):
      flat = (x[b, i : i + sizes.l, h] + place).reshape(-1)
      a = flat @ flat_in
      g = dy[b, m, h]
      if angles is not None:
        g = rotate(g, -angles[i + sizes.l - 1])
      dw_out += np.outer(silu(a), g)
      sigmoid = 1 / (1 + np.exp(-a))
      da = (w_out @ g) * sigmoid * (1 + a * (1 - sigmoid))
      dw_in += np.outer(flat, da).reshape(w_in.shape)
      dflat = (flat_in @ da).reshape(place.shape)
      dx[b, i : i + sizes.l, h] += dflat
      dplace += dflat
  return dx, dplace, dw_in, dw_out


def document_start(segments, b, t):
  """First position of the document of token t."""
  if segments is None:
    return 0
  while t and segments[b][t - 1] == segments[b][t]:
    t -= 1
  return t


def compress_mask(B, K, T, sizes, segments=None):
  """[B, K, T, C] bool: complete blocks that lie in the query's document."""
  begins = blocks(T, sizes)
  mask = np.zeros((B, K, T, len(begins)), bool)
  for b, t in np.ndindex(B, T):
    start = document_start(segments, b, t)
    for m, i in enumerate(begins):
      mask[b, :, t, m] = start <= i and i + sizes.l - 1 <= t
  return mask


def overlap(m, j, sizes):
  """d-cells that compressed block m and selected block j have in common."""
  cells = range(m, m + sizes.l // sizes.d)
  per = sizes.select // sizes.d
  return len(set(cells) & set(range(j * per, (j + 1) * per)))


def scores(q, kc, mask, sizes):
  """{(b, kv head, t): {block: log score}} over the blocks up to the query's."""
  B, T, N, H = q.shape
  K = kc.shape[2]
  found = {}
  for b, h, t in np.ndindex(B, K, T):
    total = {j: [] for j in range(t // sizes.select + 1)}
    seen = np.flatnonzero(mask[b, h, t])
    for n in range(h * (N // K), (h + 1) * (N // K)):
      if seen.size:
        s = kc[b, seen, h] @ q[b, t, n] * H**-0.5
        for m, x in zip(seen, s - oracles.log_sum(s), strict=True):
          for j in total:
            total[j] += [x] * overlap(m, j, sizes)
    found[b, h, t] = {j: oracles.log_sum(x) for j, x in total.items()}
  return found


def select(q, kc, mask, sizes, segments=None):
  """{(b, kv head, t): set of blocks} that each query reads."""
  B, T, _, _ = q.shape
  found = scores(q, kc, mask, sizes)
  chosen = {}
  for b, h, t in np.ndindex(B, kc.shape[2], T):
    first = t - t % sizes.tile
    own = first // sizes.select
    begin = document_start(segments, b, first) // sizes.select
    visible = range(begin, own + 1)
    forced = [
      j for j in visible if j < begin + sizes.init or j > own - sizes.local
    ]
    rest = [j for j in visible if j not in forced]
    rest.sort(key=lambda j: (-found[b, h, first][j], j))
    chosen[b, h, t] = set(forced + rest[: max(0, sizes.n - len(forced))])
  return chosen


def select_mask(chosen, B, K, T, sizes, segments=None):
  """[B, K, T, T] bool: the keys of the chosen blocks."""
  mask = oracles.causal_mask(B, K, T, T, segments and (segments, segments))
  for b, h, t in np.ndindex(B, K, T):
    for s in range(T):
      mask[b, h, t, s] &= s // sizes.select in chosen[b, h, t]
  return mask


def window_mask(B, K, T, sizes, segments=None):
  """[B, K, T, T] bool: the last w keys of the document."""
  mask = oracles.causal_mask(B, K, T, T, segments and (segments, segments))
  for t in range(T):
    mask[:, :, t, : max(0, t - sizes.w + 1)] = False
  return mask


class Nsa:
  """One call: the three branches, their sum, and all gradients.

  Attributes:
    chosen: blocks by (b, kv head, t).
    out: [B, T, N, Hv].
  """

  def __init__(self, q, k, v, learned, sizes, segments=None, angles=None):
    """Computes the output.

    Args:
      q: [B, T, N, H], rotated; k: [B, T, K, H], rotated; v: [B, T, K, Hv].
      k: see q.
      v: see q.
      learned: `gates` [B, T, N, 3]; `k_compress`, `v_compress`, `k_window`,
        `v_window`, or none of them; `k_place` ... `v_out`.
      sizes: the letters.
      segments: [B, T] nested lists, or None.
      angles: [T, H/2] of the tokens; None does not rotate.
    """
    one = {x: np.asarray(a, np.float64) for x, a in learned.items()}
    self.q, self.k, self.v = (np.asarray(x, np.float64) for x in (q, k, v))
    self.gates, self.sizes, self.angles = one['gates'], sizes, angles
    self.nets = {
      x: [one[f'{x}_{y}'] for y in ('place', 'in', 'out')] for x in 'kv'
    }
    self.shared = 'k_compress' not in one
    if self.shared:
      self.raw = self.k, self.v
      if angles is not None:
        self.raw = rotate(self.k, -angles[None, :, None]), self.v
      window = self.k, self.v
    else:
      self.raw = one['k_compress'], one['v_compress']
      window = one['k_window'], one['v_window']
    kc = compress(self.raw[0], *self.nets['k'], sizes, angles)
    vc = compress(self.raw[1], *self.nets['v'], sizes)
    (B, T), K = self.q.shape[:2], self.k.shape[2]
    seen = compress_mask(B, K, T, sizes, segments)
    self.chosen = select(self.q, kc, seen, sizes, segments)
    self.branches = [
      (kc, vc, seen),
      (
        self.k,
        self.v,
        select_mask(self.chosen, B, K, T, sizes, segments),
      ),
      (*window, window_mask(B, K, T, sizes, segments)),
    ]
    self.outs = [
      oracles.attention(self.q, *branch)[0] for branch in self.branches
    ]
    self.out = sum(
      self.gates[..., i, None] * out for i, out in enumerate(self.outs)
    )

  def grads(self, d_out):
    """Gradients of sum(out * d_out), by name of the input."""
    gates = self.gates
    found = {'gates': np.stack([(d_out * o).sum(-1) for o in self.outs], -1)}
    zero = np.zeros(d_out.shape[:-1])
    (dqc, dkc, dvc), (dqs, dk, dv), (dqw, dkw, dvw) = (
      oracles.attention_grads(
        self.q, *branch, gates[..., i, None] * d_out, zero
      )
      for i, branch in enumerate(self.branches)
    )
    found['q'] = dqc + dqs + dqw
    dk_raw, *rest_k = compress_grads(
      self.raw[0], *self.nets['k'], self.sizes, dkc, self.angles
    )
    dv_raw, *rest_v = compress_grads(
      self.raw[1], *self.nets['v'], self.sizes, dvc
    )
    for x, rest in (('k', rest_k), ('v', rest_v)):
      for y, grad in zip(('place', 'in', 'out'), rest, strict=True):
        found[f'{x}_{y}'] = grad
    if self.shared:
      if self.angles is not None:
        dk_raw = rotate(dk_raw, self.angles[None, :, None])
      found['k'], found['v'] = dk + dk_raw + dkw, dv + dv_raw + dvw
    else:
      found |= {'k': dk, 'v': dv, 'k_window': dkw, 'v_window': dvw}
      found |= {'k_compress': dk_raw, 'v_compress': dv_raw}
    return found
