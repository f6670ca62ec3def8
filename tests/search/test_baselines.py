"""Other methods, those of benchmarks/rivals.py too: what all promise, and the targets that they land on."""

import itertools
import math
import re

import pytest
import torch
from conftest import attributes, counted, make, refused, seeded, seeds, start, with_noise
from hypothesis import given, settings
from hypothesis import strategies as st
from rivals import delta_dit, greedy, invardiff, learning_to_cache, random_table
from smoothcache import smoothcache

from harmonica import Schedule, macs, sample
from harmonica.search.baselines import dynamic_programming, every
from harmonica.search.paths import cheapest_path, continue_walk, reuse_errors
from harmonica.search.references import image_mse

STEPS = 8
FEW = {"updates": 6, "batch_size": 2}
METHODS = {
    "FORA": (4, lambda d, s: every(d, speedup=s)),
    "dynamic programming": (4, lambda d, s: dynamic_programming(d, *start(d), speedup=s)),
    "SmoothCache": (4, lambda d, s: smoothcache(d, *start(d), speedup=s)),
    "Δ-DiT": (8, lambda d, s: delta_dit(d, speedup=s)),
    "Learning-to-Cache": (1, lambda d, s: learning_to_cache(d, *start(d, 6), speedup=s, **FEW)),
    "greedy": (1, lambda d, s: greedy(d, *start(d), speedup=s, budget=400)),
    "InvarDiff": (4, lambda d, s: invardiff(d, *start(d), speedup=s)),
    "random": (1, lambda d, s: random_table(d, seeded(0), speedup=s)),
}
"""Name → entries that the method switches at once (of a step, of a kind or block in two), and its table."""

every_method = pytest.mark.parametrize("name", METHODS)


@pytest.fixture
def walker():
    return make(STEPS)


@every_method
@pytest.mark.parametrize("speedup", [1.0, 1.25])
def test_a_table_lands_on_its_target_or_just_above(walker, name, speedup):
    cost = macs(walker)
    grain, fill = METHODS[name]
    schedule = fill(walker, speedup)
    reached = schedule.speedup(cost)
    assert schedule.compute[0].all()
    assert speedup <= reached
    slower = 1 / (1 / reached + grain * float(cost.sites.max()) / cost.total / STEPS)
    assert slower < speedup + 1e-9, "one grain less would have done"
    assert (reached == 1.0) == (speedup == 1.0)


@every_method
def test_what_is_out_of_reach_is_refused_with_a_maximum_that_can_be_met(walker, name):
    fill = METHODS[name][1]
    for speedup in (0.5, math.nan, -1.0):
        with refused("must be 1|expected a number, 1 or more"):
            fill(walker, speedup)
    calls = counted(walker)
    with refused("speedup is 50.* maximum .*here is") as refusal:
        fill(walker, 50.0)
    if name not in ("SmoothCache", "dynamic programming", "InvarDiff"):  # these measure cheaply
        assert len(calls) <= 2, "refused only after the work was done"  # macs, which predicts once
    most = 0.999 * float(re.search(r"here is (\d+\.\d+)", str(refusal.value))[1])
    assert fill(walker, most).speedup(macs(walker)) >= most


@every_method
def test_the_same_call_gives_the_same_table_and_leaves_model_and_generators_alone(name):
    fill, one, other = METHODS[name][1], make(STEPS), make(STEPS)
    weights = [p.clone() for p in one.model.parameters()]
    before, random_state = attributes(one.model), torch.get_rng_state()
    schedule = fill(one, 1.2)
    assert torch.equal(random_state, torch.get_rng_state())
    assert attributes(one.model) == before
    assert all(map(torch.equal, weights, one.model.parameters()))
    assert fill(other, 1.2) == schedule


