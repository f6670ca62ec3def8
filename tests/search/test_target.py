"""A target: β is steered, the table lands, whole walks refine it."""

import math
from itertools import combinations, repeat

import pytest
import torch
from conftest import make, refused, said, seeded, seeds, single, start, tables
from hypothesis import given
from hypothesis import strategies as st

from harmonica import Macs, Router, Schedule, demo, macs, train, train_sdt
from harmonica.models import load
from harmonica.sdt import Update
from harmonica.search.learn import learn_weights
from harmonica.search.paths import whole_steps
from harmonica.search.references import pool_errors, references, typical_error, with_images
from harmonica.search.refine import FEW, PAIRS, Search, refine
from harmonica.search.refine_router import default_budget, refine_router
from harmonica.search.target import Target, target_of
from harmonica.training.beta import BetaController

QUICK = {"batch_size": 2, "lr": 0.2, "refresh_every": 2, "progress": False}
COST = Macs(torch.tensor([1.0, 2.0, 1.0, 2.0], dtype=torch.float64), 0.5)


def router_of(d, iterations=30, **more):
    return train_sdt(d, iterations=iterations, **{**QUICK, **more})


@pytest.mark.parametrize("speedup", [1.0, 1.6])
def test_a_trained_table_is_on_target_and_one_entry_more_would_not_be(speedup):
    d = single()
    cost = macs(d)
    schedule = router_of(d, target_speedup=speedup, budget=0).schedule(0.1)
    target = Target(speedup, cost, d.steps)
    spent = float((schedule.compute * cost.sites).sum())
    assert schedule.speedup(cost) >= speedup * (1 - 1e-9)
    assert not bool((~schedule.compute).any()) or spent + float(cost.sites.min()) > target.allowed


def test_a_cur_is_landed_on_and_without_a_target_beta_stays_as_it_is_given():
    assert router_of(single(), target_cur=0.5, budget=0).schedule(0.1).cur == 0.5
    assert target_of(single(), None, None, None) is None
    assert router_of(single(), 3, beta=0.0).about["provenance"]["beta"] == 0.0


def test_a_target_out_of_reach_is_refused_with_the_maximum_before_training():
    d = single()
    most = Schedule([[True] * 4, *[[False] * 4] * 3]).speedup(macs(d))
    with refused(f"maximum here is {most:.4g}"):
        router_of(d, iterations=10**9, target_speedup=100.0)
    assert router_of(d, 3, target_speedup=most, budget=0).schedule(0.1).cur == 0.75


CONTRADICT = [{"target_speedup": 1.5, "target_cur": 0.5}, {"target_speedup": 1.5, "beta": 1e-7}]
CONTRADICT += [{"target_speedup": 0.5}, {"target_speedup": math.nan}, {"target_cur": 1.0}]
CONTRADICT += [{"target_cur": -0.1}, {"cost": COST}]


@pytest.mark.parametrize("target", CONTRADICT, ids=str)
def test_requests_that_contradict_are_refused(target):
    with refused(r"target"):
        router_of(single(), **target)


@given(table=tables(), seed=seeds, speedup=st.floats(1.0, 2.4))
def test_landing_flips_as_few_entries_as_it_must(table, seed, speedup):
    target = Target(speedup, COST, 4)
    landed = target.fit_budget(torch.rand(4, 4, generator=seeded(seed)), table.compute)
    assert bool(landed[0].all())
    assert Schedule(landed).speedup(target.cost) >= speedup * (1 - 1e-9)
    idle, spent = COST.sites.expand(4, 4)[~landed], float((landed * COST.sites).sum())
    assert not len(idle) or spent + float(idle.min()) > target.allowed


@pytest.mark.usefixtures("few_noises")
@pytest.mark.parametrize("stop", [4, 9])
def test_a_resumed_run_ends_in_the_same_refined_router_if_its_target_is_that(tmp_path, stop):
    d, path = single(), tmp_path / "c"
    whole = router_of(d, 12, target_speedup=1.5)
    router_of(d, stop, checkpoint=path, target_speedup=1.5)
    with refused("target_speedup"):
        router_of(d, 12, checkpoint=path, resume=True, target_speedup=1.6)
    resumed = router_of(d, 12, checkpoint=path, resume=True, target_speedup=1.5)
    assert torch.equal(resumed.logits, whole.logits)


