"""Methods that measure a few walks: InvarDiff's plan, L²P's weights."""

from __future__ import annotations

import pytest
import torch
from conftest import make, start

from harmonica import Schedule, macs, sample
from harmonica.cache import gated
from harmonica.search.measured import _ratios, invardiff, l2p
from harmonica.search.paths import whole_steps


@pytest.mark.parametrize("speedup", [1.0, 1.1, 1.3])
def test_a_plan_of_invardiff_is_on_target_and_computes_where_nothing_was_measured(speedup):
    d = make(steps=8)
    schedule = invardiff(d, *start(d, 3), speedup=speedup)
    assert schedule.speedup(macs(d)) >= speedup
    assert bool(schedule.compute[[0, 1, -1]].all())
    assert schedule.provenance["method"] == "InvarDiff"
    with pytest.raises(ValueError, match="the maximum of this method here is"):
        invardiff(d, *start(d, 3), speedup=5.0)


def test_a_ratio_is_the_change_now_over_the_change_before():
    d = make(steps=5)
    x, cond = start(d, 2)
    sites, steps = _ratios(d, torch.ones(5, 4).bool(), x, cond)
    outputs, memory = [], {}
    for k in range(5):
        with gated(d.sites, lambda i, f: outputs.append(f()) or outputs[-1]):
            x = d.step(x, d.predict(x, k, cond), k, memory)
    first = outputs[1::4]  # of the second site, at each step
    changes = [float((a - b).abs().sum()) for a, b in zip(first[1:], first, strict=False)]
    for k in (2, 3):
        assert float(sites[k, 1]) == pytest.approx(changes[k - 1] / changes[k - 2], rel=1e-9)
    assert bool(sites[[0, 1, 4]].isinf().all())
    assert steps.isfinite().tolist() == [False, False, True, True, False]


@pytest.mark.parametrize("history", [1, 3])
def test_weights_of_l2p_are_the_least_squares_of_a_step(history):
    d = make(steps=5)
    x, cond = start(d, 4)
    table = Schedule(whole_steps(d, (0, 1, 3)), sites=tuple(d.sites))
    schedule = l2p(d, x, cond, schedule=table, history=history)
    outputs, memory = [], {}
    for k in range(3):
        with gated(d.sites, lambda i, f: outputs.append(f()) or outputs[-1]):
            x = d.step(x, d.predict(x, k, cond), k, memory)
    first, second, wanted = (torch.stack(outputs[4 * k : 4 * k + 4]) for k in range(3))
    past = [second, first][:history]
    weights = schedule.weights[2, 0, 1 : 1 + len(past)].double()
    rest = wanted - sum(w * h for w, h in zip(weights, past, strict=True))
    for output in past:  # what is left has nothing of them any more
        assert abs(float((rest * output).sum())) < 1e-5 * float((wanted * output).sum().abs())
    assert torch.equal(schedule.weights, schedule.weights[:, :1].expand(-1, 4, -1))  # one a step
    assert torch.equal(schedule.weights[:, 0, 0], table.compute[:, 0].float())


def test_l2p_spreads_its_steps_or_takes_a_table_of_whole_steps():
    d = make(steps=6)
    x, cond = start(d, 2)
    schedule = l2p(d, x, cond, speedup=1.5)
    assert schedule.speedup(macs(d)) >= 1.5
    assert sample(d, x, cond, schedule).isfinite().all()
    mixed = schedule.compute.clone()
    mixed[1, 0] = ~mixed[1, 0]
    for bad in ({}, {"speedup": 2.0, "schedule": schedule}, {"speedup": 2.0, "history": 0}):
        with pytest.raises(ValueError, match="give one of the two, and a history of 1"):
            l2p(d, x, cond, **bad)
    with pytest.raises(ValueError, match="takes whole steps"):
        l2p(d, x, cond, schedule=Schedule(mixed))
