"""What every attention kernel asks of its arguments."""

import jax

from psa_jax.kernels.softmax import Kind


def check_attention(q, k, v, q_segment_ids, kv_segment_ids) -> None:
  """Refuses queries, keys, values and segments that do not fit each other.

  Args:
    q: [B, T, N, H].
    k: [B, S, K, H]; K divides N.
    v: [B, S, K, Hv].
    q_segment_ids: [B, T] or None.
    kv_segment_ids: [B, S], given exactly if the other one is.

  Raises:
    ValueError: what does not fit, with the shapes.
  """
  if q.shape[-1] != k.shape[-1]:
    raise ValueError(f'q {q.shape} and k {k.shape} differ in head width')
  if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0]:
    raise ValueError(f'q {q.shape}, k {k.shape} and v {v.shape} do not fit')
  if q.shape[2] % k.shape[2]:
    raise ValueError(
      f'{q.shape[2]} query heads are not a multiple of {k.shape[2]} kv heads'
    )
  if (q_segment_ids is None) != (kv_segment_ids is None):
    raise ValueError('give both q_segment_ids and kv_segment_ids, or neither')


def segments(q_segment_ids, kv_segment_ids) -> tuple[jax.Array, ...] | None:
  """The pair of segment ids, or None where there are none."""
  if q_segment_ids is None:
    return None
  return q_segment_ids, kv_segment_ids


def scale_or_default(q: jax.Array, scale: float | None) -> float:
  """The factor on the scores; None means H ** -0.5."""
  return float(q.shape[-1] ** -0.5 if scale is None else scale)


def softmax_kind(softmax: str | Kind, coefficients: jax.Array | None) -> Kind:
  """The softmax that is asked for.

  Raises:
    ValueError: an unknown one, a polynomial without its coefficients, or
      coefficients of what has none.
  """
  kind = Kind(softmax) if isinstance(softmax, str) else softmax
  if (kind.name == 'polynomial') != (coefficients is not None):
    raise ValueError(
      f'softmax {kind.name!r} with coefficients={coefficients}: a polynomial '
      'takes 4 coefficients and nothing else takes any'
    )
  if coefficients is not None and coefficients.shape != (4,):
    raise ValueError(f'coefficients {coefficients.shape} must be (4,)')
  return kind