@given(seed=seeds, speedup=st.floats(1.1, 1.9))
def test_refining_never_ends_worse_than_the_best_start_and_never_off_target(seed, speedup):
    d = make(seed=seed % 7)
    target, pool = Target(speedup, macs(d), d.steps), with_images(d, *start(d, 2, seed))
    landed = target.fit_budget(torch.rand(4, 4, generator=seeded(seed)), torch.ones(4, 4).bool())
    found = list(refine(d, [landed], pool, repeat(pool), target, budget=2000))
    errors = [each.error for each in found]
    error = lambda table: float(typical_error(pool_errors(d, pool, Schedule(table))))  # noqa: E731
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] <= error(landed)
    assert all(Schedule(each.table).speedup(target.cost) >= speedup * (1 - 1e-9) for each in found)
    assert found[-1].error == pytest.approx(error(found[-1].table), rel=1e-12)


def test_where_the_search_ends_no_exchange_of_two_rows_and_no_single_flip_on_target_is_better():
    """The quadratic ranks what is walked; with so few steps all pairs are."""
    d = make(steps=5)
    target, pool = Target(1.5, macs(d), 5), with_images(d, *start(d, 3))
    judge = Search(d, pool, repeat(pool), target)
    table = judge.paths()[0]
    *_, end = refine(d, [table], pool, repeat(pool), target, budget=10**6)
    pairs = list(combinations(range(1, 5), 2))
    assert len(pairs) <= PAIRS
    for j, k in pairs:
        assert judge.judge(end.table[[{j: k, k: j}.get(i, i) for i in range(5)]]).error >= end.error
    assert end.error < judge.judge(table).error


def test_a_table_that_is_too_slow_is_brought_on_target():
    d = make(steps=5)
    target, pool = Target(1.6, macs(d), 5), with_images(d, *start(d, 3))
    judge = Search(d, pool, repeat(pool), target)
    after = judge.improve(judge.judge(torch.ones(5, 4, dtype=torch.bool)))
    while after is not None and not after.on_target:
        after = judge.improve(after)
    assert after is not None
    assert Schedule(after.table).speedup(target.cost) >= 1.6


def test_a_search_towards_the_reference_ends_nearer_to_it_than_any_start():
    d = make(steps=5)
    target, pool = Target(1.5, macs(d), 5), references(d, noises=4, factor=4)
    found = list(refine(d, [], pool, repeat(pool), target, budget=4000))
    paths = [whole_steps(d, path) for path in ((0, 2, 4), (0, 1, 3))]
    starts = [pool_errors(d, pool, Schedule(path)).mean() for path in paths]
    assert found[-1].error <= min(starts) * (1 + 1e-9)


def test_learned_weights_are_kept_while_the_table_is_refined():
    d = make(steps=5)
    target, pool = Target(1.4, macs(d), 5), references(d, noises=6, factor=4)
    table = whole_steps(d, (0, 2, 4))
    learned = learn_weights(d, Schedule(table, tuple(d.sites)), pool, iterations=4)
    *_, end = refine(d, [table], pool, repeat(pool), target, budget=4000, fill=learned)
    assert end.error <= float(pool_errors(d, pool, learned).mean()) * (1 + 1e-9)


def test_a_candidate_that_is_worse_on_few_noises_is_not_walked_on_all_and_none_is_walked_twice():
    d = make()
    pool = with_images(d, *start(d, 40))
    judge = Search(d, pool, repeat(pool), Target(1.4, macs(d), 4))
    at = judge.judge(torch.ones(4, 4).bool())
    spent = judge.spent
    worse = torch.tensor([[True] * 4, *[[False] * 4] * 3])
    for _ in range(2):
        assert judge.better(worse, at) is None
        assert judge.spent - spent == FEW * 4
    judge.judge(worse)
    assert judge.spent - spent == 40 * 4


def test_a_larger_budget_judges_on_more_noises(monkeypatch):
    d, seen = make(), []

    def watched(denoiser, tables, judged, others, target, *, budget, fill):
        seen.append((len(judged), len(next(others))))
        return iter(())

    monkeypatch.setattr("harmonica.search.refine_router.refine", watched)
    usual = default_budget(4)
    for budget in (None, 10, usual, 2 * usual):
        router = Router(4, d.sites, generator=seeded(0))
        refine_router(d, router, Target(1.6, macs(d), 4), budget=budget)
    assert seen == [(128, 64), (128, 64), (128, 64), (256, 128)]


