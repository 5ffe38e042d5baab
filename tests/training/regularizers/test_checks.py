"""What a regularizer may be built with."""

from __future__ import annotations

import math

import numpy as np
import pytest

from inn_guard.training.regularizers.checks import check_coefficient


@pytest.mark.parametrize("value", ["1e-4", None, True, -1.0, math.inf, math.nan, 1j, 10**400])
def test_what_cannot_weigh_a_penalty_is_refused(value):
    with pytest.raises(ValueError, match="finite coefficient"):
        check_coefficient(value)


@pytest.mark.parametrize("value", [0, 1e-4, np.float32(0.1), np.int64(3)])
def test_numbers_of_any_kind_are_taken(value):
    check_coefficient(value)
