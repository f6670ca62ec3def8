"""Distances and scores: numbers by hand, laws of sets, and intervals that mean what they say."""

import math
import time

import pytest
import torch
from bootstrap import Interval, bootstrap
from conftest import refused, seeded, seeds
from hypothesis import given
from hypothesis import strategies as st
from scores import precision_recall, psnr

from harmonica.evaluation.distances import frechet_distance, image_mse, moments


def images(count, seed=0, *, shift=0.0, size=4):
    return torch.randn(count, 1, size, size, generator=seeded(seed)) + shift


def vectors(*args, **options):
    return images(*args, **options).flatten(1)


def frechet(a, b):
    return frechet_distance(moments(a), moments(b))


def test_psnr_of_a_known_error_is_of_the_mean_so_one_untouched_image_does_not_make_it_infinite():
    reference = images(3).double()
    for error, span, decibels in ((0.2, 2.0, 20.0), (0.02, 2.0, 40.0), (0.1, 1.0, 20.0)):
        assert psnr(reference + error, reference, span=span) == pytest.approx(decibels)
    half = reference[:2] + torch.tensor([0.2, 0.0]).view(2, 1, 1, 1)
    assert psnr(half, reference[:2]) == pytest.approx(20.0 + 10 * math.log10(2))
    assert psnr(reference, reference) == math.inf


@given(seed=seeds, other=seeds, count=st.integers(2, 40))
def test_frechet_distance_is_symmetric_and_zero_from_a_set_to_itself(seed, other, count):
    a, b = images(count, seed), images(40, other, shift=1.0)
    assert frechet(a, a) == pytest.approx(0.0, abs=1e-5)
    assert frechet(a, b) == pytest.approx(frechet(b, a), rel=1e-6)


def test_frechet_distance_by_hand():
    a = torch.tensor([[0.0], [2.0]])  # mean 1, variance 2
    b = torch.tensor([[5.0], [13.0]])  # mean 9, variance 32
    assert frechet(a, b) == pytest.approx(8**2 + 2 + 32 - 2 * 8)
    with refused("there are 1 vectors; a covariance takes at least 2"):
        moments(a[:1])


@given(seed=seeds, k=st.integers(1, 5), copies=st.sampled_from([1, 2, 5]))
def test_a_set_covers_itself_and_recall_is_precision_the_other_way_round(seed, k, copies):
    x = vectors(10, seed, shift=100.0).repeat(copies, 1)  # five copies: a ball of radius 0
    assert precision_recall(x, x[torch.randperm(len(x), generator=seeded(seed))]) == (1.0, 1.0)
    a, b = vectors(20, seed, size=2), vectors(30, seed + 1, shift=0.5, size=2)
    assert precision_recall(a, b, k) == precision_recall(b, a, k)[::-1]
    assert precision_recall(a, b + 1000, k) == (0.0, 0.0)
    # Far from the origin distances by products would lose in rounding what is near.
    a, b = ((vectors(40, s).double() * 256).round() / 256 for s in (seed, seed + 1))
    assert precision_recall(a + 2**26, b + 2**26) == precision_recall(a, b)  # rounds nothing


def test_precision_and_recall_by_hand_and_a_dropped_mode_costs_recall_alone(monkeypatch):
    reference = torch.tensor([[0.0], [1.0], [10.0], [11.0]])  # k = 1: balls [−1, 2] and [9, 12]
    # radii 3.5, 0.25, 0.25, 0.75: [1.5, 8.5], [0.25, 0.75], [0.5, 1], [0.75, 2.25]
    made = torch.tensor([[5.0], [0.5], [0.75], [1.5]])
    assert precision_recall(made, reference, neighbours=1) == (0.75, 0.25)
    both = torch.cat([vectors(50, 1), vectors(50, 2, shift=100.0)])
    assert precision_recall(both[:50], both) == (1.0, 0.5)
    a, b = vectors(30, 1), vectors(41, 2, shift=0.3)
    whole = precision_recall(a, b)
    monkeypatch.setattr("scores.ROWS", 7)
    assert precision_recall(a, b) == whole
    assert 0 < whole[0] < 1


@given(seed=seeds, shift=st.floats(0, 2), level=st.floats(0.01, 0.99))
def test_an_interval_contains_the_value(seed, shift, level):
    a, b = images(12, seed), images(15, 7, shift=shift)
    covers = lambda x: precision_recall(x.flatten(1), b.flatten(1))  # noqa: E731
    means = (lambda x: frechet(x, b), lambda x: float(x.mean()))
    for metric in (*means, lambda x: covers(x)[0], lambda x: covers(x)[1]):
        interval = bootstrap(metric, a, resamples=9, level=level, generator=seeded(seed))
        assert interval.low <= interval.value <= interval.high
        assert interval.value == metric(a)


def test_the_interval_of_a_mean_is_as_wide_as_theory_has_it():
    x = images(400, 3, size=1).double()
    mean = lambda x: float(x.mean())  # noqa: E731
    interval = bootstrap(mean, x, resamples=2000, level=0.95, generator=seeded(0))
    expected = 2 * 1.96 * float(x.std()) / 20
    assert interval.high - interval.low == pytest.approx(expected, rel=0.1)
    assert interval.high - interval.value == pytest.approx(interval.value - interval.low, rel=0.25)


def test_intervals_of_a_frechet_distance_contain_the_mean_over_new_sets():
    """The plain quantiles would not: every resample is farther from the reference than the set is."""
    reference = images(3000, 99, size=2)
    fresh = [images(60, seed, size=2) for seed in range(40)]
    mean = sum(frechet(x, reference) for x in fresh) / len(fresh)
    distance, hits = lambda x: frechet(x, reference), 0
    for x in fresh:
        _, low, high = bootstrap(distance, x, resamples=60, generator=seeded(1))
        hits += low <= mean <= high
    assert hits / len(fresh) >= 0.8


def test_paired_tensors_are_resampled_together_by_the_generator_that_is_given_alone():
    a = images(50, 1).double()
    offsets = torch.arange(50).view(-1, 1, 1, 1) / 50
    interval = bootstrap(image_mse, a + offsets, a, generator=seeded(0))
    assert interval.high < float(offsets.square().mean()) * 2  # unpaired, the error would be near 2
    same = bootstrap(image_mse, a + 0.5, a, generator=seeded(0))
    assert (same.low, same.high) == (pytest.approx(0.25), pytest.approx(0.25))
    before, mean = torch.get_rng_state(), lambda x: float(x.mean())
    one, two, other = (bootstrap(mean, images(20), generator=seeded(s)) for s in (0, 0, 1))
    assert one == two != other
    assert torch.equal(before, torch.get_rng_state())


def test_bootstrap_refuses_what_it_cannot_resample():
    x, mean = images(5), lambda *rows: float(rows[0].mean())
    for metric, rows, how, message in (
        (mean, [x], {"resamples": 0}, "resamples 0, level 0.95"),
        (mean, [x], {"level": 1.0}, "level 1.0"),
        (mean, [x, x[:4]], {}, "the tensors have 5, 4 rows"),
        (mean, [x[:0]], {}, "have 0 rows"),
        (psnr, [x, x], {}, "the metric is inf"),
    ):
        with refused(message):
            bootstrap(metric, *rows, **how, generator=seeded(0))


def test_a_thousand_images_of_64_pixels_take_seconds():
    a, b = images(1000, 1, size=8), images(1797, 2, size=8)
    began = time.process_time()
    interval = bootstrap(lambda x: frechet(x, b), a, resamples=200, generator=seeded(0))
    assert time.process_time() - began < 5
    assert isinstance(interval, Interval)
