"""The quadratic around a table: its numbers are derivatives, and what it chooses is on target."""

from dataclasses import replace

import pytest
import torch
from conftest import attributes, make, seeded, seeds, tables, with_noise
from hypothesis import given
from hypothesis import strategies as st
from small import weigh

from harmonica import Macs, Router, Schedule, gated, sample
from harmonica.models import load
from harmonica.models.dit import DiTDenoiser
from harmonica.samplers import SAMPLERS, make_sampler
from harmonica.search import flip_effects as quadratic
from harmonica.search.flip_effects import Quadratic, best_flips, flip_effects_at, reads, with_table
from harmonica.search.learn import learn_weights
from harmonica.search.references import Pool, references
from harmonica.search.target import Target
from harmonica.table import outputs_before

TABLE = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 1], [0, 1, 1, 0], [1, 0, 1, 0]]).bool()
FLAT = Macs(torch.ones(4, dtype=torch.float64), 0.0)


def effects(d, schedule, x, cond, images, signs=None, **how):
    signs = torch.ones_like(x) if signs is None else signs
    return flip_effects_at(d, schedule, Pool(x, cond, images), signs, **how)


def normal(*shape, seed):
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


def flipped(schedule, e):
    """Return a schedule with one entry of its table flipped."""
    table = schedule.compute.clone()
    table.view(-1)[4 + e] ^= True
    return with_table(schedule, table)


def walk(d, x, cond, sums):
    """Return the image where site i gives Σ_c R[k, i, c]·(its output of step c) at step k."""
    outputs, memory = {}, {}
    for k in range(d.steps):

        def gate(site, compute):
            outputs.setdefault(site, []).append(compute())
            return sum(float(w) * f for w, f in zip(sums[k, site], outputs[site], strict=False))

        with torch.no_grad(), gated(d.sites, gate):
            x = d.step(x, d.predict(x, k, cond), k, memory)
    return x


def along(d, x, cond, e, order=0):
    """Return v of one entry, (B, …), by a difference of two walks whose entry is a little off."""
    schedule = Schedule(TABLE, order=order)
    own, by = reads(schedule), 1e-5
    change = reads(flipped(schedule, e)) - own
    there, back = (walk(d, x, cond, own + sign * by * change) for sign in (1, -1))
    return (there - back) / (2 * by)


@given(table=tables(), remembers=st.booleans(), order=st.integers(0, 2), seed=seeds)
def test_the_walk_that_is_differentiated_is_the_tables_own(table, remembers, order, seed):
    """Where each image is what the table makes of its noise, the distance is zero, and the gradient."""
    d, x, cond = with_noise(make(remembers=remembers), 3, seed)
    schedule = replace(table, order=order)
    image = sample(d, x, cond, schedule)
    assert not effects(d, schedule, x, cond, image).gradient.any()
    assert effects(d, Schedule(TABLE), x, cond, image * (1 + 2**-50)).gradient.any()


@given(table=tables(), order=st.integers(0, 2), past=st.integers(0, 3), e=st.integers(0, 11))
def test_an_entry_that_is_flipped_all_the_way_gives_the_walk_of_that_table(table, order, past, e):
    d, x, cond = with_noise(make(), 2)
    schedule = replace(table, order=order)
    schedule = weigh(schedule, past, e) if past else schedule
    other = flipped(schedule, e)
    image, z = sample(d, x, cond, other), (torch.arange(12) == e).double().view(3, 4, 1)
    sums = quadratic.Sums(schedule, x.device)
    whole = quadratic.walk_with_flips(d, sums, z.repeat(1, 1, 2), x, cond)
    assert torch.allclose(whole, image, rtol=1e-6, atol=1e-9)
    assert torch.allclose(walk(d, x, cond, reads(other)), image, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("remembers", "order"), [(False, 0), (True, 2)])
