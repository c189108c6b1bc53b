"""Any keys with any values: a configuration, or one bounded line."""

import hypothesis
import numpy as np
import pytest
from hypothesis import given

from tests.fuzz import configs


@hypothesis.settings(max_examples=100)
@given(configs.cases())
def test_overrides_give_a_configuration_or_a_line(overrides):
  assert configs.fault(overrides) is None


@pytest.mark.parametrize(
  ('overrides', 'named'),
  [
    ([('seed', 10**5000)], 'seed'),
    ([('seed', np.ones(3))], 'seed'),
    ([('seed', '9' * configs.LONG)], 'seed'),
    ([('data.source', 'x' * configs.LONG)], 'data.source'),
    ([('.' * 10**6, '1')], '...'),
    ([('model.attention.psa.window', '1e60')], 'window'),
  ],
  ids=lambda x: str(x)[:20] if isinstance(x, str) else '',
)
def test_known_cases(overrides, named):
  assert configs.fault(overrides) is None
