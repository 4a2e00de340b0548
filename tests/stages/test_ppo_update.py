"""What the update measures about itself."""

from __future__ import annotations

import math

import pytest

from threefold.errors import ParityError
from threefold.stages.ppo_update import UpdateStatistics, _check_parity


@pytest.mark.parametrize("values", [(math.nan, 0.0), (0.0, math.nan, 1e-9), (math.inf,)])
def test_a_difference_that_is_no_number_breaks_every_bound(values: tuple[float, ...]) -> None:
    """max(0.0, nan) is 0.0 in Python: NaN has to be looked for."""
    statistics = UpdateStatistics()
    for value in values:
        statistics.add_first(value, value)
    assert statistics.max_logprob_difference == statistics.max_ratio_error == math.inf
    with pytest.raises(ParityError, match=r"iteration 3: .*differ .* by inf nats, beyond ppo\.parity_bound 1000"):
        _check_parity(statistics.max_logprob_difference, 1000.0, 2)


def test_the_largest_difference_counts() -> None:
    statistics = UpdateStatistics()
    for value in (1e-6, 3e-6, 2e-6):
        statistics.add_first(value, 2 * value)
    assert (statistics.max_logprob_difference, statistics.max_ratio_error) == (3e-6, 6e-6)
    _check_parity(statistics.max_logprob_difference, 3e-6, 0)
