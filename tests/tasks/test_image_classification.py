"""What the task does to pictures and labels of a batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psa_jax.data.images import mixing
from psa_jax.tasks.image_classification import shift
from psa_jax.tasks.losses import label_loss

pytestmark = pytest.mark.tier('default')


def test_shift_moves_whole_pictures():
  """Every picture is found again at one of the places, over black."""
  rng = np.random.default_rng(0)
  pixels = rng.integers(1, 256, (40, 5, 5, 1)).astype(np.uint8)
  got = np.asarray(shift(jnp.asarray(pixels), jax.random.key(0), most=1))
  wide = np.pad(pixels, ((0, 0), (1, 1), (1, 1), (0, 0)))
  seen = set()
  for one, around in zip(got, wide, strict=True):
    at = [
      (r, c)
      for r in range(3)
      for c in range(3)
      if (one == around[r : r + 5, c : c + 5]).all()
    ]
    assert len(at) == 1
    seen.add(at[0])
  assert len(seen) == 9


def test_the_loss_of_a_mixed_label_is_that_of_its_distribution():
  rng = np.random.default_rng(0)
  logits = jnp.asarray(rng.normal(size=(5, 3)), jnp.float32)
  labels = np.array([0, 2, 1, 1, 0])
  own, smoothing, ones = 0.3, 0.1, jnp.ones(5)
  target = own * np.eye(3)[labels] + (1 - own) * np.eye(3)[labels[::-1]]
  target = (1 - smoothing) * target + smoothing / 3
  want = -(target * np.asarray(jax.nn.log_softmax(logits))).sum()
  found = [
    label_loss(logits, jnp.asarray(x), ones, smoothing=smoothing)[0]
    for x in (labels, mixing.partner(jnp.asarray(labels)))
  ]
  assert own * found[0] + (1 - own) * found[1] == pytest.approx(want, rel=1e-5)
