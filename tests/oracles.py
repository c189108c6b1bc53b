"""Independent float64 definitions in NumPy, written from the specification.

Nothing here imports psa_jax: a mistake there cannot hide here. Loops over
heads and rows on purpose; the shapes are small.
"""

import math

import numpy as np

# Relative L2 distance and largest error over the output's largest value, by
# input dtype: (forward, gradient).
TOLERANCE = {
  'float32': (2e-6, 1e-5),
  'bfloat16': (1e-2, 2e-2),
  'float16': (2e-3, 5e-3),
}


def check_close(got, want, dtype='float32', gradient=False, what=''):
  """Asserts that two arrays agree to the dtype's tolerance."""
  got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
  assert got.shape == want.shape, (what, got.shape, want.shape)
  limit = TOLERANCE[dtype][gradient]
  assert np.isfinite(got).all(), f'{what}: not finite'
  size = np.linalg.norm(want)
  if size == 0:
    assert np.abs(got).max(initial=0) == 0, what
    return
  relative = np.linalg.norm(got - want) / size
  assert relative <= limit, f'{what}: relative L2 {relative:.2e} > {limit}'
  worst = np.abs(got - want).max() / np.abs(want).max()
  assert worst <= 10 * limit, f'{what}: worst {worst:.2e} > {10 * limit}'


def log_sum(values):
  """log(sum(exp(values))) of a list, -inf of an empty one."""
  top = max(values, default=-math.inf)
  if not math.isfinite(top):
    return top
  return top + math.log(sum(math.exp(x - top) for x in values))


def _rows(q, k, mask, scale):
  """(b, t, n, kv head, keys read, scores) of every query that reads any."""
  B, T, N, H = q.shape
  scale = H**-0.5 if scale is None else scale
  for b, t, n in np.ndindex(B, T, N):
    g = n // (N // k.shape[2])
    keys = np.flatnonzero(mask[b, g, t])
    if keys.size:
      yield b, t, n, g, keys, k[b, keys, g] @ q[b, t, n] * scale


def attention(q, k, v, mask, scale=None):
  """Softmax attention [B, T, N, Hv] and lse [B, T, N]; mask [B, K, T, S]."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  out = np.zeros((*q.shape[:3], v.shape[-1]))
  lse = np.full(q.shape[:3], -np.inf)
  for b, t, n, g, keys, s in _rows(q, k, mask, scale):
    e = np.exp(s - s.max())
    out[b, t, n] = e @ v[b, keys, g] / e.sum()
    lse[b, t, n] = s.max() + np.log(e.sum())
  return out, lse


def attention_grads(q, k, v, mask, d_out, d_lse, scale=None):
  """Gradients of sum(out * d_out) + sum(lse * d_lse) by the chain rule."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  d_out, d_lse = np.asarray(d_out, np.float64), np.asarray(d_lse, np.float64)
  factor = q.shape[-1] ** -0.5 if scale is None else scale
  dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
  for b, t, n, g, keys, s in _rows(q, k, mask, scale):
    p = np.exp(s - s.max())
    p /= p.sum()
    dp = v[b, keys, g] @ d_out[b, t, n]
    ds = p * (dp - p @ dp + d_lse[b, t, n]) * factor
    dq[b, t, n] += ds @ k[b, keys, g]
    dk[b, keys, g] += ds[:, None] * q[b, t, n]
    dv[b, keys, g] += p[:, None] * d_out[b, t, n]
  return dq, dk, dv


def causal_mask(B, K, T, S, segments=None, q_offset=0):
  """[B, K, T, S] bool, with `segments` (q [B, T], kv [B, S]) if given."""
  mask = np.zeros((B, K, T, S), bool)
  for b in range(B):
    for t in range(T):
      mask[b, :, t, : t + q_offset + 1] = True
  if segments is not None:
    q_seg, kv_seg = (np.asarray(x) for x in segments)
    mask &= (q_seg[:, :, None] == kv_seg[:, None, :])[:, None]
  return mask


def list_mask(ids, counts, T, S, block_q, block_k):
  """[B, K, T, S] bool: the keys that a block list names, nothing else."""
  B, K, tiles, _ = np.shape(ids)
  mask = np.zeros((B, K, T, S), bool)
  for b in range(B):
    for h in range(K):
      for i in range(tiles):
        for j in ids[b, h, i][: counts[b, h, i]]:
          rows = slice(i * block_q, (i + 1) * block_q)
          mask[b, h, rows, j * block_k : (j + 1) * block_k] = True
  return mask


def decode_mask(ids, counts, lengths, T, S, block_k, window=None, starts=None):
  """[B, K, T, S] bool: the cached keys that each of the newest T tokens reads.

  Token t of row b is at position lengths[b] - T + t; `starts` are the first
  positions of the rows' documents.
  """
  B, K, _ = np.shape(ids)
  mask = np.zeros((B, K, T, S), bool)
  for b, h, t in np.ndindex(B, K, T):
    position = int(lengths[b]) - T + t
    for j in ids[b, h][: counts[b, h]]:
      for s in range(j * block_k, min((j + 1) * block_k, S)):
        near = window is None or s > position - window
        own = starts is None or s >= starts[b]
        mask[b, h, t, s] = s <= position and near and own
  return mask


