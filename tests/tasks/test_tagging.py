"""The baseline of tagging."""

import pytest

from psa_jax.data.examples import tagged
from psa_jax.eval import f1
from psa_jax.tasks import tagging

pytestmark = pytest.mark.tier('default')


def test_the_most_frequent_tag_of_a_word():
  train = [tagged.Tagged(('a', 'b'), (1, 0)), tagged.Tagged(('a', 'c'), (1, 2))]
  scheme = f1.Scheme.of(('O', 'B-x', 'I-x'))
  judged = [tagged.Tagged(('a', 'b', 'new'), (1, 0, 1))]
  assert tagging.most_frequent_tag(train, judged, scheme) == pytest.approx(
    2 / 3
  )
