"""Forecasting: order 0 is reuse, polynomials are continued, memory is as said."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from conftest import make, seeds, start, tables
from hypothesis import given
from hypothesis import strategies as st

from harmonica import Router, Schedule, macs, sample, train_sdt
from harmonica.denoise import denoise, final_image
from harmonica.forecast import forecast
from harmonica.inference.lifetimes import Plan
from harmonica.inference.walk import Walk


@given(table=tables(), seed=seeds)
def test_order_0_is_reuse_bit_for_bit(table, seed):
    d = make()
    x, cond = start(d, 2, seed)
    cache, rows = {}, table.compute.tolist()
    walk = denoise(d, x, cond, lambda k: forecast(rows[k], k, cache, order=0))
    assert torch.equal(final_image(walk), sample(d, x, cond, table))


@given(order=st.integers(0, 9), seed=seeds)
def test_where_everything_computes_nothing_is_forecast(order, seed):
    d = make()
    x, cond = start(d, 2, seed)
    assert torch.equal(
        sample(d, x, cond, Schedule(torch.ones(4, 4), order=order)), sample(d, x, cond)
    )


@given(table=tables(steps=6), order=st.integers(1, 3), exact=st.booleans(), seed=seeds)
def test_a_walk_and_a_plan_forecast_as_sample_does(table, order, exact, seed):
    d = make(steps=6)
    x, cond = start(d, 2, seed)
    schedule = replace(table, order=order)
    image, fast = sample(d, x, cond, schedule), Walk(d, schedule, exact=exact)(x, cond)
    assert torch.equal(image, fast) if exact else torch.allclose(image, fast, rtol=1e-9, atol=1e-9)


@given(table=tables(steps=7), order=st.integers(1, 3))
def test_a_plan_keeps_what_will_be_read_and_no_more_than_it_says(table, order):
    plan, cache, most, alive = Plan.of(replace(table, order=order)), {}, 0, 0
    for k in range(7):
        for site in range(4):
            plan.gate(k, cache)(site, lambda: torch.zeros(1))
            alive = sum(len(known) for _, known in cache.values())
            most = max(most, alive)
    assert cache == {}
    assert plan.peak() == most
    assert plan.peak([2.0] * 4) == 2.0 * most


@given(table=tables(), order=st.integers(0, 9))
def test_order_is_written_and_read(table, order, tmp_path_factory):
    path = tmp_path_factory.mktemp("schedule") / "schedule.json"
    replace(table, order=order).save(path)
    assert Schedule.load(path).order == order
    router = Router(4, 4, about={"order": order})
    assert router.schedule().order == order


@pytest.mark.parametrize("order", [-1, 10, 0.5, 1.0, True, "1", None])
def test_an_order_that_is_none_is_refused(order, tmp_path):
    with pytest.raises(ValueError, match="order is"):
        Schedule([[True]], order=order)
    path = tmp_path / "schedule.json"
    Schedule([[True]], sites=("blocks.0.attn",), order=1).save(path)
    path.write_text(path.read_text().replace('"order": 1', f'"order": {json.dumps(order)}'))
    with pytest.raises(ValueError, match="order is"):
        Schedule.load(path)
    with pytest.raises(ValueError, match="order is 1"):
        Schedule([[True]], sites=("blocks.0.attn",), order=1).export_smoothcache(path)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("computed", [(0, 1), (0, 3), (0, 1, 4, 6)], ids=str)
def test_a_line_is_continued_whatever_the_gaps(order, computed):
    cache, line = {}, lambda k: torch.tensor([2.0 - 3.0 * k, 0.5 * k], dtype=torch.float64)
    for k in range(9):
        feature = forecast([k in computed], k, cache, order=order)(0, lambda k=k: (line(k), None))
        known = [c for c in computed if c <= k]
        assert feature[1] is None
        torch.testing.assert_close(feature[0], line(k) if len(known) > 1 else line(known[-1]))


def test_differences_are_those_of_the_paper():
    """F = k² computed at 0, 2, 4: D¹ = (16 − 4)/2 = 6, D² = (6 − 2)/2 = 2; at 5: 16 + 6·1 + 2·1/2."""
    cache = {}
    for k in (0, 2, 4):
        forecast([True], k, cache, order=2)(0, lambda k=k: torch.tensor(float(k * k)))
    assert float(forecast([False], 5, cache, order=2)(0, None)) == 16 + 6 + 1
    assert float(forecast([False], 7, cache, order=2)(0, None)) == 16 + 6 * 3 + 2 * 9 / 2


@pytest.mark.parametrize("order", [0, 1, 3])
def test_it_keeps_order_features_more_than_reuse(order):
    cache = {}
    for k in range(6):
        forecast([True], k, cache, order=order)(0, lambda k=k: torch.tensor(float(k)))
    assert len(cache[0][1]) == order + 1


def test_what_was_never_computed_cannot_be_forecast():
    with pytest.raises(RuntimeError, match="has not computed it"):
        forecast([False], 1, {}, order=1)(0, lambda: torch.zeros(1))


def test_training_without_a_target_keeps_to_the_paper():
    with pytest.raises(ValueError, match="order is 1 without a target"):
        train_sdt(make(dtype=torch.float32), iterations=1, order=1)


def test_a_refined_table_says_how_it_is_to_be_run():
    d = make(dtype=torch.float32)
    how = {"iterations": 6, "batch_size": 2, "lr": 0.2, "refine": 4000, "progress": False}
    schedule = train_sdt(d, target_speedup=1.5, order=1, **how).schedule(0.1)
    assert schedule.order == 1
    assert schedule.speedup(macs(d)) >= 1.5
