"""The quadratic around a table: its walk is the table's, its numbers are derivatives, what it chooses is on target."""

from dataclasses import replace

import pytest
import torch
from conftest import make, seeded, seeds, start, tables, with_noise
from hypothesis import given
from hypothesis import strategies as st

from harmonica import Macs, Router, Schedule, sample
from harmonica.models import load
from harmonica.samplers import SAMPLERS
from harmonica.search import flip_effects as quadratic
from harmonica.search.flip_effects import (
    Quadratic,
    Sums,
    best_flips,
    flip_effects_at,
    walk_with_flips,
    with_table,
)
from harmonica.search.learn import learn_weights
from harmonica.search.references import Pool, references
from harmonica.search.target import Target

TABLE = torch.tensor(
    [[True] * 4, [True, False, True, True], [False, True, True, False], [True, False] * 2]
)


def weigh(table, past, seed):
    """Return a schedule with random weights wherever its table allows them."""
    generator = seeded(seed)
    weights = torch.randn(*table.compute.shape, 1 + past, generator=generator)
    weights *= torch.arange(1 + past) <= past_of(table)[:, :, None]
    weights[:, :, 0] *= table.compute
    return replace(table, weights=weights)


def effects(d, schedule, x, cond, images, signs, **how):
    return flip_effects_at(d, schedule, Pool(x, cond, images), signs, **how)


def walk(d, z, x, cond, schedule):
    """Return the image for z (E,) or (T − 1, N, B)."""
    z = z if z.dim() == 3 else z.double().view(3, 4, 1).repeat(1, 1, len(x))
    return walk_with_flips(d, Sums(schedule, x.device), z, x, cond)


def along(d, x, cond, e, by=1e-5, order=0):
    """Return v of one entry, (B, …), by a difference of two walks whose entry is a little off, either way."""
    unit = by * (torch.arange(12) == e).double()
    schedule = Schedule(TABLE, order=order)
    there, back = (walk(d, sign * unit, x, cond, schedule) for sign in (1, -1))
    return (there - back) / (2 * by)


@given(table=tables(), remembers=st.booleans(), order=st.integers(0, 2), seed=seeds)
def test_the_walk_that_is_differentiated_is_the_tables_own_bit_for_bit(
    table, remembers, order, seed
):
    d, x, cond = with_noise(make(remembers=remembers), 3, seed)
    schedule = replace(table, order=order)
    assert torch.equal(walk(d, torch.zeros(12), x, cond, schedule), sample(d, x, cond, schedule))


@given(table=tables(), order=st.integers(0, 2), past=st.integers(0, 3), e=st.integers(0, 11))
def test_an_entry_that_is_turned_all_the_way_gives_the_walk_of_that_table(table, order, past, e):
    d, x, cond = with_noise(make(), 2)
    schedule = replace(table, order=order)
    schedule = weigh(schedule, past, e) if past else schedule
    z = torch.arange(12) == e
    other = table.compute.clone()
    other[1:] ^= z.view(3, 4)
    image = sample(d, x, cond, with_table(schedule, other))
    assert torch.allclose(walk(d, z, x, cond, schedule), image, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("remembers", "order"), [(False, 0), (True, 2)])
def test_h_and_g_are_derivatives_of_the_image(remembers, order, monkeypatch):
    monkeypatch.setattr(quadratic, "CAP", 1e9)
    d, x, cond = with_noise(make(remembers=remembers), 3)
    plain = sample(d, x, cond)
    v = torch.stack([along(d, x, cond, e, order=order) for e in range(12)])  # (E, B, C, H, W)
    away = sample(d, x, cond, Schedule(TABLE, order=order)) - plain
    pixels = x[0].numel()
    found = []
    for p in range(pixels):  # unit vectors for signs, all of them: then G is exact
        unit = torch.zeros(3, pixels).index_fill_(1, torch.tensor([p]), 1.0).view_as(x)
        found.append(effects(d, Schedule(TABLE, order=order), x, cond, plain, unit))
    g = sum(each.curvature for each in found)
    flat = v.flatten(1)
    assert torch.allclose(
        found[0].gradient, flat @ away.flatten() / away.numel(), rtol=1e-6, atol=1e-12
    )
    assert torch.allclose(g, flat @ flat.T / away.numel(), rtol=1e-6, atol=1e-8 * float(g.max()))


