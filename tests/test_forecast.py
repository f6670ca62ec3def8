"""Forecasting: order 0 is reuse, polynomials are continued, memory is as said."""

from __future__ import annotations

import pytest
import torch
from conftest import make, seeds, start, tables
from hypothesis import given
from hypothesis import strategies as st

from harmonica import Schedule, baselines, sample
from harmonica.forecast import forecast, sample_forecast


@given(table=tables(), seed=seeds, remembers=st.booleans())
def test_order_0_is_reuse_bit_for_bit(table, seed, remembers):
    d = make(remembers=remembers)
    x, cond = start(d, 2, seed)
    assert torch.equal(sample_forecast(d, x, cond, table, order=0), sample(d, x, cond, table))


@given(order=st.integers(0, 3), seed=seeds)
def test_where_everything_computes_nothing_is_forecast(order, seed):
    d = make()
    x, cond = start(d, 2, seed)
    assert torch.equal(sample_forecast(d, x, cond, Schedule(torch.ones(4, 4)), order=order), sample(d, x, cond))


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("computed", [(0, 1), (0, 3), (0, 1, 4, 6)], ids=str)
def test_a_line_is_continued_whatever_the_gaps(order, computed):
    history, line = {}, lambda k: torch.tensor([2.0 - 3.0 * k, 0.5 * k], dtype=torch.float64)
    for k in range(9):
        feature = forecast([k in computed], k, history, order=order)(0, lambda k=k: (line(k), None))
        known = [c for c in computed if c <= k]
        assert feature[1] is None
        torch.testing.assert_close(feature[0], line(k) if len(known) > 1 else line(known[-1]))


def test_differences_are_those_of_the_paper():
    """F = k² computed at 0, 2, 4: D¹ = (16 − 4)/2 = 6, D² = (6 − 2)/2 = 2; at 5: 16 + 6·1 + 2·1/2."""
    history = {}
    for k in (0, 2, 4):
        forecast([True], k, history, order=2)(0, lambda k=k: torch.tensor(float(k * k)))
    assert float(forecast([False], 5, history, order=2)(0, None)) == 16 + 6 + 1
    assert float(forecast([False], 7, history, order=2)(0, None)) == 16 + 6 * 3 + 2 * 9 / 2


@pytest.mark.parametrize("order", [0, 1, 3])
def test_it_keeps_order_features_more_than_reuse(order):
    history = {}
    for k in range(6):
        forecast([True], k, history, order=order)(0, lambda k=k: torch.tensor(float(k)))
    assert len(history[0][1]) == order + 1


def test_bad_input_is_refused():
    d = make()
    x, cond = start(d, 2)
    with pytest.raises(ValueError, match="order is -1"):
        sample_forecast(d, x, cond, baselines.every(d, 2), order=-1)
    with pytest.raises(RuntimeError, match="has not computed it"):
        forecast([False], 1, {})(0, lambda: torch.zeros(1))
    with pytest.raises(ValueError, match="3 steps"):
        sample_forecast(d, x, cond, Schedule(torch.ones(3, 4)))
