"""The laws of the core. Each test is named after the law it holds."""

import copy
import random

import numpy as np
import pytest
import torch
from conftest import attributes, counted, equal, make, refused, seeds, start, tables, with_noise
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from harmonica import Router, Schedule, check_denoiser, sample, sdt
from harmonica.cache import blend, gated, reuse
from harmonica.denoise import denoise, final_image, gates_of
from harmonica.iepo import image_error, objective
from harmonica.models import load

both_modes = pytest.mark.parametrize("mode", ["leave-one-out", "telescoping"])


def walk(d, x, y, schedule, cache=None, **more):
    """Return the walk of a denoiser under a schedule, as a generator."""
    return denoise(d, x, y, gates_of(schedule, {} if cache is None else cache), **more)


def drawn(steps=4, seed=3):
    """Return a router for a small denoiser, in its precision."""
    return Router(steps, 4, generator=torch.Generator().manual_seed(seed)).double()


@given(st.integers(1, 5), st.integers(1, 3), st.integers(1, 3), st.sampled_from([1.0, 1.5]), seeds)
def test_computing_everything_is_the_plain_model_bit_for_bit(steps, depth, batch, guidance, seed):
    d, x, y = with_noise(make(steps, depth, guidance=guidance, seed=seed % 100), batch, seed)
    assert equal(denoise(d, x, y), walk(d, x, y, Schedule([[True] * 2 * depth] * steps)))


@given(tables(), seeds)
def test_blend_at_a_saturated_router_is_reuse_bit_for_bit(schedule, seed):
    d, x, y = with_noise(make(), seed=seed)
    hard, soft, r = {}, {}, schedule.compute.double()
    assert equal(walk(d, x, y, schedule, hard), denoise(d, x, y, lambda k: blend(r[k], soft, 0.1)))
    assert all(torch.equal(hard[site], soft[site]) for site in hard)


@given(tables())
def test_reuse_runs_exactly_the_scheduled_sites(schedule):
    d, x, y = with_noise(make())
    ran = []
    for site, module in enumerate(d.sites.values()):
        forward = module.forward
        module.forward = lambda *a, site=site, forward=forward: ran.append(site) or forward(*a)
    for k, _ in enumerate(walk(d, x, y, schedule)):
        assert ran == schedule.compute[k].nonzero().flatten().tolist()
        ran.clear()


def test_a_skipped_site_never_calls_compute():
    cache = {0: "kept"}
    assert reuse([False], cache)(0, lambda: pytest.fail("computed")) == "kept"


def test_gates_refuse_an_empty_cache_scores_for_decisions_and_a_module_at_two_sites():
    with pytest.raises(RuntimeError, match="first step of a walk computes"):
        blend(torch.tensor([1.0, 0.5]), {}, 0.1)
    with pytest.raises(TypeError, match="reuse takes bools"):
        reuse(torch.tensor([0.2, 0.9]), {})
    with pytest.raises(TypeError, match=r"row holds scores such as 0.2; reuse takes bools"):
        reuse([0.2, 0.9], {})
    linear = nn.Linear(1, 1)
    with refused("a module stands at two sites"), gated([linear] * 2, reuse([True] * 2, {})):
        pass


def test_a_feature_may_be_a_tree_of_tensors_and_what_is_none_passes_through():
    cache = {}
    tree = lambda v: (torch.full((2,), v), {"text": torch.full((1,), v)}, None)  # noqa: E731
    blend(torch.ones(1), cache, 0.1)(0, lambda: tree(1.0))
    image, rest, none = blend(torch.tensor([0.25]), cache, 0.1)(0, lambda: tree(5.0))
    assert (image.tolist(), rest["text"].tolist(), none) == ([2.0, 2.0], [2.0], None)
    assert reuse([False], cache)(0, pytest.fail)[1]["text"].tolist() == [2.0]


def test_the_blended_feature_replaces_the_cached_one_only_above_tau():
    cache = {}
    for r, fresh in (([1.0, 1.0], 4.0), ([0.5, 0.05], 0.0)):
        gate = blend(torch.tensor(r), cache, 0.1)
        gate(0, lambda: torch.tensor(fresh)), gate(1, lambda: torch.tensor(fresh))
    assert (cache[0].item(), cache[1].item()) == (2.0, 4.0)