@pytest.mark.parametrize("budget", [0, 800, 64000])
def test_refining_stays_within_its_budget_and_says_what_it_spent(budget):
    d = make()
    router = Router(4, d.sites, generator=seeded(0))
    refine_router(d, router, Target(1.6, macs(d), 4), budget=budget)
    judging = 128 * (4 + 8 + 6 + 5 * 4)  # targets, reuse errors and five starts
    assert router.about["provenance"]["search_predictions"] <= max(budget, judging if budget else 0)
    assert router.schedule(0.1).speedup(macs(d)) >= 1.6
    before, three_sites = router.logits, Target(1.1, Macs(torch.ones(3), 0.0), 4)
    how = {"denoiser": d, "router": router, "target": Target(1.5, macs(d), 4), "budget": 0}
    for message, wrong in {
        "tau is 0": {"tau": 0.0}, "tau is 1": {"tau": 1}, "tau is 'a'": {"tau": "a"},
        "budget is -1; expected a whole": {"budget": -1}, "budget is True": {"budget": True},
        "order is 10": {"order": 10}, "router is a Schedule": {"router": router.schedule()},
        "this schedule has 5 steps": {"router": Router(5, d.sites)},
        "target is a float": {"target": 1.5},
        "counts 4 steps and 3 sites, and the denoiser has 4 and 4": {"target": three_sites},
        "counts 5 steps": {"target": Target(1.1, macs(d), 5)},
        "NoneType is no Denoiser": {"denoiser": None}, "int is no Denoiser": {"finer": 3},
    }.items():  # fmt: skip
        with pytest.raises((ValueError, TypeError), match=message):
            refine_router(**how | wrong)
    assert torch.equal(router.logits, before)


def test_a_target_that_no_table_can_have_is_refused_by_name():
    for message, (speedup, cost, steps) in {
        "target speedup is None": (None, COST, 4), "target speedup is nan": (math.nan, COST, 4),
        "target speedup is True": (True, COST, 4), "steps is 0": (1.0, COST, 0),
        "steps is 4.0": (1.0, COST, 4.0), "cost is a Tensor": (1.0, torch.ones(4), 4),
        "the maximum here is 3.25": (3.3, COST, 4),
    }.items():  # fmt: skip
        with pytest.raises((ValueError, TypeError), match=message):
            Target(speedup, cost, steps)
    for sites in (torch.zeros(2), [-1.0, 1.0], [[1.0]], [math.inf], "ab", torch.ones(2).cfloat()):
        with refused("sites is .*(expected one for each site|no tensor)"):
            Macs(sites, 1.0)
    with refused("counts 4 steps and 3 sites"):
        router_of(single(), 3, target_speedup=1.2, cost=Macs(torch.ones(3), 0.0))


@pytest.mark.usefixtures("few_noises")
def test_the_commands_land_on_a_target_and_refuse_one_with_a_beta(tmp_path, capsys):
    size = f"--steps 3 --iterations 4 --out {tmp_path}/"
    for out, options in (("a", "--budget 0"), ("b", "--budget 200")):
        options = f"{size}{out} --batch-size 2 --target 1.5 {options}"
        assert said(train, options, capsys)[0] == 0
        schedule = Schedule.load(tmp_path / out / "schedule.json")
        assert schedule.speedup(macs(load("tiny", steps=3))) >= 1.5
    for command, message in {
        "train --target 1.5 --beta 1e-7": "leave it out",
        "train --target 0.5": "the target speedup is 0.5",
        "demo --target 0.5": "the target speedup is 0.5",
        "train --target 9": "maximum here is",
    }.items():
        name, _, options = command.partition(" ")
        code, _, err = said({"train": train, "demo": demo}[name], f"{size}c {options}", capsys)
        assert (code, message in err) == (2, True), command


@pytest.mark.parametrize(("spends_more", "sign"), [(True, 1), (False, -1)])
def test_beta_rises_while_too_much_is_spent_and_falls_while_too_little(spends_more, sign):
    control = BetaController(Target(1.5, COST, 4), 0.1, torch.device("cpu"))
    router = Router(4, 4, logits=torch.full((3, 4), 4.0 if spends_more else -5.0))
    assert bool((control.beta == 0).all())
    for trajectory in range(2):
        before = control.beta.sum()
        for k in range(1, 4):
            control.after(router, Update(trajectory, k, 1.0, 1e-3, 1.0, 0.5))
    assert sign * float(control.beta.sum() - before) > 0
    assert torch.allclose(control.beta / control.beta[0], torch.tensor([1.0, 2.0, 1.0, 2.0]))