def pool(k, lengths, block_k, blocks, segments=None):
  """Sum, minimum, maximum [B, K, blocks, H] and size [B, blocks] of each block.

  Of its keys before `lengths[b]`, those of the last one's document.
  """
  k = np.asarray(k, np.float64)
  B, _, K, H = k.shape
  found = {x: np.zeros((B, K, blocks, H)) for x in ('total', 'low', 'high')}
  found['size'] = np.zeros((B, blocks), int)
  for b, j in np.ndindex(B, blocks):
    at = list(range(j * block_k, min((j + 1) * block_k, int(lengths[b]))))
    if segments is not None:
      at = [s for s in at if segments[b][s] == segments[b][at[-1]]]
    if at:
      found['size'][b, j] = len(at)
      found['total'][b, :, j] = k[b, at].sum(0)
      found['low'][b, :, j] = k[b, at].min(0)
      found['high'][b, :, j] = k[b, at].max(0)
  return found


def block_ranking(q, k, block_k, ranges, bounds):
  """{(b, kv head, tile): (forced blocks ascending, the other visible ranked)}.

  `ranges` are [B, tiles] each: begin, end, scored, sink, near. A block that is
  visible but does not compete has importance 0. They are logarithms: float64
  underflows too, at a spread of 745.
  """
  q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
  B, tiles, N, H = q.shape
  K = k.shape[2]
  G = N // K
  result = {}
  for b, h, i in np.ndindex(B, K, tiles):
    begin, end, scored, sink, near = (int(x[b, i]) for x in ranges)
    visible = range(begin, end)
    forced = [j for j in visible if j < sink or j >= near]
    heads = {j: [] for j in visible}
    for g in range(G):
      x = q[b, i, h * G + g] * H**-0.5
      mass = {}
      for j in range(begin, scored):
        keys = k[b, j * block_k : (j + 1) * block_k, h]
        score = x @ keys.mean(0)
        if bounds:
          score = np.maximum(x * keys.min(0), x * keys.max(0)).sum()
        mass[j] = math.log(len(keys)) + score
      for j in mass:
        heads[j].append(mass[j] - log_sum(mass.values()))
    rest = [j for j in visible if j not in forced]
    ranked = sorted(rest, key=lambda j: (-log_sum(heads[j]), j))
    result[b, h, i] = forced, ranked
  return result