@every_method
def test_a_table_says_how_it_was_made_and_runs_after_saving(walker, name, tmp_path):
    schedule = METHODS[name][1](walker, 1.2)
    assert schedule.provenance["method"] == name
    assert len(schedule.provenance) > 1
    made_for = ("small", "ddim", tuple(walker.sites))
    assert (schedule.model, schedule.sampler, schedule.sites) == made_for
    schedule.save(tmp_path / "table.json")
    assert Schedule.load(tmp_path / "table.json") == schedule
    sample(walker, *start(walker), schedule)


@given(st.integers(1, 12), st.integers(1, 14))
def test_fora_computes_all_sites_at_every_nth_step_a_fraction_at_the_first_after_it(steps, n):
    assert every(make(steps), n).compute.tolist() == [[k % n == 0] * 4 for k in range(steps)]
    assert every(make(11), 2.5).compute[:, 0].nonzero().flatten().tolist() == [0, 3, 5, 8, 10]


@settings(max_examples=6)
@given(st.integers(1, 12), st.data())
def test_a_target_of_fora_spreads_its_steps_evenly(steps, data):
    count, d = data.draw(st.integers(1, steps)), make(steps)
    fixed = Schedule([[k < count] * 4 for k in range(steps)]).speedup(macs(d))
    rows = every(d, speedup=fixed).compute[:, 0]
    assert int(rows.sum()) == count
    gaps = torch.diff(torch.cat([rows.nonzero().flatten(), torch.tensor([steps])]))
    assert int(gaps.max() - gaps.min()) <= 1


def test_settings_that_a_method_cannot_use_are_refused_by_name(small):
    for n in (0, 0.5, -2, math.inf, math.nan, True, "2"):
        with refused("n is .*; expected a number, 1 or more"):
            every(small, n)
    for both in ({}, {"n": 1, "speedup": 1.0}):
        with refused("n is .* and speedup .*; give one of the two"):
            every(small, **both)


def summed(costs, path):
    """Return what a path costs: each run from a computed step to the last before the next."""
    return sum(float(costs[j, after - 1]) for j, after in itertools.pairwise([*path, len(costs)]))


@given(st.integers(1, 7), seeds, st.data())
def test_no_other_path_is_cheaper(steps, seed, data):
    count = data.draw(st.integers(1, steps))
    costs = torch.rand(steps, steps, generator=seeded(seed)).double().triu(1)
    path = cheapest_path(costs, count)
    others = [[0, *rest] for rest in itertools.combinations(range(1, steps), count - 1)]
    assert path in others
    assert summed(costs, path) == pytest.approx(min(summed(costs, other) for other in others))


@pytest.mark.parametrize("remembers", [False, True])
def test_a_reuse_errors_what_a_walk_of_its_own_says(remembers):
    d, x, labels = with_noise(make(5, remembers=remembers))
    costs, full, (k, j) = reuse_errors(d, x, labels), torch.ones(5, 4, dtype=torch.bool), (3, 1)
    table = torch.arange(5)[:, None].expand(5, 4) <= j
    states = (continue_walk(d, labels, rows, (x, {}, {}), 0) for rows in (full, table))
    plain, walk = ([after for after, _, _ in each] for each in states)
    assert float(costs[j, k]) == pytest.approx(image_mse(walk[k], plain[k]), rel=1e-9)
    assert float(costs[j, k]) > 0
    assert torch.equal(costs.tril(), torch.zeros_like(costs))


@settings(max_examples=4)
@given(seeds, st.sampled_from([1.1, 1.25]))
def test_dynamic_programming_is_never_dearer_than_fora_at_as_many_steps(seed, speedup):
    d = make(STEPS, seed=seed % 100)
    costs = reuse_errors(d, *start(d))
    tables = dynamic_programming(d, *start(d), speedup=speedup), every(d, speedup=speedup)
    path, spread = (s.compute[:, 0].nonzero().flatten().tolist() for s in tables)
    assert len(path) == len(spread)
    assert summed(costs, path) <= summed(costs, spread)
