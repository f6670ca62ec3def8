"""The laws of the core. Each test is named after the law it holds."""

import copy
import random
from functools import partial

import numpy as np
import pytest
import torch
from conftest import make, refused, seeded, seeds, start, tables
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from harmonica import Router, Schedule, check_denoiser, sample, sdt
from harmonica.cache import blend, gated, reuse
from harmonica.denoise import denoise, final_image, gates_of
from harmonica.iepo import image_error, objective


def walk(d, x, y, schedule, cache=None, **more):
    """Return the walk of a denoiser under a schedule, as a generator."""
    return denoise(d, x, y, gates_of(schedule, {} if cache is None else cache), **more)


def drawn(steps=4, seed=3):
    """Return a router for a small denoiser, in its precision."""
    return Router(steps, 4, generator=seeded(seed)).double()


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def state_of(denoiser):
    """Everything a model could have gained: attributes, hooks, buffers, gradients."""
    return {
        name: (set(m.__dict__), id(m.__dict__.get("forward")), set(m._buffers),
               len(m._forward_hooks) + len(m._forward_pre_hooks), [p.grad for p in m.parameters()])
        for name, m in denoiser.model.named_modules()
    }  # fmt: skip


def counted(denoiser):
    """Count predictions and note for each whether the sites were gated and gradients on."""
    calls, predict = [], denoiser.predict

    def count(x, k, cond):
        site = next(iter(denoiser.sites.values()))
        calls.append((k, "forward" in site.__dict__, torch.is_grad_enabled()))
        return predict(x, k, cond)

    denoiser.predict = count
    return calls


@given(st.integers(1, 5), st.integers(1, 3), st.integers(1, 3), st.sampled_from([1.0, 1.5]), seeds)
def test_computing_everything_is_the_plain_model_bit_for_bit(steps, depth, batch, guidance, seed):
    d = make(steps, depth, guidance=guidance, seed=seed % 100)
    x, y = start(d, batch, seed)
    assert same(denoise(d, x, y), walk(d, x, y, Schedule([[True] * 2 * depth] * steps)))


@given(tables(), seeds)
def test_blend_at_a_saturated_router_is_reuse_bit_for_bit(schedule, seed):
    d = make()
    x, y = start(d, seed=seed)
    hard, soft, r = {}, {}, schedule.compute.double()
    blended = denoise(d, x, y, lambda k: blend(r[k], soft, 0.1))
    assert same(walk(d, x, y, schedule, hard), blended)
    assert all(torch.equal(hard[site], soft[site]) for site in hard)


@given(tables())
def test_reuse_runs_exactly_the_scheduled_sites(schedule):
    d = make()
    x, y = start(d)
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


def test_reusing_what_was_never_computed_is_refused(small):
    x, y = start(small)
    walk = denoise(small, x, y, lambda k: reuse([False] * 4, {}), start=1)
    message = "site 0 of 4 is to be reused but this walk has not computed it"
    with pytest.raises(RuntimeError, match=message):
        next(walk)


def test_blending_into_an_empty_cache_is_refused():
    with pytest.raises(RuntimeError, match="first step of a walk computes"):
        blend(torch.tensor([1.0, 0.5]), {}, 0.1)


def test_scores_are_not_taken_for_decisions():
    with pytest.raises(TypeError, match="reuse takes bools"):
        reuse(torch.tensor([0.2, 0.9]), {})


def test_a_feature_may_be_a_tree_of_tensors_and_what_is_none_passes_through():
    cache = {}
    tree = lambda v: (torch.full((2,), v), {"text": torch.full((1,), v)}, None)  # noqa: E731
    blend(torch.ones(1), cache, 0.1)(0, lambda: tree(1.0))
    image, rest, none = blend(torch.tensor([0.25]), cache, 0.1)(0, lambda: tree(5.0))
    assert (image.tolist(), rest["text"].tolist(), none) == ([2.0, 2.0], [2.0], None)
    assert reuse([False], cache)(0, pytest.fail)[1]["text"].tolist() == [2.0]