def test_random_signs_give_g_on_average(monkeypatch):
    monkeypatch.setattr(quadratic, "CAP", 1e9)
    d, x, cond = with_noise(make(), 600)
    plain, generator = sample(d, x, cond), seeded(0)
    v = torch.stack([along(d, x, cond, e) for e in range(12)]).flatten(1)
    signs = torch.randint(2, x.shape, generator=generator) * 2 - 1
    g = effects(d, Schedule(TABLE), x, cond, plain, signs).curvature
    assert float((g - v @ v.T / x.numel()).norm() / g.norm()) < 0.25


def test_a_noise_that_went_elsewhere_counts_no_more_than_cap_times_the_median():
    """Its plain image is put far away: h grows with the distance d, and w·d with w ~ 1/d² falls."""
    d, x, cond = with_noise(make(), 3)
    image = sample(d, x, cond, Schedule(TABLE))
    plain, hs = image - 0.1, []
    for away in (0.2, 100.0):
        plain[0] = image[0] - away
        hs.append(effects(d, Schedule(TABLE), x, cond, plain, torch.ones_like(x)).gradient)
    rest = (
        effects(d, Schedule(TABLE), x[1:], cond[1:], plain[1:], torch.ones_like(x[1:])).gradient
        * 2
        / 3
    )
    assert float((hs[0] - rest).norm()) > 1e-3 * float(rest.norm())
    first = (
        effects(d, Schedule(TABLE), x[:1], cond[:1], plain[:1], torch.ones_like(x[:1])).gradient / 3
    )
    assert torch.allclose(
        hs[1], rest + first * quadratic.CAP * 0.1**2 / 100.0**2, rtol=1e-6, atol=1e-9
    )


def test_portions_of_a_pool_give_the_same_effects_to_rounding():
    d, x, cond = with_noise(make(), 5)
    images, schedule = sample(d, x, cond) + 0.1, Schedule(TABLE, order=1)
    whole = effects(d, schedule, x, cond, images, torch.ones_like(x))
    parts = effects(d, schedule, x, cond, images, torch.ones_like(x), portion=2)
    assert torch.allclose(parts.gradient, whole.gradient, rtol=1e-9, atol=1e-15)
    assert torch.allclose(parts.curvature, whole.curvature, rtol=1e-9, atol=1e-15)


@given(table=tables(), other=tables(), past=st.integers(1, 3), seed=seeds)
def test_another_table_keeps_learned_weights_where_its_decisions_are_the_same(
    table, other, past, seed
):
    d, x, cond = with_noise(make(), 2, seed)
    learned = weigh(table, past, seed)
    moved = with_table(learned, other.compute)
    assert torch.equal(moved.compute, other.compute)  # and its weights are legal, or it would raise
    assert with_table(learned, table.compute) == learned
    same = (other.compute == table.compute) & (past_of(other) >= past)
    assert torch.equal(moved.weights[same], learned.weights[same])
    image = walk(d, torch.zeros(12), x, cond, learned)
    assert torch.allclose(image, sample(d, x, cond, learned))


def past_of(table):
    return table.compute.cumsum(0) - table.compute.long()


def test_where_nothing_is_reused_yet_the_curvature_is_known():
    d, x, cond = with_noise(make(), 2)
    model = effects(d, Schedule(torch.ones(4, 4)), x, cond, sample(d, x, cond), torch.ones_like(x))
    assert float(model.gradient.abs().max()) == 0.0
    assert bool((model.curvature.diagonal() > 0).all())


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_every_sampler_passes_gradients_on(sampler):
    d = load("tiny", steps=4, sampler=sampler)
    table = torch.ones(4, 16, dtype=torch.bool)
    table[1:3] = False
    x, cond = start(d, 2, 0)
    model = effects(d, Schedule(table), x, cond, sample(d, x, cond), torch.ones_like(x))
    assert bool((model.curvature.diagonal() > 0).all())
    assert bool((model.gradient != 0).all())