def test_gated_puts_back_what_stood_there(small):
    module = next(iter(small.sites.values()))
    module.forward = theirs = lambda x: x  # another library's wrapper
    with gated(small.sites, reuse([True] * 4, {})):
        with gated(small.sites, lambda site, compute: "the inner gate"):
            assert module(1) == "the inner gate"
        assert module(1) == 1
    assert module.__dict__["forward"] is theirs


def test_the_bundled_and_a_random_denoiser_keep_the_laws(small):
    for d in (small, load("tiny", steps=3), make(remembers=True)):
        check_denoiser(d)


FAULTS = {
    "training mode": lambda d: d.model.train(),
    "asks for a gradient": lambda d: d.model.requires_grad_(True),
    "a walk has": lambda d: setattr(d, "step", lambda x, *_: setattr(d, "steps", 9) or x),
    "in place": lambda d: d.model.blocks[0].attn.register_forward_hook(lambda m, i, o: o.add_(1)),
    "asked once": lambda d: setattr(d, "sites", {**d.sites, "unused": nn.Linear(1, 1)}),
    "global generator": lambda d: setattr(d, "step", lambda x, *_: x + torch.randn_like(x)),
    "neighbours": lambda d: setattr(d, "step", lambda x, *_: x - x.mean()),
}


@pytest.mark.parametrize("law", FAULTS)
def test_check_denoiser_names_the_law_that_is_broken(small, law):
    FAULTS[law](small)
    with pytest.raises(AssertionError, match=law):
        check_denoiser(small)


@given(tables(), st.integers(0, 3), seeds)
def test_a_forked_walk_ends_where_the_original_does(schedule, at, seed):
    d, x, y = with_noise(make(), seed=seed)
    cache, memory, fork = {}, {}, (x, {}, {})
    for k, end in enumerate(walk(d, x, y, schedule, cache, memory=memory), start=1):
        if k == at:
            fork = (end, cache.copy(), memory.copy())
    x, cache, memory = fork
    assert torch.equal(end, final_image(walk(d, x, y, schedule, cache, start=at, memory=memory)))


@given(tables(), tables(), seeds)
def test_two_trajectories_share_nothing(one, other, seed):
    d = make()
    (x1, y1), (x2, y2) = start(d, seed=seed), start(d, seed=seed + 1)
    in_turn = list(zip(walk(d, x1, y1, one), walk(d, x2, y2, other), strict=True))[-1]
    assert equal(in_turn, (sample(d, x1, y1, one), sample(d, x2, y2, other)))


@given(tables(), seeds)
def test_an_image_does_not_depend_on_its_neighbours(schedule, seed):
    d, x, y = with_noise(make(), batch=3, seed=seed)
    three, alone = sample(d, x, y, schedule), sample(d, x[:1], y[:1], schedule)
    torch.testing.assert_close(three[:1], alone, rtol=1e-9, atol=1e-9)


def test_an_interrupted_walk_leaves_nothing_behind(small):
    before, (x, y) = attributes(small.model), start(small)
    plain = sample(small, x, y)
    next(steps := walk(small, x, y, Schedule([[True] * 4] * 4)))
    assert attributes(small.model) == before  # between two steps
    steps.close()
    with pytest.raises(ZeroDivisionError):
        next(denoise(small, x, y, lambda k: lambda site, compute: 1 / 0))
    assert attributes(small.model) == before
    assert torch.equal(plain, sample(small, x, y))


def test_a_walk_takes_no_gradients_and_leaves_a_plain_model_and_the_mode_as_they_were(small):
    x, y = start(small)
    router, cache = drawn(), {}
    end = final_image(denoise(small, x, y, lambda k: blend(router.row(k), cache, 0.1)))
    assert not end.requires_grad
    for _ in denoise(small, x, y):
        assert torch.is_grad_enabled()
    x, y = start(small)
    sample(small, x, y, Schedule([[True] * 4] * 4))
    twin = copy.deepcopy(small)
    for parameter in [p for site in twin.sites.values() for p in site.parameters()]:
        parameter.data.zero_()
    assert not torch.equal(sample(twin, x, y), sample(small, x, y))


