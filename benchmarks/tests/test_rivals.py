"""Rivals as schedules: what each promises besides what all methods do (tests/search/test_baselines.py)."""

import itertools
import math
from contextlib import nullcontext

import pytest
import rivals
import torch
from conftest import counted, make, refused, seeded, seeds, start, with_noise
from hypothesis import given
from hypothesis import strategies as st
from rivals import greedy, invardiff, l2p, learning_to_cache, random_table, switches
from smoothcache import drift, smoothcache

from harmonica import Schedule, macs, sample
from harmonica.cache import gated
from harmonica.samplers import alphas_cumprod
from harmonica.search.baselines import every
from harmonica.search.paths import continue_walk, whole_steps
from harmonica.search.references import image_mse

STEPS = 8


def real(denoiser, count=6):
    """Return images and labels; to Learning-to-Cache they are as real as any."""
    x, labels = start(denoiser, count, seed=3)
    return x.tanh(), labels


FEW = {"updates": 6, "batch_size": 2}


@pytest.fixture
def walker():
    return make(STEPS)


def compared(denoiser, schedule, seed=1):
    """Return the image error on the noises that `start` draws."""
    x, labels = start(denoiser, seed=seed)
    return image_mse(sample(denoiser, x, labels, schedule), sample(denoiser, x, labels))


def test_smoothcache_at_alpha_zero_computes_everything_and_at_infinity_every_fourth_step(walker):
    assert smoothcache(walker, *start(walker), alpha=0.0).cur == 0.0
    most = smoothcache(walker, *start(walker), alpha=1e9, gap=3)
    assert torch.equal(most.compute, every(walker, 4).compute)


def test_drift_is_the_relative_change_of_outputs_that_separate_runs_see(walker):
    x, labels = start(walker)
    table = torch.ones(STEPS, 4, dtype=torch.bool)
    features = [cache for _, cache, _ in continue_walk(walker, labels, table, (x, {}, {}), 0)]
    names = list(walker.sites)
    drifts = drift(walker, x, labels, 2)
    assert set(drifts) == {"attn", "mlp"}
    for kind, k, i in itertools.product(drifts, range(STEPS), (1, 2)):
        if k < i:
            assert drifts[kind][k, i - 1] == math.inf
            continue
        of_kind = [s for s, name in enumerate(names) if name.endswith(kind)]
        now, then = (torch.stack([features[j][s] for s in of_kind], 1) for j in (k, k - i))
        change, size = ((f.abs().flatten(2).sum(2)) for f in (now - then, now))  # (B, sites)
        expected = float((change / size).mean())
        assert float(drifts[kind][k, i - 1]) == pytest.approx(expected, rel=1e-6)


@given(seeds, st.floats(0.01, 1.0))
def test_smoothcache_reuses_exactly_what_has_drifted_less_than_alpha(seed, alpha):
    d = make(STEPS, seed=seed % 100)
    drifts = drift(d, *start(d))
    compute = smoothcache(d, *start(d), alpha=alpha).compute
    for column, site in zip(compute.T.tolist(), d.sites, strict=True):
        for k in range(1, STEPS):
            since = k - max(j for j in range(k) if column[j])
            near = since <= 3 and bool(drifts[site.rpartition(".")[2]][k, since - 1] < alpha)
            assert column[k] != near


def test_delta_dit_reuses_the_rear_first_and_the_front_afterwards():
    compute = rivals.front_and_rear(make(8, depth=3), 3, 2)
    rear, front, full = [True] * 2 + [False] * 4, [False] * 4 + [True] * 2, [True] * 6
    assert compute.tolist() == [full, rear, rear, full, front, front, full, front]


def test_learning_to_cache_looks_at_pairs_and_takes_no_walk_and_never_reuses_at_even_steps(walker):
    walker.step = lambda *_: pytest.fail("a walk")
    calls = counted(walker)
    assert learning_to_cache(walker, *real(walker), tau=0.99, **FEW).compute[::2].all()
    for (k, *before), target, student in zip(*[iter(calls)] * 3, strict=True):
        assert (k % 2, *before) == (0, True, False)
        assert (target, student) == ((k + 1, False, False), (k + 1, True, True))


def test_learning_to_cache_noises_a_pair_to_its_timesteps_with_one_noise(walker):
    seen, predict, alphas = [], walker.predict, alphas_cumprod()
    walker.predict = lambda x, k, cond: seen.append((k, x)) or predict(x, k, cond)
    images, labels = torch.zeros(1, 2, 4, 4, dtype=torch.float64), torch.zeros(1, dtype=torch.int64)
    learning_to_cache(walker, images, labels, updates=3, batch_size=1)
    for (k, x), _, (after, y) in zip(*[iter(seen)] * 3, strict=True):
        at, then = (1 - alphas[walker.about["timesteps"][step]] for step in (k, after))
        assert torch.allclose(x / at.sqrt(), y / then.sqrt())


def test_learning_to_cache_reuses_when_computing_has_a_price_and_computes_when_it_has_none(walker):
    rest = {"updates": 150, "batch_size": 1, "lr": 0.3}
    dear = learning_to_cache(walker, *real(walker), beta=10.0, **rest)
    assert not dear.compute[1::2].any()
    assert learning_to_cache(walker, *real(walker), beta=0.0, **rest).cur < 0.2


def test_learning_to_cache_needs_a_pair_of_steps_and_their_timesteps():
    small = make()
    with refused("has 1 steps and 1 timesteps"):
        learning_to_cache(make(1), *real(small))
    small.sampler.timesteps = ()
    with refused("has 4 steps and 0 timesteps"):
        learning_to_cache(small, *real(small))


