"""References and weights learned towards them."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import attributes, equal, make, refused, seeded, start, tables, with_noise
from hypothesis import given
from hypothesis import strategies as st

import harmonica
from harmonica import Router, Schedule, macs, references, sample
from harmonica.forecast import taylor_weights
from harmonica.memory import in_portions
from harmonica.run_again import run_again, run_once
from harmonica.search.learn import learn_in_turn, learn_weights, pool_errors, weighted_walk
from harmonica.search.paths import whole_steps
from harmonica.search.references import Pool, image_errors, outlier_weights, typical_error
from harmonica.search.target import Target
from harmonica.storage.files import read_tensors, write_tensors

TABLE = Schedule([[1] * 4, [0, 1, 0, 0], [1, 0, 0, 1], [0] * 4])
SMALL = {"iterations": 12, "batch_size": 4}


def drawn(noises=12, factor=2):
    return references(make(), noises=noises, factor=factor)


@pytest.mark.parametrize("factor", [1, 3])
def test_a_reference_is_the_image_of_the_same_sampler_with_more_steps(factor):
    d = make()
    pool = references(d, noises=3, factor=factor, generator=seeded(5))
    x, cond = start(d, 3, 5)
    assert equal((pool.x, pool.images), (x, sample(make(4 * factor), x, cond)))
    part = pool[torch.tensor([2, 0])]
    assert equal((part.cond, part.images), (cond[[2, 0]], pool.images[[2, 0]]))


def test_an_interrupted_pool_is_continued_and_a_file_of_others_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("harmonica.search.references.PORTION", 4)
    d, path, whole, calls = make(), tmp_path / "pool.safetensors", drawn(), []

    def stop(done, noises):
        calls.append((done, noises))
        if done == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        references(d, noises=12, factor=2, path=path, progress=stop)
    half = read_tensors(path)
    assert len(half[0]["images"]) == 8
    for _ in range(2):
        again = references(d, noises=12, factor=2, path=path, progress=lambda *a: calls.append(a))
        assert torch.equal(again.images, whole.images)
    assert calls == [(4, 12), (8, 12), (12, 12)]
    of_labels, solver = make(), harmonica.load("tiny", steps=4, sampler="dpm-solver++")
    of_labels.draw = lambda *how: (lambda x, y: (x, (y + 1) % 3))(*make().draw(*how))
    for message, other in {
        "reference_steps 8 -> 12": {"factor": 3}, "noises .* -> ": {"noises": 11},
        "noises .* -> .*": {"generator": seeded(1)},
        r"something else \(guidance 1.5 -> 4.0\); name another": {"denoiser": make(guidance=4.0)},
        "sampler ddim -> dpm-solver": {"denoiser": solver},
        "steps 4 -> 8": {"denoiser": make(8), "factor": 1},
        r"\(weights ": {"denoiser": make(seed=1)}, r"\(conditions ": {"denoiser": of_labels},
    }.items():  # fmt: skip
        with refused(message):
            references(**{"denoiser": d, "noises": 12, "factor": 2, "path": path, **other})
    for images in (whole.images / 0, whole.images.long(), whole.images[:, :1], torch.ones(())):
        write_tensors(path, {"images": images}, half[1])
        with refused("holds images .* expected finite ones for 12 noises at most"):
            references(d, noises=12, factor=2, path=path)
    for facts in ({}, {"references": 8}):
        write_tensors(path, half[0], facts)
        with refused("holds no references; name another file"):
            references(d, noises=12, factor=2, path=path)


def test_where_no_finer_walk_can_be_made_it_says_what_to_use():
    d = make()

    class Plain:
        steps, sites, about = d.steps, d.sites, d.about
        predict, step, draw = d.predict, d.step, d.draw

    with refused('Plain has no with_steps.*toward="uncached"'):
        references(Plain(), noises=1)
    assert torch.equal(references(Plain(), noises=2, factor=1).images, drawn(2, 1).images)
    with refused(r"no walk of 300 × 4 steps: steps is 1200"):
        references(d, noises=1, factor=300)
    with refused("noises is 0; expected a whole number, 1 or more"):
        references(d, noises=0)


def test_a_sampler_that_draws_noise_is_compared_with_its_uncached_walk_one_image_a_noise():
    d = harmonica.load("tiny", steps=3, sampler="sa-solver")
    message = "draws noise during the walk, so a noise has no reference"
    with pytest.warns(UserWarning, match=message):
        pool = references(d, noises=2)
    assert torch.equal(pool.images, sample(d, pool.x, pool.cond))


def test_a_pool_has_one_image_and_one_row_of_each_condition_for_each_noise():
    x, y = torch.zeros(2, 1, 2, 2), torch.zeros(2)
    for message, several in {
        "image for each noise, and at least one": [(x, y, x[:1]), (x[:0], y[:0], x[:0]), (y, y, x)],
        "x is torch.int64; expected floating-point": [(x.long(), y, x)],
        "images is torch.bool; expected floating-point": [(x, y, x > 0)],
        r"x is \(2, 1, 2, 2\) on cpu and images are .* on meta": [(x, y, x.to("meta"))],
        r"x is \(\) on": [(torch.zeros(()), y, torch.zeros(()))],
        r"cond holds a tensor of shape \(1,\); expected tensors of 2 rows": [
            (x, c, x) for c in (y[:1], [y, y[:1]], (y, None, y[:1]), {"y": y, "z": {"w": y[:1]}})
        ],
        r"cond holds a tensor of shape \(\)": [(x, torch.zeros(()), x)],
        "cond holds a (str|list); expected": [(x, cond, x) for cond in ("cat", ["a", "b"], [1, 2])],
    }.items():
        for wrong in several:
            with refused(message):
                Pool(*wrong)
    shared = Pool(x, {"y": (y, None), "guidance": 2.0, "size": (8, 8)}, x)
    assert len(shared[slice(1)].cond["y"][0]) == 1


def test_portions_halve_where_memory_runs_out_and_other_errors_pass():
    asked = []

    def run(first, last):
        asked.append((first, last))
        if last - first > 3:
            raise torch.OutOfMemoryError
        return last - first

    assert list(in_portions(run, 7, 8)) == [2, 2, 2, 1]
    assert asked[:3] == [(0, 7), (0, 4), (0, 2)]
    with pytest.raises(ZeroDivisionError):
        list(in_portions(lambda first, last: 1 / 0, 1, 1))


@given(table=tables(), order=st.integers(0, 3))
def test_the_walk_that_is_differentiated_is_the_schedules_own(table, order):
    d, x, cond = with_noise(make(), 2)
    image = weighted_walk(d, table.compute.tolist(), taylor_weights(table.compute, order), x, cond)
    schedule = replace(table, order=order)
    assert torch.allclose(image, sample(d, x, cond, schedule), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("run", [run_again, run_once])
def test_the_gradient_is_that_of_finite_differences(run):
    d, x, cond = with_noise(make(remembers=True), 2)
    weights = replace(TABLE, order=1).gate_weights.requires_grad_()
    direction = torch.randn(x.shape, generator=seeded(0)).to(x)
    image = weighted_walk(d, TABLE.compute.tolist(), weights, x, cond, run)
    gradient = torch.autograd.grad(image, weights, direction)[0]
    for entry in ((1, 0, 1), (3, 1, 2), (3, 3, 1), (1, 1, 0)):
        ends = []
        for by in (-1e-6, 1e-6):
            moved = weights.detach().clone()
            moved[entry] += by
            ends.append(weighted_walk(d, TABLE.compute.tolist(), moved, x, cond))
        expected = float((direction * (ends[1] - ends[0])).sum() / 2e-6)
        assert math.isclose(float(gradient[entry]), expected, rel_tol=1e-3, abs_tol=1e-9)


def test_learned_weights_bring_images_nearer_and_leave_the_table_alone():
    pool = drawn(24)
    learned = learn_weights(make(), TABLE, pool, **SMALL)
    assert torch.equal(learned.compute, TABLE.compute)
    assert learned.weights.shape == (4, 4, 4)
    assert pool_errors(make(), pool, learned).mean() < pool_errors(make(), pool, TABLE).mean()
    held_back = float(typical_error(pool_errors(make(), pool[slice(4)], learned)))
    assert learned.provenance["weights_validation_error"] == held_back
    assert learned == learn_weights(make(), TABLE, pool, **SMALL)  # nothing is random


@pytest.mark.parametrize("lr", [1e-9, 10.0])
def test_on_the_noises_held_back_nothing_gets_worse_than_the_start(lr, monkeypatch):
    d, pool = make(), drawn(12)
    begin = learn_weights(d, TABLE, pool, **SMALL)
    monkeypatch.setattr("harmonica.search.learn.LR", lr)
    after = learn_weights(d, begin, pool, **SMALL)
    errors = [float(pool_errors(d, pool[slice(2)], s).mean()) for s in (begin, after, TABLE)]
    assert errors[1] <= errors[0] <= errors[2]


def test_portions_of_a_batch_or_steps_that_run_again_give_the_same_weights(monkeypatch):
    d, pool = make(), drawn(12)
    whole = learn_weights(d, TABLE, pool, **SMALL)
    small = "harmonica.search.references.in_portions"
    monkeypatch.setattr(small, lambda run, total, size: in_portions(run, total, min(size, 3)))
    assert torch.allclose(learn_weights(d, TABLE, pool, **SMALL).weights, whole.weights, atol=1e-5)
    monkeypatch.setattr("harmonica.search.paths.free_bytes", lambda device: 0)
    seen, walk = [], weighted_walk
    noted = lambda *a: seen.append(a[-1]) or walk(*a)  # noqa: E731
    monkeypatch.setattr("harmonica.search.learn.weighted_walk", noted)
    assert torch.allclose(learn_weights(d, TABLE, pool, **SMALL).weights, whole.weights, atol=1e-5)
    assert set(seen) == {run_again}


def test_settings_and_images_that_make_no_sense_are_refused_and_the_model_is_left_as_it_was():
    d, settings = make(), {"schedule": TABLE, "pool": drawn(4)}
    before = attributes(d.model)
    learn_weights(d, **settings, iterations=1)
    assert attributes(d.model) == before
    assert all(p.grad is None for p in d.model.parameters())
    for message, bad in {
        "history is 0": {"history": 0}, "iterations is 0": {"iterations": 0},
        "batch_size is True": {"batch_size": True}, "batch_size is 0": {"batch_size": 0},
        "the pool has 1 noises": {"pool": drawn(1)},
        "pool is a Tensor": {"pool": torch.zeros(4, 1, 8, 8)},
        "schedule is a Router": {"schedule": Router(4, 4)}, "generator is a int": {"generator": 0},
        "this schedule has 2 steps": {"schedule": Schedule([[1] * 4, [0] * 4])},
    }.items():  # fmt: skip
        with pytest.raises((ValueError, TypeError), match=message):
            learn_weights(d, **{**settings, **bad})
    pool = drawn(4)
    broken = Pool(pool.x, pool.cond, torch.full_like(pool.images, math.nan))
    with pytest.raises(FloatingPointError, match="look for NaN"):
        learn_weights(make(), TABLE, broken)


def test_errors_are_means_over_an_image_and_outliers_count_in_proportion_less():
    images = torch.tensor([1.0, 3.0]).view(2, 1, 1, 1).expand(2, 1, 2, 2)
    assert image_errors(torch.zeros(2, 1, 2, 2), images).tolist() == [1, 9]
    assert outlier_weights(torch.tensor([1.0, 4.0, 8.0]), 4.0).tolist() == [1.0, 1.0, 0.5]


def test_table_and_weights_in_turn_end_on_target_and_no_worse_than_weights_alone():
    d = make(steps=5)
    pool, target = references(d, noises=12, factor=4), Target(1.4, macs(d), 5)
    start = Schedule(whole_steps(d, (0, 2, 4)), sites=tuple(d.sites))
    how = {"iterations": 6, "batch_size": 4}
    learned = [learn_in_turn(d, start, pool, target, turns=n, **how) for n in (0, 1, 2)]
    none, _, two = (float(pool_errors(d, pool[slice(2)], each).mean()) for each in learned)
    assert two <= none
    assert learned[1].speedup(target.cost) >= 1.4


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_an_image_that_is_not_finite_is_never_counted_as_an_outlier(bad):
    assert float(typical_error(torch.tensor([1.0, 1.0, 1.0, bad]))) == float("inf")