def brute_force(d, r, x, y, tau, mode):
    """λ by one whole walk for each image, as the definitions read."""

    def image(table):
        cache = {}
        return final_image(denoise(d, x, y, lambda k: blend(table[k], cache, tau)))

    steps, ones = len(r), torch.ones_like(r)
    if mode == "leave-one-out":
        tables = [torch.cat([r[:k], ones[:1], r[k + 1 :]]) for k in range(steps)]
        pairs = [(image(r), image(table)) for table in tables]
    else:
        ends = [image(torch.cat([r[:k], ones[k:]])) for k in range(steps + 1)]
        pairs = list(zip(ends[1:], ends[:-1], strict=True))
    return torch.stack([(a - b).square().mean() for a, b in pairs])


@both_modes
@given(st.integers(1, 5), st.booleans(), seeds)
def test_lambda_by_shared_prefixes_equals_brute_force_at_half_cost(mode, steps, remembers, seed):
    d, x, y = with_noise(make(steps, remembers=remembers), seed=seed)
    r = drawn(steps, seed)().detach()
    expected, calls = brute_force(d, r, x, y, 0.1, mode), counted(d)
    assert torch.equal(image_error(d, r, x, y, tau=0.1, mode=mode), expected)
    assert len(calls) == steps * (steps + 1) // 2


@both_modes
@given(tables(), seeds)
def test_lambda_is_zero_for_a_step_that_reuses_nothing(mode, schedule, seed):
    d, x, y = with_noise(make(), seed=seed)
    lam = image_error(d, schedule.compute.double(), x, y, mode=mode)
    assert lam[schedule.compute.all(dim=1)].abs().sum() == 0


@pytest.mark.parametrize("remembers", [False, True])
def test_each_trajectory_begins_with_an_empty_cache_and_memory(remembers):
    """What was left of another trajectory would be of another batch, and not fit."""
    d = make(remembers=remembers)
    assert len(list(sdt(d, drawn(), [start(d, batch=2), start(d, batch=3)], proxy=None))) == 6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_loss_and_lambda_are_wide_although_the_model_is_half(dtype):
    out, target = torch.full((4,), 1e-3, dtype=dtype), torch.zeros(4, dtype=dtype)
    loss = objective(out, target, torch.zeros(1), lam=1e-6, beta=0.0)
    assert loss.item() == pytest.approx(1e-12, rel=0.02)
    d = make(3, dtype=dtype)
    assert image_error(d, Router(3, 4)(), *start(d)).dtype == torch.float32


def test_lambda_leaves_every_random_generator_as_it_found_it(small):
    def states():
        theirs = random.getstate(), np.random.get_state()[1].tolist()
        return torch.get_rng_state().tolist(), *theirs

    before = states()
    image_error(small, drawn()().detach(), *start(small))
    assert states() == before


def trained(d, *, n=2, **options):
    router = drawn(d.steps)
    return router, list(sdt(d, router, [start(d, seed=i) for i in range(n)], beta=1e-3, **options))


def test_one_update_for_each_step_but_the_first_weighed_by_lambda(small):
    router, updates = trained(small, n=3, proxy=None)
    assert [(u.walk, u.k) for u in updates] == [(n, k) for n in range(3) for k in range(1, 4)]
    router, updates = trained(small, n=1, lr=0.0)
    for u in updates:
        price = 1e-3 * float(router.row(u.k).detach().sum())
        assert u.loss == pytest.approx(u.lam * u.mse + price, rel=1e-9)
    _, plain = trained(small, n=1, proxy=None)
    _, weighed = trained(small, n=1)
    lam = image_error(small, drawn()(), *start(small, seed=0))
    assert [u.lam for u in plain] == [1.0] * 3
    assert [u.lam for u in weighed] == pytest.approx(lam[1:].tolist(), rel=1e-6)
    assert weighed[0].mse == plain[0].mse


@pytest.mark.parametrize("remembers", [False, True])
def test_the_student_takes_the_step(remembers):
    d, walked, cache = make(remembers=remembers), [], {}
    step, router, (x, y) = d.step, drawn(), start(d)
    d.step = lambda x, out, k, memory: walked.append((k, x)) or step(x, out, k, memory)
    list(sdt(d, router, [(x, y)], lr=0.0, proxy=None))
    soft = [x, *denoise(d, x, y, lambda k: blend(router.row(k).detach(), cache, 0.1))]
    assert all(torch.equal(x, soft[k]) for k, x in walked[:4])
    assert not torch.equal(walked[3][1], list(denoise(d, x, y))[2])


