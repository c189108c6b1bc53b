"""NSA's compression: a network that turns l keys into one (equation 7).

  phi(x) = silu(flatten(x + place) W_in) W_out,   x: l keys, place: [l, H]

`place` says where in its block a key is. Keys and values have a network each;
kv heads share it. The paper leaves depth and width open, and whether keys are
rotated before or after. Here they are compressed unrotated and the result is
rotated by the position of the block's last token: a network of rotated keys
would have to learn every absolute position anew, and that position is the one
at which decoding makes the compressed key.

Blocks overlap (d < l), but W_in is linear: every cell of d keys is multiplied
once by each of its l/d parts, and the parts are added with a shift.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from psa_jax.attention.rotary import Rotary, rotate
from psa_jax.config import ConfigError
from psa_jax.kernels import unread
from psa_jax.kernels.compressed import count
from psa_jax.types import Learned


class Network(NamedTuple):
  """phi: `l` is the length of a block, `F` the hidden width."""

  place: Float[Array, 'l H']
  w_in: Float[Array, 'l H F']
  w_out: Float[Array, 'F H']


def network(learned: Learned, which: str) -> Network:
  """The network of `which`, `k` or `v`."""
  return Network(
    *(learned.weights[f'{which}_{name}'] for name in ('place', 'in', 'out'))
  )


def compress(
  x: Float[Array, 'B T K H'], phi: Network, *, block: int, stride: int
) -> Float[Array, 'B C K H']:
  """One key for every complete block of l keys that starts at a multiple of d.

  Args:
    x: keys or values, not rotated.
    phi: the network.
    block: l.
    stride: d; divides l.

  Raises:
    ConfigError: the network is one for blocks of another length, or they are
      no whole number of strides.
  """
  if block % stride:
    raise ConfigError(
      f'attention.nsa.compress_block={block} must be a multiple of '
      f'stride={stride}'
    )
  B, T, K, H = x.shape
  blocks = count(T, block=block, stride=stride)
  if not blocks:
    return jnp.zeros((B, 0, K, H), x.dtype)
  if phi.w_in.shape[:2] != (block, H):
    raise ConfigError(
      f'the compression network {phi.w_in.shape} is not one for blocks of '
      f'{block} keys of width {H}; make the parameters with the same config'
    )
  hidden, parts, cells = phi.w_in.shape[-1], block // stride, T // stride
  place, w_in, w_out = (w.astype(x.dtype) for w in phi)
  # A block is NaN if one of its keys is, but the networks' gradients are not
  # if nobody reads it.
  x = x[:, : cells * stride]
  bad = ~unread.finite(x).reshape(B, cells, stride, K).all(2)
  bad = jnp.stack([bad[:, part : part + blocks] for part in range(parts)])
  x = unread.clean(x).reshape(B, cells, stride, K, H)
  x = jnp.moveaxis(x, 3, 2).reshape(-1, stride * H)
  w = jnp.moveaxis(w_in.reshape(parts, stride * H, hidden), 0, 1)
  y = (x @ w.reshape(stride * H, -1)).reshape(B, cells, K, parts, hidden)
  y = sum(y[:, part : part + blocks, :, part] for part in range(parts))
  offset = place.reshape(-1) @ w_in.reshape(-1, hidden)
  y = jax.nn.silu(y + offset[None, None, None])
  return unread.spoil(y @ w_out, bad.any(0))


def rotary_table(learned: Learned) -> Rotary | None:
  """The layer's rotary table, or None where keys have no positions."""
  if 'cos' not in learned.tokens:
    return None
  return Rotary(learned.tokens['cos'], learned.tokens['sin'])


def raw_pair(
  k: Float[Array, 'B T K H'], v: Float[Array, 'B T K Hv'], learned: Learned
) -> tuple[Float[Array, 'B T K H'], Float[Array, 'B T K Hv']]:
  """What is compressed: the branch's own keys and values, or the shared ones.

  Args:
    k: the layer's keys, which are turned back.
    v: its values.
    learned: may hold the branch's own pair.
  """
  if 'k_compress' in learned.heads:
    return learned.heads['k_compress'], learned.heads['v_compress']
  table = rotary_table(learned)
  if table is not None:
    k = rotate(k, Rotary(table.cos, -table.sin))
  return k, v


def compress_pair(
  k: Float[Array, 'B T K H'],
  v: Float[Array, 'B T K Hv'],
  learned: Learned,
  *,
  block: int,
  stride: int,
) -> tuple[Float[Array, 'B C K H'], Float[Array, 'B C K Hv']]:
  """Compressed keys, rotated, and values of all complete blocks.

  Args:
    k: from `raw_pair`.
    v: from `raw_pair`.
    learned: the networks, and the rotary table of all T positions.
    block: l.
    stride: d.
  """
  sizes = dict(block=block, stride=stride)
  keys = compress(k, network(learned, 'k'), **sizes)
  values = compress(v, network(learned, 'v'), **sizes)
  table = rotary_table(learned)
  if table is not None and keys.shape[1]:
    keys = rotate(keys, Rotary(*(x[:, block - 1 :: stride] for x in table)))
  return keys, values