def test_h_and_g_are_derivatives_of_the_image(remembers, order, monkeypatch):
    monkeypatch.setattr(quadratic, "CAP", 1e9)
    d, x, cond = with_noise(make(remembers=remembers), 3)
    plain = sample(d, x, cond)
    v = torch.stack([along(d, x, cond, e, order) for e in range(12)]).flatten(1)  # (E, B·C·H·W)
    schedule, g = Schedule(TABLE, order=order), 0
    away = (sample(d, x, cond, schedule) - plain).flatten()
    for unit in torch.eye(x[0].numel()):  # for signs, all of them: then G is exact
        model = effects(d, schedule, x, cond, plain, unit.view(1, *x.shape[1:]).expand_as(x))
        g = g + model.curvature
    assert torch.allclose(model.gradient, v @ away / len(away), rtol=1e-6, atol=1e-12)
    assert torch.allclose(g, v @ v.T / len(away), rtol=1e-6, atol=1e-8 * float(g.max()))


def test_random_signs_give_g_on_average(monkeypatch):
    monkeypatch.setattr(quadratic, "CAP", 1e9)
    d, x, cond = with_noise(make(), 600)
    v = torch.stack([along(d, x, cond, e) for e in range(12)]).flatten(1)
    signs = torch.randint(2, x.shape, generator=seeded(0)) * 2 - 1
    g = effects(d, Schedule(TABLE), x, cond, sample(d, x, cond), signs).curvature
    assert float((g - v @ v.T / x.numel()).norm() / g.norm()) < 0.25


def test_a_noise_that_went_elsewhere_counts_no_more_than_cap_times_the_median():
    """Its plain image is put far away: h grows with the distance d, and w·d with w ~ 1/d² falls."""
    d, x, cond = with_noise(make(), 3)
    image = sample(d, x, cond, Schedule(TABLE))
    plain, hs = image - 0.1, []
    for away in (0.2, 100.0):
        plain[0] = image[0] - away
        hs.append(effects(d, Schedule(TABLE), x, cond, plain).gradient)
    rest = effects(d, Schedule(TABLE), x[1:], cond[1:], plain[1:]).gradient * 2 / 3
    assert float((hs[0] - rest).norm()) > 1e-3 * float(rest.norm())
    first = effects(d, Schedule(TABLE), x[:1], cond[:1], plain[:1]).gradient / 3
    expected = rest + first * quadratic.CAP * 0.1**2 / 100.0**2
    assert torch.allclose(hs[1], expected, rtol=1e-6, atol=1e-9)


def test_portions_of_a_pool_give_the_same_effects_and_the_model_is_left_as_it_was():
    d, x, cond = with_noise(make(), 5)
    images, schedule = sample(d, x, cond) + 0.1, Schedule(TABLE, order=1)
    whole, parts = (effects(d, schedule, x, cond, images, portion=n) for n in (5, 2))
    assert torch.allclose(parts.gradient, whole.gradient, rtol=1e-9, atol=1e-15)
    assert torch.allclose(parts.curvature, whole.curvature, rtol=1e-9, atol=1e-15)
    d, x, cond = with_noise(make(), 2)
    before = attributes(d.model)
    effects(d, Schedule(TABLE), x, cond, sample(d, x, cond))
    assert all(p.grad is None for p in d.model.parameters())
    assert attributes(d.model) == before


@given(table=tables(), other=tables(), past=st.integers(1, 3), seed=seeds)
def test_another_table_keeps_learned_weights_where_it_decides_alike(table, other, past, seed):
    d, x, cond = with_noise(make(), 2, seed)
    learned = weigh(table, past, seed)
    moved = with_table(learned, other.compute)
    assert torch.equal(moved.compute, other.compute)  # and its weights are legal, or it would raise
    assert with_table(learned, table.compute) == learned
    same = (other.compute == table.compute) & (outputs_before(other.compute) >= past)
    assert torch.equal(moved.weights[same], learned.weights[same])
    assert torch.allclose(walk(d, x, cond, reads(learned)), sample(d, x, cond, learned))


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_every_sampler_passes_gradients_on_and_where_nothing_is_reused_there_are_none(sampler):
    model = DiTDenoiser(make().model, make_sampler(sampler, 4), guidance=1.5, guided_channels=1)
    d, x, cond = with_noise(model, 2, 0)
    plain = sample(d, x, cond)
    for rows, moves in (([1, 0, 0, 1], True), ([1, 1, 1, 1], False)):
        model = effects(d, Schedule([[row] * 4 for row in rows]), x, cond, plain)
        assert bool((model.curvature.diagonal() > 0).all())  # known all the same
        assert bool((model.gradient != 0).all()) == bool((model.gradient != 0).any()) == moves


