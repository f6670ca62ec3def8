"""What a schedule tells before the walk: fewer features alive, the same images."""

import gc
import weakref

import pytest
import torch
from conftest import equal, make, seeds, tables, with_noise
from hypothesis import given
from hypothesis import strategies as st
from speed import peak
from test_weights import schedules

from harmonica import Schedule, denoise
from harmonica.denoise import gates_of
from harmonica.inference.lifetimes import Plan

sizes = st.tuples(st.integers(1, 6), st.sampled_from([2, 4]))
any_table = sizes.flatmap(lambda size: tables(*size))


@given(any_table, seeds)
def test_a_plan_computes_where_the_schedule_does_and_gives_its_images(schedule, seed):
    d, x, y = with_noise(make(schedule.steps, depth=len(schedule.sites) // 2), seed=seed)
    plan, kept = Plan.of(schedule), {}
    planned = denoise(d, x, y, lambda k: plan.gate(k, kept))
    assert equal(planned, denoise(d, x, y, gates_of(schedule, {})))
    assert kept == {}
    computes = [[entry.computes for entry in row] for row in Plan.of(schedule).rows]
    assert computes == schedule.compute.tolist()


@given(any_table | schedules())
def test_the_peak_of_live_features_is_what_the_plan_says(schedule):
    """Counted by weak references, at every site of every step."""
    plan, cache, alive, peaks = Plan.of(schedule), {}, [], [0]

    def compute():
        feature = torch.zeros(1)
        alive.append(weakref.ref(feature))
        return feature

    for k in range(len(plan.rows)):
        gate = plan.gate(k, cache)
        for site in range(len(schedule.sites)):
            gate(site, compute)
            peaks.append(sum(ref() is not None for ref in alive))
    most = peak(plan, [2.0] * len(schedule.sites)) / 2
    assert (max(peaks), peaks[-1], cache) == (most, 0, {})


def test_every_kept_feature_is_read_and_let_go_once():
    for column, kept in (([1, 0, 0, 1, 0], [1, 1, 0, 1, 0]), ([1] * 5, [0] * 5)):
        plan = Plan.of(Schedule([[entry] for entry in column]))
        assert [len(row[0].keep) for row in plan.rows] == kept


def test_nothing_of_a_walk_is_alive_after_it():
    d, x, y = with_noise(make(4))
    schedule = Schedule([[1] * 4, [0] * 4, [1, 0, 1, 0], [0] * 4])
    gc.collect()
    before = sum(type(thing) is torch.Tensor for thing in gc.get_objects())
    plan, cache = Plan.of(schedule), {}
    for _ in denoise(d, x, y, lambda k: plan.gate(k, cache)):
        pass
    del _
    gc.collect()
    assert sum(type(thing) is torch.Tensor for thing in gc.get_objects()) == before


def test_a_walk_that_starts_in_the_middle_is_refused():
    gate = Plan.of(Schedule([[1, 1], [0, 0]])).gate(1, {})
    message = "site 1 of 2 is to be reused but this walk has not computed it"
    with pytest.raises(RuntimeError, match=message):
        gate(1, lambda: None)
    with pytest.raises(RuntimeError, match="site 2 of 2"):
        gate(2, lambda: None)
