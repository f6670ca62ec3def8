"""Weights of the gate, and what a schedule tells before the walk: which features are kept, and how long."""

import gc
import json
import math
import weakref
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import make, refused, seeds, tables, with_noise
from hypothesis import given
from hypothesis import strategies as st
from small import weigh
from speed import peak
from torch.utils._python_dispatch import TorchDispatchMode

from harmonica import Router, Schedule, sample
from harmonica.cache import reuse
from harmonica.denoise import denoise, final_image
from harmonica.forecast import taylor_weights, weighted, weighted_sum
from harmonica.inference.lifetimes import plan_of, planned
from harmonica.inference.walk import Walk
from harmonica.storage.foreign import write_smoothcache


def schedules(steps=6):
    """Draw a schedule of any table with any kind of gate."""
    orders = st.builds(lambda t, order: replace(t, order=order), tables(steps), st.integers(0, 3))
    return orders | st.builds(weigh, tables(steps), st.integers(1, 3), seeds)


@given(table=tables(), seed=seeds)
def test_order_0_is_reuse_bit_for_bit(table, seed):
    d, x, cond = with_noise(make(), 2, seed)
    rows, weights, cache = table.compute.tolist(), taylor_weights(table.compute, 0).tolist(), {}
    walk = denoise(d, x, cond, lambda k: weighted(rows[k], weights[k], cache))
    assert torch.equal(final_image(walk), sample(d, x, cond, table))
    everything = Schedule(torch.ones(4, 4), order=seed % 10)  # of which nothing is weighted
    assert torch.equal(sample(d, x, cond, everything), sample(d, x, cond))


@given(schedule=schedules(), exact=st.booleans(), seed=seeds)
def test_a_walk_follows_weights_as_sample_does(schedule, exact, seed):
    d, x, cond = with_noise(make(steps=6), 2, seed)
    image, fast = sample(d, x, cond, schedule), Walk(d, schedule, exact=exact)(x, cond)
    assert torch.equal(image, fast) if exact else torch.allclose(image, fast, rtol=1e-9, atol=1e-9)


@given(schedule=schedules())
def test_weights_and_order_are_written_and_read(schedule, tmp_path_factory):
    path = tmp_path_factory.mktemp("schedule") / "schedule.json"
    schedule.save(path)
    assert Schedule.load(path) == schedule
    assert Router(4, 4, about={"order": schedule.order}).schedule().order == schedule.order
    if schedule.gate_weights is not None:
        with refused("only reuses"):
            write_smoothcache(path, schedule)


def test_weights_are_part_of_what_a_schedule_is_and_take_little_room_in_a_file(tmp_path):
    table = Schedule([[1], [0], [1], [0]])
    one, other = weigh(table, 1, seed=0), weigh(table, 1, seed=1)
    assert one == replace(one)
    assert one not in (other, table)
    with pytest.warns(UserWarning, match="weights are left out"):
        assert one.resample(8).weights is None
    table = torch.arange(50)[:, None].expand(50, 56) % 2 == 0
    schedule = weigh(Schedule(table), 3)
    schedule.save(tmp_path / "s.json")
    assert (tmp_path / "s.json").stat().st_size < 6 * schedule.weights.numel()


@pytest.mark.parametrize("order", [-1, 10, 0.5, 1.0, True, "1", None])
def test_an_order_that_is_none_is_refused(order, tmp_path):
    with refused("order is"):
        Schedule([[True]], order=order)
    path = tmp_path / "schedule.json"
    Schedule([[True]], order=1).save(path)
    path.write_text(path.read_text().replace('"order": 1', f'"order": {json.dumps(order)}'))
    with refused("order is"):
        Schedule.load(path)


def test_weights_that_do_not_fit_the_table_are_refused():
    none, fresh = [[1, 0.0]], [[1, 0.0, 0]]
    for weights, message in [
        (torch.zeros(2, 1, 2), r"weights has shape \(2, 1, 2\); the table is 3 × 1"),
        (torch.zeros(3, 1, 1), r"\(3, 1, 1 \+ m\) for m ≥ 1"),
        ([none, [[0, math.inf]], none], "step 1, site 0 is inf; every weight"),
        ([none, [[0.5, 1]], none], "fresh output .* entry is skipped"),
        ([[[1, 0.5]], [[0, 1]], none], "only 0 outputs were computed"),
        ([fresh, [[0, 1, 2.0]], fresh], "last output 2 at step 1, site"),
    ]:
        with refused(message):
            Schedule([[1], [0], [1]], weights=weights)


