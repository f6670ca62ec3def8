"""A target: β is steered, the table lands, whole walks refine it."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import make, seeds, start, tables
from hypothesis import given
from hypothesis import strategies as st

from harmonica import Macs, Router, Schedule, macs, sample, train_sdt
from harmonica.metrics import image_mse
from harmonica.models import load
from harmonica.refine import ROUNDS, Quadratic, _Judge, choose, reach, refine
from harmonica.sdt import Update
from harmonica.search import whole_steps
from harmonica.target import Steering, Target, target_of

QUICK = {"batch_size": 2, "lr": 0.2, "refresh_every": 2, "progress": False}
COST = Macs(torch.tensor([1.0, 2.0, 1.0, 2.0], dtype=torch.float64), 0.5)


def router_of(d, iterations=30, **more):
    return train_sdt(d, iterations=iterations, **{**QUICK, **more})


@pytest.mark.parametrize("speedup", [1.0, 1.3, 1.6, 1.9])
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
    with pytest.raises(ValueError, match=f"maximum here is {everything_but_the_first:.4g}"):
        router_of(d, iterations=10**9, target_speedup=100.0)
    assert router_of(d, 3, target_speedup=everything_but_the_first, refine=0).schedule(0.1).cur == 0.75


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
    with pytest.raises(ValueError, match=r"target"):
        router_of(make(dtype=torch.float32), **asked)


def test_without_a_target_beta_stays_as_it_is_given():
    d = make(dtype=torch.float32)
    assert target_of(d, None, None, None, 1e-4) is None
    assert router_of(d, 3, beta=0.0).about["provenance"]["beta"] == 0.0


@given(table=tables(), seed=seeds, speedup=st.floats(1.0, 2.4))
def test_landing_turns_as_few_as_it_must_in_the_order_of_scores(table, seed, speedup):
    target = Target(speedup, COST, 4)
    r = torch.rand(4, 4, generator=torch.Generator().manual_seed(seed))
    landed = target.land(r, table.compute)
    assert bool(landed[0].all())
    assert target.speed(landed) >= speedup * (1 - 1e-9)
    idle = [float(c) for c, on in zip(COST.sites.repeat(4), landed.flatten(), strict=True) if not on]
    spent = float((landed * COST.sites).sum())
    assert not idle or spent + min(idle) > target.allowed


@pytest.mark.parametrize(("spends_more", "sign"), [(True, 1), (False, -1)])
def test_beta_rises_while_too_much_is_spent_and_falls_while_too_little(spends_more, sign):
    steering = Steering(Target(1.5, COST, 4), 0.1, torch.zeros(3, dtype=torch.float64))
    router = Router(4, 4, logits=torch.full((3, 4), 4.0 if spends_more else -5.0))
    assert bool((steering() == 0).all())
    for trajectory in range(2):
        before = steering().sum()
        for k in range(1, 4):
            steering.after(router, Update(trajectory, k, 1.0, 1e-3, 1.0, 0.5))
    assert sign * float(steering().sum() - before) > 0
    assert torch.allclose(steering() / steering()[0], torch.tensor([1.0, 2.0, 1.0, 2.0]))


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
    with pytest.raises(ValueError, match="target_speedup"):
        router_of(d, 9, checkpoint=tmp_path / "c", resume=True, target_speedup=1.6, refine=0)


@given(seed=seeds, speedup=st.floats(1.1, 1.9))
def test_refining_never_ends_worse_than_the_best_start_and_never_off_target(seed, speedup):
    d = make(seed=seed % 7)
    target, batch = Target(speedup, macs(d), d.steps), start(d, 2, seed)
    landed = target.land(torch.rand(4, 4, generator=torch.Generator().manual_seed(seed)), torch.ones(4, 4).bool())
    found = list(refine(d, [landed], [batch], target, budget=1000))
    errors = [each.error for each in found]
    plain = sample(d, *batch)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] <= image_mse(sample(d, *batch, Schedule(landed, sites=tuple(d.sites))), plain)
    assert all(target.speed(each.table) >= speedup * (1 - 1e-9) for each in found)
    assert found[-1].error == image_mse(sample(d, *batch, Schedule(found[-1].table, sites=tuple(d.sites))), plain)


def test_the_quadratic_predicts_a_single_flip_exactly():
    d = make()
    batch = start(d, 3)
    table = torch.tensor([[True] * 4, [True, False, True, True], [False, True, True, False], [True] * 4])
    judge = _Judge(d, [batch], Target(1.0, macs(d), 4))
    model, error = judge._quadratic(table), judge.error(table)
    for e in range(12):
        flipped = table.clone()
        flipped[1 + e // 4, e % 4] ^= True
        predicted = error + 2 * float(model.gradient[e]) + float(model.curvature[e, e])
        assert predicted == pytest.approx(judge.error(flipped), rel=1e-6, abs=1e-12)


def test_no_single_move_of_a_refresh_is_better_than_where_moving_ends():
    d = make(steps=6)
    judge = _Judge(d, [start(d, 3)], Target(1.5, macs(d), 6))
    moved = judge.moved([0, 1, 2], budget=10**6)
    assert len(moved) == 3
    assert moved[0] == 0
    best = judge.error(whole_steps(d, moved))
    assert best <= judge.error(whole_steps(d, [0, 1, 2]))
    for out in moved[1:]:
        for into in set(range(6)) - set(moved):
            assert judge.error(whole_steps(d, {*moved, into} - {out})) >= best
    assert judge.moved([0, 1, 2], budget=judge.spent) == [0, 1, 2]


def test_a_larger_budget_judges_on_more_noises_of_the_same_batch_size(monkeypatch):
    d, seen = make(), []

    def watched(denoiser, tables, batches, target, *, budget):
        seen.append([len(x) for x, _ in batches])
        return iter(())

    monkeypatch.setattr("harmonica.refine.refine", watched)
    one = ROUNDS * (4 + 4 + 4 * 6)  # rounds of a walk, another, and all flips from their step on
    for budget in (None, 10, 2 * one, 5 * one):
        router = Router(4, d.sites, generator=torch.Generator().manual_seed(0), about={"provenance": {}})
        reach(d, router, Target(1.6, macs(d), 4), batch_size=16, budget=budget)
    assert seen == [[16] * 2, [16] * 2, [16] * 2, [16] * 5]


def test_flips_that_cancel_are_found_together():
    table = torch.ones(2, 4, dtype=torch.bool)
    v = torch.tensor([[1.0, 0.0], [-1.0, 0.01], [0.0, 0.5], [0.3, 0.3]], dtype=torch.float64)
    model = Quadratic(torch.zeros(4, dtype=torch.float64), v @ v.T)
    flat = Macs(torch.ones(4, dtype=torch.float64), 0.0)
    chosen = choose(model, table, Target(8 / 6, flat, 2), most=4)  # two entries must go
    assert int((~chosen).sum()) == 2
    pair = choose(
        Quadratic(-0.9 * (v @ v.T).sum(1), v @ v.T), ~table | (torch.arange(2) < 1)[:, None], Target(1, flat, 2), most=4
    )
    assert bool(pair[0].all())


@pytest.mark.parametrize("budget", [0, 50, 400])
def test_refining_stays_within_its_budget_and_says_what_it_spent(budget):
    d = make()
    router = Router(4, d.sites, generator=torch.Generator().manual_seed(0), about={"provenance": {}})
    reach(d, router, Target(1.6, macs(d), 4), batch_size=16, budget=budget)
    judging = 2 * (4 + 8 + 6 + 3 * 4)  # plain walks, step costs and three starts, of two batches
    assert router.about["provenance"]["refined_for"] <= max(budget, judging if budget else 0)
    assert router.schedule(0.1).speedup(macs(d)) >= 1.6


def test_a_target_at_tau_zero_is_refused():
    d = make()
    with pytest.raises(ValueError, match="tau is 0"):
        reach(d, Router(4, d.sites), Target(1.5, macs(d), 4), tau=0.0)


def test_the_commands_land_on_a_target_and_refuse_one_with_a_beta(tmp_path, capsys):
    from harmonica import demo, train

    size = ["--steps", "3", "--iterations", "4"]
    out = ["--out", str(tmp_path / "t")]
    assert train.main([*size, *out, "--batch-size", "2", "--target", "1.5", "--refine", "0"]) == 0
    assert Schedule.load(tmp_path / "t" / "schedule.json").speedup(macs(load("tiny", steps=3))) >= 1.5
    for command in (train.main, demo.main):
        assert command([*size, "--target", "1.5", "--beta", "1e-7", "--out", str(tmp_path / "n")]) == 2
        assert "leave it out" in capsys.readouterr().err
        assert command([*size, "--target", "0.5", "--out", str(tmp_path / "n")]) == 2
        assert "--target is 0.5" in capsys.readouterr().err
    assert train.main([*size, "--target", "9", "--out", str(tmp_path / "n")]) == 2
    assert "maximum here is" in capsys.readouterr().err