def test_the_blended_feature_replaces_the_cached_one_only_above_tau():
    cache = {}
    gate = blend(torch.ones(2), cache, 0.1)
    gate(0, lambda: torch.tensor(4.0)), gate(1, lambda: torch.tensor(4.0))
    gate = blend(torch.tensor([0.5, 0.05]), cache, 0.1)
    gate(0, lambda: torch.tensor(0.0)), gate(1, lambda: torch.tensor(0.0))
    assert (cache[0].item(), cache[1].item()) == (2.0, 4.0)


def test_gated_puts_back_what_stood_there(small):
    module = next(iter(small.sites.values()))
    module.forward = theirs = lambda x: x  # another library's wrapper
    with gated(small.sites, reuse([True] * 4, {})):
        with gated(small.sites, lambda site, compute: "the inner gate"):
            assert module(1) == "the inner gate"
        assert module(1) == 1
    assert module.__dict__["forward"] is theirs


def test_one_module_at_two_sites_is_refused():
    linear = nn.Linear(1, 1)
    with refused("a module stands at two sites"):
        with gated([linear, linear], reuse([True] * 2, {})):
            pass


def test_the_bundled_and_a_random_denoiser_keep_the_laws(small):
    from harmonica.models import load

    check_denoiser(small)
    check_denoiser(load("tiny", steps=3))


@pytest.mark.parametrize(
    ("fault", "law"),
    [
        (lambda d: d.model.train(), "training mode"),
        (lambda d: d.model.requires_grad_(True), "asks for a gradient"),
        (lambda d: setattr(d, "steps", 3), "a walk has"),
        (
            lambda d: d.model.blocks[0].attn.register_forward_hook(lambda m, i, o: o.add_(1)),
            "in place",
        ),
        (lambda d: setattr(d, "sites", {**d.sites, "unused": nn.Linear(1, 1)}), "asked once"),
        (lambda d: setattr(d, "step", lambda x, *_: x + torch.randn_like(x)), "global generator"),
        (lambda d: setattr(d, "step", lambda x, *_: x - x.mean()), "neighbours"),
    ],
)
def test_check_denoiser_names_the_law_that_is_broken(small, fault, law):
    fault(small)
    if law == "a walk has":
        small.step = lambda x, out, k, memory: (setattr(small, "steps", 9), x)[1]
    with pytest.raises(AssertionError, match=law):
        check_denoiser(small)


@given(tables(), st.integers(0, 3), seeds)
def test_a_forked_walk_ends_where_the_original_does(schedule, at, seed):
    d = make()
    x, y = start(d, seed=seed)
    cache, memory, fork = {}, {}, (x, {}, {})
    for k, end in enumerate(walk(d, x, y, schedule, cache, memory=memory), start=1):
        if k == at:
            fork = (end, cache.copy(), memory.copy())
    x, cache, memory = fork
    forked = final_image(walk(d, x, y, schedule, cache, start=at, memory=memory))
    assert torch.equal(end, forked)


@given(tables(), tables(), seeds)
def test_two_trajectories_share_nothing(one, other, seed):
    d = make()
    (x1, y1), (x2, y2) = start(d, seed=seed), start(d, seed=seed + 1)
    in_turn = list(zip(walk(d, x1, y1, one), walk(d, x2, y2, other), strict=True))[-1]
    assert same(in_turn, (sample(d, x1, y1, one), sample(d, x2, y2, other)))


@given(tables(), seeds)
def test_an_image_does_not_depend_on_its_neighbours(schedule, seed):
    d = make()
    x, y = start(d, batch=3, seed=seed)
    all_three, alone = sample(d, x, y, schedule), sample(d, x[:1], y[:1], schedule)
    torch.testing.assert_close(all_three[:1], alone, rtol=1e-9, atol=1e-9)