def test_the_teacher_never_touches_the_cache_and_asks_for_no_gradient(small):
    calls = counted(small)
    trained(small, n=1, proxy=None)
    student, teacher = (True, True), (False, False)
    first = [(0, True, False)]  # everything computes: no gradient, no teacher
    assert calls == first + [(k, *who) for k in range(1, 4) for who in (teacher, student)]


def test_training_moves_the_router_and_nothing_else(small):
    x, y = start(small)
    before, weights = attributes(small.model), copy.deepcopy(small.model.state_dict())
    image = sample(small, x, y)
    router, _ = trained(small)
    assert not torch.equal(router.logits, drawn().logits)
    assert attributes(small.model) == before
    assert equal(weights.values(), small.model.state_dict().values())
    assert torch.equal(image, sample(small, x, y))


def test_no_weight_ever_gets_a_gradient_even_if_it_asks(small):
    small.model.requires_grad_(True)
    trained(small)
    assert all(p.grad is None for p in small.model.parameters())


def test_gradients_never_cross_steps_and_cached_features_carry_no_history(small):
    router = drawn()
    for update in sdt(small, router, [start(small)], proxy=None):
        assert [row.grad is not None for row in router.rows] == [k == update.k for k in range(1, 4)]
    cache, (x, y), router = {}, start(small), drawn()
    for k in (0, 1):
        with gated(small.sites, blend(router.row(k), cache, 0.0)):
            out = small.predict(x, k, y)
    assert out.requires_grad
    assert not any(feature.requires_grad for feature in cache.values())


@given(st.integers(0, 30), seeds)
def test_cur_falls_as_tau_falls(percent, seed):
    router = Router(5, 6, generator=torch.Generator().manual_seed(seed))
    assert router.schedule(percent / 100).cur <= router.schedule(percent / 100 + 0.01).cur


def test_training_and_lambda_refuse_what_they_cannot_use(small):
    x, y = start(small)
    for message, shape, how in (
        ("leave-one-out.*telescoping", (4, 4), {"mode": "other"}),
        ("tau is 1; expected a number", (4, 4), {"tau": 1}),
        ("r is .*; the denoiser has 4 steps × 4 sites", (3, 4), {}),
        ("r is .*; the denoiser has 4 steps × 4 sites", (4, 5), {}),
    ):
        with refused(message):
            image_error(small, torch.ones(shape), x, y, **how)
    with pytest.raises(TypeError, match="r is a list"):
        image_error(small, [[1.0] * 4] * 4, x, y)
    for start_at in (-1, 5, True):
        with refused(f"start is {start_at}; expected a whole number, 0 or more and below 5"):
            next(denoise(small, x, y, start=start_at))
    for message, how in {
        "the router is 3 × 4": {"router": Router(3, 4)},
        "router is a Schedule": {"router": Router(4, 4).schedule()}, "beta is -1": {"beta": -1},
        "beta is nan": {"beta": float("nan")},
        r"beta has shape \(3,\); expected one price, or one for each": {"beta": torch.ones(3)},
        "lr is -1": {"lr": -1}, "lr is True": {"lr": True},
        r"lam is \(3,\); expected one λ of 4 steps": {"lam": torch.ones(3)},
        "lam is a list": {"lam": [1.0] * 4}, "tau is 1": {"tau": 1},
        "refresh_every is 0": {"refresh_every": 0}, "λ is 'other'": {"proxy": "other"},
    }.items():  # fmt: skip
        with pytest.raises((ValueError, TypeError), match=message):
            next(sdt(**{"denoiser": small, "router": Router(4, 4), "noise": [(x, y)], **how}))
    with refused(r"out is \(2, 2, 4, 4\) and target \(1, 2, 4, 4\); expected one shape"):
        objective(x, x[:1], torch.ones(4), 1.0, 1.0)


def test_the_objective_is_lambda_mse_plus_beta_sum_r():
    out, target = torch.tensor([1.0, 3.0]), torch.zeros(2)
    r = torch.tensor([0.5, 0.25], requires_grad=True)
    loss = objective(out, target, r, lam=0.1, beta=2.0)
    assert loss.item() == pytest.approx(0.1 * 5 + 2 * 0.75)
    loss.backward()
    assert r.grad.tolist() == [2.0, 2.0]