class Passes(TorchDispatchMode):
    """Counts the operations that touch memory."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **kwargs or {})


PASSES = {(1, 0, 0): 0, (0, 1, 0): 0, (0, 0.5, 0): 1, (0, 2, -1): 3, (0.5, 2, -1): 5}


@pytest.mark.parametrize("add", [weighted_sum, partial(weighted_sum, fused=True)])
@pytest.mark.parametrize(("weights", "passes"), PASSES.items())
def test_a_weight_of_zero_or_a_single_one_costs_no_pass(weights, passes, add):
    features = [torch.full((2,), float(i)) for i in range(3)]
    with Passes() as mode:
        out = add(weights, features)
    assert mode.count == (passes if add is weighted_sum else (passes + 1) // 2)
    assert out.tolist() == [weights[1] + 2 * weights[2]] * 2


def test_a_computed_entry_returns_the_fresh_feature_and_keeps_it_by_reference():
    fresh, cache = (torch.ones(1), None), {}
    assert weighted([True], [[1.0, 0.0, 0.0]], cache)(0, lambda: fresh) is fresh
    assert cache[0][0] is fresh
    out = weighted([True], [[0.5, 2.0, 0.0]], cache)(0, lambda: fresh)
    assert (out[0].tolist(), out[1], fresh[0].tolist()) == ([2.5], None, [1.0])
    with pytest.raises(RuntimeError, match="has not computed it"):  # never computed, not weighted
        weighted([False], [[0.0, 1.0]], {})(0, lambda: torch.zeros(1))


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("computed", [(0, 1), (0, 3), (0, 1, 4, 6)], ids=str)
def test_a_line_is_continued_whatever_the_gaps(order, computed):
    cache, line = {}, lambda k: torch.tensor([2.0 - 3.0 * k, 0.5 * k], dtype=torch.float64)
    column = torch.tensor([[k in computed] for k in range(9)])
    weights = taylor_weights(column, order).tolist()
    for k in range(9):
        feature = weighted(column[k].tolist(), weights[k], cache)(0, lambda k=k: (line(k), None))
        known = [c for c in computed if c <= k]
        assert feature[1] is None
        torch.testing.assert_close(feature[0], line(k) if len(known) > 1 else line(known[-1]))
        assert len(cache[0]) == min(len(known), order + 1)


def test_differences_are_those_of_the_paper():
    """F = k² computed at 0, 2, 4: D¹ = (16 − 4)/2 = 6, D² = (6 − 2)/2 = 2; at 5: 16 + 6·1 + 2·1/2."""
    column = torch.tensor([[True], [False], [True], [False], [True], [False], [False], [False]])
    weights = taylor_weights(column, 2)[:, 0, 1:]
    past = torch.tensor([16.0, 4.0, 0.0], dtype=torch.float64)
    assert float(weights[5] @ past) == 16 + 6 + 1
    assert float(weights[7] @ past) == 16 + 6 * 3 + 2 * 9 / 2


sizes = st.tuples(st.integers(1, 6), st.sampled_from([2, 4]))
any_table = sizes.flatmap(lambda size: tables(*size))


@given(any_table | schedules())
def test_the_peak_of_live_features_is_what_the_plan_says(schedule):
    plan, cache, alive, peaks = plan_of(schedule), {}, [], [0]

    def compute():
        feature = torch.zeros(1)
        alive.append(weakref.ref(feature))
        return feature

    for k in range(len(plan)):
        gate = planned(plan[k], cache)
        for site in range(len(schedule.sites)):
            gate(site, compute)
            peaks.append(sum(ref() is not None for ref in alive))
    assert (max(peaks), peaks[-1], cache) == (peak(plan, [2.0] * len(schedule.sites)) / 2, 0, {})


def test_nothing_of_a_walk_is_alive_after_it():
    d, x, y = with_noise(make(4))
    schedule = Schedule([[1] * 4, [0] * 4, [1, 0, 1, 0], [0] * 4])
    gc.collect()
    before = sum(type(thing) is torch.Tensor for thing in gc.get_objects())
    plan, cache = plan_of(schedule), {}
    for _ in denoise(d, x, y, lambda k: planned(plan[k], cache)):
        pass
    del _
    gc.collect()
    assert sum(type(thing) is torch.Tensor for thing in gc.get_objects()) == before


def test_a_walk_that_starts_in_the_middle_is_refused():
    gate = planned(plan_of(Schedule([[1, 1], [0, 0]]))[1], {})
    message = "site 1 of 2 is to be reused but this walk has not computed it"
    for each in (gate, reuse([False, False], {})):
        with pytest.raises(RuntimeError, match=message):
            each(1, lambda: None)
    with pytest.raises(RuntimeError, match="site 2 of 2"):
        gate(2, lambda: None)
