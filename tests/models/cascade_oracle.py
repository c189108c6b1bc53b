"""Cascade pruning of a whole Transformer in NumPy float64, row by row.

Written from the papers' formulas and the documented causal rule; nothing here
imports psa_jax. Documents, tokens and heads are loops.
"""

import math

import numpy as np


def rms(x, scale, eps=1e-6):
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale


def turn(x, positions, theta=500_000.0):
  """RoPE of x [n, H] with complex numbers: channel i pairs with i + H/2."""
  half = x.shape[-1] // 2
  spin = np.exp(
    1j * np.asarray(positions)[:, None] * theta ** (-np.arange(half) / half)
  )
  turned = (x[:, :half] + 1j * x[:, half:]) * spin
  return np.concatenate([turned.real, turned.imag], -1)


def best_of_document(members, alive, score, share, generous, **_):
  """Paper: the most important tokens, a share of the document's length."""
  room = (len(members) * share + (1023 if generous else 0)) // 1024
  ranked = sorted((j for j in members if j in alive), key=lambda j: -score[j])
  return ranked[:room]


def judged_on_arrival(
  members, alive, score, share, generous, before, window, credit
):
  """Causal rule: one token after the other, with what is known by then."""
  kept, saved, budget, seen = [], 0, 0, []
  for m, j in enumerate(members, 1):
    if j not in alive:
      continue
    new = (m * share + (1023 if generous else 0)) // 1024
    saved, budget = saved + new - budget, new
    last = seen[-(window - 1) :] if window > 1 else []
    rank = sum(score[i] >= score[j] for i in last)
    wanted = rank * before < (len(last) + 1) * share
    seen.append(j)
    stays = saved >= 1 if wanted else saved > credit
    if stays:
      kept.append(j)
    saved = min(max(saved - (1 if wanted else 0), 0), credit)
  return kept


def attention(w, x, alive, segments, heads, groups, causal, value_keep):
  """Output [T, N, H], mass of every token, and each kv head's importance."""
  T = len(x)
  N, H = w['wq'].shape[1:]
  G = N // groups
  out, mass, size = np.zeros((T, N, H)), np.zeros(T), np.zeros(groups)
  positions = np.asarray(alive)
  for n in range(N):
    if n // G not in heads:
      continue
    q = turn(x[alive] @ w['wq'][:, n], positions)
    k = turn(x[alive] @ w['wk'][:, n // G], positions)
    v = x[alive] @ w['wv'][:, n // G]
    for i, t in enumerate(alive):
      keys = [
        a
        for a, s in enumerate(alive)
        if segments[s] == segments[t] and (s <= t or not causal)
      ]
      e = np.exp(k[keys] @ q[i] / math.sqrt(H))
      p = e / e.sum()
      for a, share in zip(keys, p, strict=True):
        if not causal or alive[a] == t:
          mass[alive[a]] += share
      count = max(1, math.ceil(value_keep * len(keys) - 1e-3))
      top = np.argsort(-p, kind='stable')[:count]
      out[t, n] = p[top] @ v[np.asarray(keys)[top]]
    size[n // G] += np.abs(out[:, n]).sum()
  return out, mass, size


def row(params, tokens, segments, *, shares, head_counts, causal, statistics,
        value_keep=1.0, documents=1, window=64, credit=8):  # fmt: skip
  """Hidden [T, D], tokens left in each layer, kv heads left in each layer."""
  layers, T = params['layers'], len(tokens)
  groups = layers['attention']['wk'].shape[2]
  x = np.array(params['embedding'][tokens], np.float64)
  padding = () if causal else (0,)
  alive = [t for t in range(T) if segments[t] not in padding]
  runs = np.flatnonzero(np.diff(segments, prepend=segments[0] - 1))
  members = [range(a, b) for a, b in zip(runs, [*runs[1:], T], strict=True)]
  members = [m for m in members if segments[m[0]] not in padding]
  score, head_score = np.zeros(T), np.zeros(groups)
  heads, before, left_tokens, left_heads = list(range(groups)), 1024, [], []
  rule = judged_on_arrival if causal else best_of_document
  for l, share in enumerate(shares):
    if share < before:
      kept = [
        rule(m, alive, score, share, number < documents, before=before,
             window=window, credit=credit)
        for number, m in enumerate(members)
      ]  # fmt: skip
      alive, before = sorted(sum(kept, [])), share
    if head_counts[l] < len(heads):
      ranked = sorted(heads, key=lambda h: -head_score[h])
      heads = sorted(ranked[: head_counts[l]])
    left_tokens.append(list(alive))
    left_heads.append(list(heads))
    w = {k: v[l] for k, v in layers['attention'].items()}
    out, mass, size = attention(
      w, rms(x, layers['attention_norm']['scale'][l]), alive, segments, heads,
      groups, causal, value_keep,
    )  # fmt: skip
    score += mass
    head_score[heads] += (statistics[l] if causal else size)[heads]
    x[alive] += np.einsum('tnh,nhd->td', out[alive], w['wo'])
    f = {k: v[l] for k, v in layers['mlp'].items()}
    n = rms(x[alive], layers['mlp_norm']['scale'][l])
    gate = n @ f['w_gate']
    hidden = gate / (1 + np.exp(-gate)) * (n @ f['w_up'])
    x[alive] += hidden @ f['w_down']
  return rms(x, params['final_norm']['scale']), left_tokens, left_heads
