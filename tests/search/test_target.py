"""A target: β is steered, the table lands, whole walks refine it."""

import math
from itertools import combinations, repeat

import pytest
import torch
from conftest import make, refused, seeded, seeds, start, tables
from hypothesis import given
from hypothesis import strategies as st

from harmonica import Macs, Router, Schedule, macs, sample, train_sdt
from harmonica.evaluation.distances import image_mse
from harmonica.models import load
from harmonica.search.learn import learn_weights
from harmonica.search.paths import whole_steps
from harmonica.search.references import pool_errors, references, with_images
from harmonica.search.refine import PAIRS, WALKS_PER_ROUND, Search, few_of, refine
from harmonica.search.refine_router import NOISES, ROUNDS, refine_router
from harmonica.search.target import Target, target_of

QUICK = {"batch_size": 2, "lr": 0.2, "refresh_every": 2, "progress": False}
COST = Macs(torch.tensor([1.0, 2.0, 1.0, 2.0], dtype=torch.float64), 0.5)


def router_of(d, iterations=30, **more):
    return train_sdt(d, iterations=iterations, **{**QUICK, **more})


@pytest.mark.parametrize("speedup", [1.0, 1.6])
def test_a_trained_table_is_on_target_and_one_entry_more_would_not_be(speedup):
    d = make(dtype=torch.float32)
    cost = macs(d)
    schedule = router_of(d, target_speedup=speedup, refine=0).schedule(0.1)
    target = Target(speedup, cost, d.steps)
    spent = float((schedule.compute * cost.sites).sum())
    assert schedule.speedup(cost) >= speedup * (1 - 1e-9)
    assert not bool((~schedule.compute).any()) or spent + float(cost.sites.min()) > target.allowed


def test_a_cur_is_landed_on():
    d = make(dtype=torch.float32)
    assert router_of(d, target_cur=0.5, refine=0).schedule(0.1).cur == 0.5


def test_a_target_out_of_reach_is_refused_with_the_maximum_before_training():
    d = make(dtype=torch.float32)
    everything_but_the_first = Schedule([[True] * 4] + [[False] * 4] * 3).speedup(macs(d))
    with refused(f"maximum here is {everything_but_the_first:.4g}"):
        router_of(d, iterations=10**9, target_speedup=100.0)
    assert (
        router_of(d, 3, target_speedup=everything_but_the_first, refine=0).schedule(0.1).cur == 0.75
    )


@pytest.mark.parametrize(
    "asked",
    [
        {"target_speedup": 1.5, "target_cur": 0.5},
        {"target_speedup": 1.5, "beta": 1e-7},
        {"target_speedup": 0.5},
        {"target_speedup": math.nan},
        {"target_cur": 1.0},
        {"target_cur": -0.1},
        {"cost": COST},
    ],
    ids=str,
)
def test_requests_that_contradict_are_refused(asked):
    with refused(r"target"):
        router_of(make(dtype=torch.float32), **asked)


def test_without_a_target_beta_stays_as_it_is_given():
    d = make(dtype=torch.float32)
    assert target_of(d, None, None, None) is None
    assert router_of(d, 3, beta=0.0).about["provenance"]["beta"] == 0.0


@given(table=tables(), seed=seeds, speedup=st.floats(1.0, 2.4))
def test_landing_turns_as_few_as_it_must_in_the_order_of_scores(table, seed, speedup):
    target = Target(speedup, COST, 4)
    r = torch.rand(4, 4, generator=seeded(seed))
    landed = target.fit_budget(r, table.compute)
    assert bool(landed[0].all())
    assert target.speed(landed) >= speedup * (1 - 1e-9)
    idle = [
        float(c) for c, on in zip(COST.sites.repeat(4), landed.flatten(), strict=True) if not on
    ]
    spent = float((landed * COST.sites).sum())
    assert not idle or spent + min(idle) > target.allowed


@pytest.mark.parametrize("stop", [4, 9])
def test_a_resumed_run_ends_in_the_same_refined_router(tmp_path, stop):
    d, asked = make(dtype=torch.float32), {"target_speedup": 1.5}
    whole = router_of(d, 12, **asked)
    router_of(d, stop, checkpoint=tmp_path / "c", **asked)
    resumed = router_of(d, 12, checkpoint=tmp_path / "c", resume=True, **asked)
    assert torch.equal(resumed.logits, whole.logits)


def test_another_target_is_not_resumed(tmp_path):
    d = make(dtype=torch.float32)
    router_of(d, 6, checkpoint=tmp_path / "c", target_speedup=1.5, refine=0)
    with refused("target_speedup"):
        router_of(d, 9, checkpoint=tmp_path / "c", resume=True, target_speedup=1.6, refine=0)


@given(seed=seeds, speedup=st.floats(1.1, 1.9))
def test_refining_never_ends_worse_than_the_best_start_and_never_off_target(seed, speedup):
    d = make(seed=seed % 7)
    target, pool = Target(speedup, macs(d), d.steps), with_images(d, *start(d, 2, seed))
    landed = target.fit_budget(torch.rand(4, 4, generator=seeded(seed)), torch.ones(4, 4).bool())
    found = list(refine(d, [landed], pool, repeat(pool), target, budget=2000))
    errors = [each.error for each in found]

    def error(table):
        image = sample(d, pool.x, pool.cond, Schedule(table, sites=tuple(d.sites)))
        return image_mse(image, pool.images)

    assert errors == sorted(errors, reverse=True)
    assert errors[-1] <= error(landed)
    assert all(target.speed(each.table) >= speedup * (1 - 1e-9) for each in found)
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
        order = list(range(5))
        order[j], order[k] = k, j
        assert judge.judge(end.table[order]).error >= end.error
    assert end.error < judge.judge(table).error