def test_an_interrupted_walk_leaves_nothing_behind(small):
    before, (x, y) = state_of(small), start(small)
    plain = sample(small, x, y)
    steps = walk(small, x, y, Schedule([[True] * 4] * 4))
    next(steps)
    assert state_of(small) == before  # between two steps
    steps.close()

    def broken(site, compute):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        next(denoise(small, x, y, lambda k: broken))
    assert state_of(small) == before
    assert torch.equal(plain, sample(small, x, y))


def test_a_model_copied_after_a_walk_is_a_plain_model(small):
    x, y = start(small)
    sample(small, x, y, Schedule([[True] * 4] * 4))
    twin = copy.deepcopy(small)
    for parameter in [p for site in twin.sites.values() for p in site.parameters()]:
        parameter.data.zero_()
    assert not torch.equal(sample(twin, x, y), sample(small, x, y))


def test_a_walk_takes_no_gradients_and_leaves_the_mode_as_it_was(small):
    x, y = start(small)
    router, cache = drawn(), {}
    end = final_image(denoise(small, x, y, lambda k: blend(router.row(k), cache, 0.1)))
    assert not end.requires_grad
    for _ in denoise(small, x, y):
        assert torch.is_grad_enabled()


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


both_modes = pytest.mark.parametrize("mode", ["leave-one-out", "telescoping"])


@both_modes
@given(st.integers(1, 5), seeds)
def test_lambda_by_shared_prefixes_equals_brute_force_at_half_the_predictions(mode, steps, seed):
    d = make(steps)
    x, y = start(d, seed=seed)
    r = drawn(steps, seed)().detach()
    expected = brute_force(d, r, x, y, 0.1, mode)
    calls = counted(d)
    assert torch.equal(image_error(d, r, x, y, tau=0.1, mode=mode), expected)
    assert len(calls) == steps * (steps + 1) // 2


@both_modes
@given(tables(), seeds)
def test_lambda_is_zero_for_a_step_that_reuses_nothing(mode, schedule, seed):
    d = make()
    x, y = start(d, seed=seed)
    lam = image_error(d, schedule.compute.double(), x, y, mode=mode)
    assert lam[schedule.compute.all(dim=1)].abs().sum() == 0


@both_modes
def test_a_sampler_with_a_memory_is_forked_with_it(mode):
    d = make(5, remembers=True)
    check_denoiser(d)
    x, y = start(d)
    r = drawn(5)().detach()
    assert torch.equal(image_error(d, r, x, y, mode=mode), brute_force(d, r, x, y, 0.1, mode))
    noise = [start(d, seed=1), start(d, batch=3, seed=2)]  # a memory left over would not fit
    assert len(list(sdt(d, drawn(5), noise, proxy=None))) == 8


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


def test_lambda_refuses_what_it_does_not_know(small):
    x, y = start(small)
    with refused(r"leave-one-out.*telescoping"):
        image_error(small, torch.ones(4, 4), x, y, mode="other")
    with refused("r has 3 rows and the denoiser 4 steps"):
        image_error(small, torch.ones(3, 4), x, y)


def trained(d, *, n=2, **options):
    router = drawn(d.steps)
    noise = [start(d, seed=i) for i in range(n)]
    return router, list(sdt(d, router, noise, beta=1e-3, **options))


def test_one_update_for_each_step_but_the_first(small):
    router, updates = trained(small, n=3, proxy=None)
    assert [(u.trajectory, u.k) for u in updates] == [(n, k) for n in range(3) for k in range(1, 4)]
    router, updates = trained(small, n=1, lr=0.0)
    for u in updates:
        price = 1e-3 * float(router.row(u.k).detach().sum())
        assert u.loss == pytest.approx(u.lam * u.mse + price, rel=1e-9)


def test_each_trajectory_begins_with_an_empty_cache(small):
    """A feature left from another trajectory would be of another batch, and not blend."""
    noise = [start(small, batch=2), start(small, batch=3)]
    assert len(list(sdt(small, drawn(), noise, proxy=None))) == 6