def test_batches_in_half_precision_keep_small_gradients():
    d, x, cond = with_noise(make(dtype=torch.bfloat16), 2)
    x = x.bfloat16()
    near = sample(d, x, cond) * (1 - 2**-6)
    gradient = effects(d, Schedule(torch.ones(4, 4)), x, cond, near, torch.ones_like(x)).gradient
    assert bool((gradient[:8] != 0).any())
    assert bool(gradient.isfinite().all())


def test_weights_get_no_gradient_and_the_model_is_left_as_it_was():
    d, x, cond = with_noise(make(), 2)
    before = {name: vars(site).get("forward") for name, site in d.sites.items()}
    effects(d, Schedule(TABLE), x, cond, sample(d, x, cond), torch.ones_like(x))
    assert all(p.grad is None for p in d.model.parameters())
    assert before == {name: vars(site).get("forward") for name, site in d.sites.items()}


@given(seed=seeds)
def test_what_the_quadratic_adds_is_its_formula(seed):
    generator = seeded(seed)
    v = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    model = Quadratic(torch.randn(6, generator=generator, dtype=torch.float64), v @ v.T)
    z = torch.rand(6, generator=generator) > 0.5
    assert model(z) == pytest.approx(
        float(2 * z.double() @ model.gradient + (z.double() @ v).square().sum()), abs=1e-9
    )


def test_a_quadratic_that_is_not_finite_proposes_no_flip():
    table = torch.tensor([[True, True], [True, False], [False, True]])
    flat = Macs(torch.ones(2, dtype=torch.float64), 0.0)
    for spoilt in ([float("nan"), 0.0, 0.0, 0.0], [0.0, float("inf"), 0.0, 0.0]):
        gradient = torch.tensor(spoilt, dtype=torch.float64)
        model = Quadratic(gradient, torch.eye(4, dtype=torch.float64))
        assert torch.equal(best_flips(model, table, Target(1.0, flat, 3), most=4), table)


def test_flips_that_cancel_are_found_together():
    table = torch.ones(2, 4, dtype=torch.bool)
    v = torch.tensor([[1.0, 0.0], [-1.0, 0.01], [0.0, 0.5], [0.3, 0.3]], dtype=torch.float64)
    model = Quadratic(torch.zeros(4, dtype=torch.float64), v @ v.T)
    flat = Macs(torch.ones(4, dtype=torch.float64), 0.0)
    chosen = best_flips(model, table, Target(8 / 6, flat, 2), most=4)  # two entries must go
    assert int((~chosen).sum()) == 2
    pair = best_flips(
        Quadratic(-0.9 * (v @ v.T).sum(1), v @ v.T),
        ~table | (torch.arange(2) < 1)[:, None],
        Target(1, flat, 2),
        most=4,
    )
    assert bool(pair[0].all())


@given(seed=seeds, speedup=st.floats(1.0, 2.4), most=st.integers(1, 12))
def test_what_is_chosen_is_on_target_and_no_further_away_than_allowed(seed, speedup, most):
    generator = seeded(seed)
    v = torch.randn(12, 20, generator=generator, dtype=torch.float64)
    model = Quadratic(torch.randn(12, generator=generator, dtype=torch.float64), v @ v.T)
    target = Target(speedup, Macs(torch.tensor([1.0, 2.0, 1.0, 2.0], dtype=torch.float64), 0.5), 4)
    landed = target.fit_budget(Router(4, 4, generator=generator)().detach(), TABLE)
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
        effects = flip_effects_at(d, table, pool, torch.ones_like(pool.x))
        learned = learn_weights(d, table, pool, iterations=2)
        gradients.append((effects.gradient, learned.gate_weights))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True) if a is not None)
