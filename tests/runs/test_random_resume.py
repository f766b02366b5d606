"""A few of the random runs that ``make test-resume`` stops and continues by the hundred."""

import pytest

from random_resume import attempt


@pytest.mark.long
@pytest.mark.parametrize("seed", [1, 3, 5, 10])  # 3: two processes
def test_a_random_run_continues(tmp_path, seed):
    result = attempt(tmp_path, seed)
    assert result.get("differences") == [], result