def test_the_student_takes_the_step(small):
    walked, step = [], small.step
    small.step = lambda x, out, k, memory: walked.append((k, x)) or step(x, out, k, memory)
    router = drawn()
    x, y = start(small)
    list(sdt(small, router, [(x, y)], lr=0.0, proxy=None))
    cache = {}
    soft = [x, *denoise(small, x, y, lambda k: blend(router.row(k).detach(), cache, 0.1))]
    assert all(torch.equal(x, soft[k]) for k, x in walked[:4])
    assert not torch.equal(walked[3][1], list(denoise(small, x, y))[2])


def test_the_teacher_never_touches_the_cache_and_asks_for_no_gradient(small):
    calls = counted(small)
    trained(small, n=1, proxy=None)
    student, teacher = (True, True), (False, False)
    first = [(0, True, False)]  # everything computes: no gradient, no teacher
    assert calls == first + [(k, *who) for k in range(1, 4) for who in (teacher, student)]


def test_training_moves_the_router_and_nothing_else(small):
    x, y = start(small)
    before, weights = state_of(small), copy.deepcopy(small.model.state_dict())
    image = sample(small, x, y)
    router, _ = trained(small)
    assert not torch.equal(router.logits, drawn().logits)
    assert state_of(small) == before
    assert same(weights.values(), small.model.state_dict().values())
    assert torch.equal(image, sample(small, x, y))


def test_no_weight_ever_gets_a_gradient_even_if_it_asks(small):
    small.model.requires_grad_(True)
    trained(small)
    assert all(p.grad is None for p in small.model.parameters())


def test_gradients_never_cross_steps(small):
    router = drawn()
    x, y = start(small)
    for update in sdt(small, router, [(x, y)], proxy=None):
        assert [row.grad is not None for row in router.rows] == [k == update.k for k in range(1, 4)]


def test_cached_features_carry_no_history(small):
    cache = {}
    x, y = start(small)
    router = drawn()
    for k in (0, 1):
        with gated(small.sites, blend(router.row(k), cache, 0.0)):
            out = small.predict(x, k, y)
    assert out.requires_grad
    assert not any(feature.requires_grad for feature in cache.values())


def test_blend_is_right_under_activation_checkpointing():
    d = make()
    forwards = [block.forward for block in d.model.blocks]

    def gradients(*, checkpointed):
        for block, forward in zip(d.model.blocks, forwards, strict=True):
            again = partial(checkpoint, forward, use_reentrant=False)
            block.forward = again if checkpointed else forward
        return trained(d, proxy=None)[0].logits

    assert torch.equal(gradients(checkpointed=True), gradients(checkpointed=False))


@given(st.integers(0, 30), seeds)
def test_cur_falls_as_tau_falls(percent, seed):
    router = Router(5, 6, generator=seeded(seed))
    assert router.schedule(percent / 100).cur <= router.schedule(percent / 100 + 0.01).cur


def test_a_loss_that_is_not_finite_stops_training(small):
    small.model.final_layer.linear.weight.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="step 1 is nan; look for NaN in the weights"):
        trained(small, proxy=None)


def test_a_router_of_another_shape_is_refused(small):
    x, y = start(small)
    with refused("the router is 3 × 4"):
        next(sdt(small, Router(3, 4), [(x, y)]))


def test_lambda_weighs_the_loss(small):
    _, plain = trained(small, n=1, proxy=None)
    _, weighed = trained(small, n=1)
    lam = image_error(small, drawn()(), *start(small, seed=0))
    assert [u.lam for u in plain] == [1.0] * 3
    assert [u.lam for u in weighed] == pytest.approx(lam[1:].tolist(), rel=1e-6)
    assert weighed[0].mse == plain[0].mse


def test_the_objective_is_lambda_mse_plus_beta_sum_r():
    out, target = torch.tensor([1.0, 3.0]), torch.zeros(2)
    r = torch.tensor([0.5, 0.25], requires_grad=True)
    loss = objective(out, target, r, lam=0.1, beta=2.0)
    assert loss.item() == pytest.approx(0.1 * 5 + 2 * 0.75)
    loss.backward()
    assert r.grad.tolist() == [2.0, 2.0]