def test_a_table_that_is_too_slow_is_brought_on_target():
    d = make(steps=5)
    target = Target(1.6, macs(d), 5)
    pool = with_images(d, *start(d, 3))
    judge = Search(d, pool, repeat(pool), target)
    after = judge.improve(judge.judge(torch.ones(5, 4, dtype=torch.bool)))
    while after is not None and not after.on_target:
        after = judge.improve(after)
    assert after is not None
    assert target.speed(after.table) >= 1.6


def test_a_search_towards_the_reference_ends_nearer_to_it_than_any_start():
    d = make(steps=5)
    target, pool = Target(1.5, macs(d), 5), references(d, noises=4, factor=4)
    found = list(refine(d, [], pool, repeat(pool), target, budget=4000))
    starts = [judge.error for judge in map(Search(d, pool, repeat(pool), target).judge, _paths(d))]
    assert found[-1].error <= min(starts)


def _paths(d):
    return [whole_steps(d, path) for path in ((0, 2, 4), (0, 1, 3))]


def test_learned_weights_are_kept_while_the_table_is_refined():
    d = make(steps=5)
    target, pool = Target(1.4, macs(d), 5), references(d, noises=6, factor=4)
    table = whole_steps(d, (0, 2, 4))
    learned = learn_weights(d, Schedule(table, sites=tuple(d.sites)), pool, iterations=4)
    *_, end = refine(d, [table], pool, repeat(pool), target, budget=4000, gate=learned)
    assert end.error <= float(pool_errors(d, pool, learned).mean()) * (1 + 1e-9)


def test_a_candidate_that_is_worse_on_few_noises_is_not_walked_on_all(monkeypatch):
    d = make()
    pool = with_images(d, *start(d, 40))
    judge = Search(d, pool, repeat(pool), Target(1.4, macs(d), 4))
    at = judge.judge(torch.ones(4, 4).bool())
    spent = judge.spent
    worse = torch.tensor([[True] * 4, *[[False] * 4] * 3])
    assert judge.better(worse, at) is None
    assert judge.spent - spent == 2 * few_of(40) * 4 == 2 * 32 * 4


def test_a_larger_budget_judges_on_more_noises(monkeypatch):
    d, seen = make(), []

    def watched(denoiser, tables, judged, others, target, *, budget, gate):
        seen.append((len(judged), len(next(others))))
        return iter(())

    monkeypatch.setattr("harmonica.search.refine_router.refine", watched)
    one = ROUNDS * WALKS_PER_ROUND * 4
    for budget in (None, 10, NOISES * one / 16, 2 * NOISES * one / 16):
        router = Router(4, d.sites, generator=seeded(0))
        refine_router(d, router, Target(1.6, macs(d), 4), batch_size=16, budget=budget)
    assert seen == [(128, 32), (128, 32), (128, 32), (256, 64)]


@pytest.mark.parametrize("budget", [0, 50, 4000])
def test_refining_stays_within_its_budget_and_says_what_it_spent(budget):
    d = make()
    router = Router(4, d.sites, generator=seeded(0))
    refine_router(d, router, Target(1.6, macs(d), 4), batch_size=16, budget=budget)
    judging = 8 * (4 + 8 + 6 + 5 * 4)  # targets, reuse errors and five starts, of 128 noises
    assert router.about["provenance"]["refined_for"] <= max(budget, judging if budget else 0)
    assert router.schedule(0.1).speedup(macs(d)) >= 1.6


def test_a_target_at_tau_zero_is_refused():
    d = make()
    with refused("tau is 0"):
        refine_router(d, Router(4, d.sites), Target(1.5, macs(d), 4), tau=0.0)


def test_the_commands_land_on_a_target_and_refuse_one_with_a_beta(tmp_path, capsys):
    from harmonica import demo, train

    size = ["--steps", "3", "--iterations", "4"]
    out = ["--out", str(tmp_path / "t")]
    assert train.main([*size, *out, "--batch-size", "2", "--target", "1.5", "--refine", "0"]) == 0
    assert (
        Schedule.load(tmp_path / "t" / "schedule.json").speedup(macs(load("tiny", steps=3))) >= 1.5
    )
    out[1] += "s"
    ahead = ["--target", "1.5", "--order", "2", "--refine", "100"]
    assert train.main([*size, *out, "--batch-size", "2", *ahead]) == 0
    assert Schedule.load(tmp_path / "ts" / "schedule.json").order == 2
    for command in (train.main, lambda options: demo.main([*options, "--method", "sdt"])):
        assert (
            command([*size, "--target", "1.5", "--beta", "1e-7", "--out", str(tmp_path / "n")]) == 2
        )
        assert "leave it out" in capsys.readouterr().err
        assert command([*size, "--target", "0.5", "--out", str(tmp_path / "n")]) == 2
        assert "the target speedup is 0.5" in capsys.readouterr().err
    assert train.main([*size, "--order", "1", "--out", str(tmp_path / "n")]) == 2
    assert "order is 1 and the target speedup None" in capsys.readouterr().err
    assert train.main([*size, "--target", "9", "--out", str(tmp_path / "n")]) == 2
    assert "maximum here is" in capsys.readouterr().err