def psa_selection(
  q,
  k,
  *,
  block_q,
  block_k,
  window,
  sink,
  keep=None,
  mass=None,
  bounds=False,
  segments=None,
):
  """For every (b, kv head, tile): (forced blocks, ranked rest, count, visible).

  Section 3 of the specification in loops: the tile's first query scores the
  blocks that lie wholly at or before it; heads of a group are summed after
  the softmax, as logarithms; the budget is a ratio of the tile's blocks or a
  mass.
  """
  q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
  B, T, N, H = q.shape
  K = k.shape[2]
  G = N // K
  result = {}
  for b in range(B):
    seg = np.zeros(T, int) if segments is None else np.asarray(segments[b])
    for h in range(K):
      for i in range(-(-T // block_q)):
        t0, last = i * block_q, min((i + 1) * block_q, T) - 1
        begin = int(np.flatnonzero(seg == seg[t0])[0])
        visible = [j for j in range(begin // block_k, last // block_k + 1)]
        low = max(0, t0 - window + 1) // block_k
        sinks = range(begin // block_k, begin // block_k + sink)
        forced = [j for j in visible if j >= low or j in sinks]
        scored = [j for j in visible if (j + 1) * block_k - 1 <= t0]
        heads = {j: [] for j in scored}
        kept_mass, left_mass = [], []
        for g in range(G):
          x = q[b, t0, h * G + g] * H**-0.5
          low_, high_ = {}, {}
          for j in scored:
            at = [
              s
              for s in range(j * block_k, (j + 1) * block_k)
              if seg[s] == seg[(j + 1) * block_k - 1]
            ]
            keys = k[b, at, h]
            size = math.log(len(at))
            low_[j] = size + x @ keys.mean(0)
            high_[j] = low_[j]
            if bounds:
              best = np.maximum(x * keys.min(0), x * keys.max(0)).sum()
              high_[j] = size + best
          total = log_sum(high_.values())
          for j in scored:
            heads[j].append(high_[j] - total)
          kept_mass.append(low_)
          left_mass.append(high_)
        p = {j: log_sum(heads[j]) for j in scored}
        ranked = sorted(
          (j for j in scored if j not in forced), key=lambda j: (-p[j], j)
        )
        if keep is not None:
          # A tile that the sequence's end cuts counts as a whole one.
          cut = (t0 + block_q - 1) // block_k - last // block_k
          count = math.ceil(keep * (len(visible) + cut) - 1e-3) - cut
        else:
          count = 0
          for g in range(G):
            for n in range(len(forced), len(visible) + 1):
              inside = set(forced) | set(ranked[: n - len(forced)])
              has, rest = (
                log_sum([x for j, x in found.items() if (j in inside) == own])
                for found, own in (
                  (kept_mass[g], True),
                  (left_mass[g], False),
                )
              )
              if has + math.log1p(-mass) >= math.log(mass) + rest:
                count = max(count, n)
                break
        count = min(max(count, len(forced)), len(visible))
        result[b, h, i] = (set(forced), ranked, count, len(visible))
  return result


def index_scores(q, weights, k):
  """I [B, T, S] of DSA from q [B, T, J, E], weights [B, T, J], k [B, S, E]."""
  q, weights, k = (np.asarray(x, np.float64) for x in (q, weights, k))
  scores = np.zeros((*q.shape[:2], k.shape[1]))
  for b, t, s in np.ndindex(scores.shape):
    for j in range(q.shape[2]):
      scores[b, t, s] += weights[b, t, j] * max(0, q[b, t, j] @ k[b, s])
  return scores


def pool_scores(scores, start, block_k, pooling):
  """Scores of blocks from those of tokens [S], over tokens from `start` on."""
  found = []
  for first in range(0, len(scores), block_k):
    own = [s for s in range(first, first + block_k) if start <= s < len(scores)]
    own = scores[own]
    if pooling == 'sum':
      found.append(own.sum())
    elif not len(own):
      found.append(-np.inf)
    elif pooling == 'max':
      found.append(own.max())
    else:
      found.append(log_sum(own))
  return np.array(found)


def index_divergence(index, q, k, mask):
  """KL [B, T] and its gradient in the index, each query counting one.

  `index` is (q, weights, k), `mask` [B, T, S] says what every head reads.
  """
  iq, weights, ik = (np.asarray(x, np.float64) for x in index)
  q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
  scores = index_scores(iq, weights, ik)
  B, T, N, H = q.shape
  kl = np.zeros((B, T))
  dq, dw, dk = np.zeros_like(iq), np.zeros_like(weights), np.zeros_like(ik)
  for b, t in np.ndindex(B, T):
    keys = np.flatnonzero(mask[b, t])
    p = np.zeros(len(keys))
    for n in range(N):
      s = k[b, keys, n // (N // k.shape[2])] @ q[b, t, n] * H**-0.5
      p += np.exp(s - s.max()) / np.exp(s - s.max()).sum() / N
    i = scores[b, t, keys]
    log_share = i - i.max() - np.log(np.exp(i - i.max()).sum())
    kl[b, t] = (p * (np.log(p) - log_share)).sum()
    for s, d in zip(keys, np.exp(log_share) - p, strict=True):
      for j in range(iq.shape[2]):
        product = iq[b, t, j] @ ik[b, s]
        if product > 0:
          dw[b, t, j] += d * product
          dq[b, t, j] += d * weights[b, t, j] * ik[b, s]
          dk[b, s] += d * weights[b, t, j] * iq[b, t, j]
  return kl, (dq, dw, dk)


def linear_attention(q, k, v, mask, eps=1e-6):
  """Attention [B, T, N, Hv] with weights q . k; mask [B, T, S]."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  B, T, N, _ = q.shape
  out = np.zeros((B, T, N, v.shape[-1]))
  for b, t, n in np.ndindex(B, T, N):
    g = n // (N // k.shape[2])
    total = 0.0
    for s in np.flatnonzero(mask[b, t]):
      weight = q[b, t, n] @ k[b, s, g]
      out[b, t, n] += weight * v[b, s, g]
      total += weight
    out[b, t, n] /= total + eps
  return out


def sla(q, k, v, position, conv, bias, *, causal, segments):
  """Simplified linear attention of SLAB; `segments` [B, T], position [P, K, H].

  Rows of `position` beyond the last repeat it; five taps, centred or causal.
  """
  q, k, v, position, conv, bias = (
    np.asarray(x, np.float64) for x in (q, k, v, position, conv, bias)
  )
  B, T, N, _ = q.shape
  k, local = k.copy(), np.zeros((B, T, N, v.shape[-1]))
  mask = np.zeros((B, T, T), bool)
  for b, t in np.ndindex(B, T):
    first = int(np.flatnonzero(segments[b] == segments[b][t])[0])
    k[b, t] += position[min(t - first, len(position) - 1)]
    for s in range(T):
      same = segments[b][s] == segments[b][t]
      mask[b, t, s] = same and (s <= t or not causal)
    for n in range(N):
      g = n // (N // k.shape[2])
      local[b, t, n] = bias
      for tap in range(5):
        s = t + tap - (4 if causal else 2)
        if 0 <= s < T and segments[b][s] == segments[b][t]:
          local[b, t, n] += conv[tap] * v[b, s, g]
  out = linear_attention(np.maximum(q, 0), np.maximum(k, 0), v, mask)
  return out + local