def test_batches_in_half_precision_keep_small_gradients():
    d, x, cond = with_noise(make(dtype=torch.bfloat16), 2)
    x = x.bfloat16()
    near = sample(d, x, cond) * (1 - 2**-6)
    gradient = effects(d, Schedule(torch.ones(4, 4)), x, cond, near).gradient
    assert bool((gradient[:8] != 0).any())
    assert bool(gradient.isfinite().all())


@given(seed=seeds)
def test_what_the_quadratic_adds_is_its_formula(seed):
    v, h, z = normal(6, 5, seed=seed), normal(6, seed=seed + 1), normal(6, seed=seed + 2) > 0
    expected = 2 * z.double() @ h + (z.double() @ v).square().sum()
    assert Quadratic(h, v @ v.T)(z) == pytest.approx(float(expected), abs=1e-9)


def test_flips_that_cancel_are_found_together_and_a_quadratic_that_is_not_finite_proposes_none():
    table = torch.ones(2, 4, dtype=torch.bool)
    v = torch.tensor([[1.0, 0.0], [-1.0, 0.01], [0.0, 0.5], [0.3, 0.3]], dtype=torch.float64)
    model = Quadratic(torch.zeros(4, dtype=torch.float64), v @ v.T)
    chosen = best_flips(model, table, Target(8 / 6, FLAT, 2), most=4)  # two entries must go
    assert int((~chosen).sum()) == 2
    first, none = table & (torch.arange(2) < 1)[:, None], Target(1, FLAT, 2)
    towards = Quadratic(-0.9 * (v @ v.T).sum(1), v @ v.T)
    assert bool(best_flips(towards, first, none, most=4)[0].all())
    for spoilt in ([float("nan"), 0.0, 0.0, 0.0], [0.0, float("inf"), 0.0, 0.0]):
        broken = Quadratic(torch.tensor(spoilt, dtype=torch.float64), v @ v.T)
        assert torch.equal(best_flips(broken, first, none, most=4), first)


@given(seed=seeds, speedup=st.floats(1.0, 2.4), most=st.integers(1, 12))
def test_what_is_chosen_is_on_target_and_no_further_away_than_allowed(seed, speedup, most):
    v, h = normal(12, 20, seed=seed), normal(12, seed=seed + 1)
    model = Quadratic(h, v @ v.T)
    target = Target(speedup, Macs(torch.tensor([1.0, 2.0, 1.0, 2.0], dtype=torch.float64), 0.5), 4)
    landed = target.fit_budget(Router(4, 4, generator=seeded(seed))().detach(), TABLE)
    chosen = best_flips(model, landed, target, most=most)
    assert target.spent(chosen) <= target.allowed
    assert int((chosen != landed).sum()) <= most
    assert bool(chosen[0].all())


def test_blocks_that_are_run_again_change_no_gradient():
    gradients = []
    for again in (False, True):
        d = load("tiny", steps=3, activation_checkpointing=again)
        pool = references(d, noises=4, factor=2, generator=seeded(0))
        table = Schedule([[1] * 16, [0] * 16, [1] * 16], sites=tuple(d.sites))
        learned = learn_weights(d, table, pool, iterations=2).gate_weights
        model = flip_effects_at(d, table, pool, torch.ones_like(pool.x))
        gradients.append((model.gradient, torch.zeros(1) if learned is None else learned))
    assert all(map(torch.equal, *gradients))