@pytest.mark.parametrize("n", [2, 4])
def test_greedy_is_no_worse_than_fora_at_the_same_speedup_on_its_own_noises(walker, n):
    fora = every(walker, n)
    speedup = fora.speedup(macs(walker)) * (1 - 1e-12)
    table = greedy(walker, *start(walker), speedup=speedup, budget=5000)
    assert compared(walker, table) <= compared(walker, fora)


def test_the_first_switch_is_the_best_of_all(walker):
    x, labels = start(walker)
    prices = torch.tensor([1.0, 2.0, 3.0, 4.0])
    k, i, _ = next(switches(walker, x, labels, prices=prices, budget=1000))
    plain = sample(walker, x, labels)

    def rate(k, i):
        compute = torch.ones(STEPS, 4, dtype=torch.bool)
        compute[k, i] = False
        return image_mse(sample(walker, x, labels, Schedule(compute)), plain) / float(prices[i])

    rates = {(k, i): rate(k, i) for k in range(1, STEPS) for i in range(4)}
    assert (k, i) == min(rates, key=rates.get)


@pytest.mark.parametrize("budget", [120, 150, 1000])
def test_switches_spend_no_more_than_they_say_and_give_every_entry_once(walker, budget):
    calls, entries = counted(walker), []
    for k, i, spent in switches(walker, *start(walker), prices=torch.ones(4), budget=budget):
        assert len(calls) == spent <= budget
        entries.append((k, i))
    assert sorted(entries) == list(itertools.product(range(1, STEPS), range(4)))


def test_random_tables_differ_by_their_generator_and_greedy_ones_by_their_predictions(walker):
    one, same, other = (random_table(walker, seeded(s), speedup=1.2) for s in (0, 0, 1))
    assert one == same
    assert one != other
    walker = make(STEPS, seed=1)
    find = lambda budget: greedy(walker, *start(walker), speedup=1.3, budget=budget)  # noqa: E731
    assert compared(walker, find(5000)) < compared(walker, find(120))
    with refused("budget is 119 predictions; scoring each entry once takes 120"):
        find(119)


@given(st.integers(1, 100), st.floats(1, 10))
def test_fewer_steps_are_the_most_that_are_fast_enough(steps, speedup):
    with refused("speedup is") if speedup > steps else nullcontext():
        fewer = rivals.fewer_steps(steps, speedup)
        assert steps / fewer >= speedup
        assert fewer == steps or steps / (fewer + 1) < speedup


def outputs_of(d, x, cond, steps):
    """Return the outputs of all sites at the first steps, one after the other."""
    outputs, memory = [], {}
    for k in range(steps):
        with gated(d.sites, lambda i, f: outputs.append(f()) or outputs[-1]):
            x = d.step(x, d.predict(x, k, cond), k, memory)
    return outputs


def test_a_ratio_is_the_change_now_over_the_change_before():
    d, x, cond = with_noise(make(steps=5), 2)
    sites, steps = rivals.ratios(d, torch.ones(5, 4).bool(), x, cond)
    first = outputs_of(d, x, cond, 5)[1::4]  # of the second site, at each step
    changes = [float((a - b).abs().sum()) for a, b in zip(first[1:], first, strict=False)]
    for k in (2, 3):
        assert float(sites[k, 1]) == pytest.approx(changes[k - 1] / changes[k - 2], rel=1e-9)
    assert bool(sites[[0, 1, 4]].isinf().all())
    assert steps.isfinite().tolist() == [False, False, True, True, False]
    computes_where_nothing_was_measured = invardiff(d, x, cond, speedup=1.25).compute[[0, 1, -1]]
    assert computes_where_nothing_was_measured.all()


@pytest.mark.parametrize("history", [1, 3])
def test_weights_of_l2p_are_the_least_squares_of_a_step(history):
    d, x, cond = with_noise(make(steps=5), 4)
    table = Schedule(whole_steps(d, (0, 1, 3)), sites=tuple(d.sites))
    schedule = l2p(d, x, cond, schedule=table, history=history)
    outputs = outputs_of(d, x, cond, 3)
    first, second, wanted = (torch.stack(outputs[4 * k : 4 * k + 4]) for k in range(3))
    past = [second, first][:history]
    weights = schedule.weights[2, 0, 1 : 1 + len(past)].double()
    rest = wanted - sum(w * h for w, h in zip(weights, past, strict=True))
    for output in past:  # what is left has nothing of them any more
        assert abs(float((rest * output).sum())) < 1e-5 * float((wanted * output).sum().abs())
    assert torch.equal(schedule.weights, schedule.weights[:, :1].expand(-1, 4, -1))  # one a step
    assert torch.equal(schedule.weights[:, 0, 0], table.compute[:, 0].float())


def test_l2p_spreads_its_steps_or_takes_a_table_of_whole_steps():
    d, x, cond = with_noise(make(steps=6), 2)
    schedule = l2p(d, x, cond, speedup=1.5)
    assert schedule.speedup(macs(d)) >= 1.5
    assert sample(d, x, cond, schedule).isfinite().all()
    mixed = schedule.compute.clone()
    mixed[1, 0] = ~mixed[1, 0]
    for bad in ({}, {"speedup": 2.0, "schedule": schedule}, {"speedup": 2.0, "history": 0}):
        with refused("give one of the two, and a history of 1"):
            l2p(d, x, cond, **bad)
    with refused("takes whole steps"):
        l2p(d, x, cond, schedule=Schedule(mixed))
