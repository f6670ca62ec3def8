"""Scores and judges: numbers by hand, laws of sets, honest intervals, and what is read from disk."""

import math
import sys
import time

import numpy as np
import pytest
import torch
from bootstrap import Interval, bootstrap
from conftest import refused, seeded, seeds, start
from hypothesis import given
from hypothesis import strategies as st
from judges import digits, frechet_distance, judge_of, moments
from PIL import Image
from scores import clip_score, fid_inception, inception_score, precision_recall, psnr, read_images

from harmonica import check_denoiser, sample
from harmonica.models import BUNDLED, load
from harmonica.search.references import image_mse


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


COUNT = 11


def written(path, seed=0, count=COUNT):
    """Write random images (N, 4, 4, 3) uint8 and return them."""
    images = np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    np.savez(path, images)
    return images


NO_SETS = {
    "none.npz": r"none\.npz: no such file",
    "empty": "has no image; expected files in .png",
    "text.npz": r"text\.npz is neither an \.npz nor a folder",
    "other.npz": "has arrays mu, sigma; expected arr_0 of uint8",
    "float.npz": r"has arr_0 float64 \(2, 4, 4, 3\)",
    "": r"b\.JPG is \(4, 5\), .*a\.png \(4, 4\)",
}


def test_reading_refuses_what_is_no_set_of_images(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.npz").write_text("not an archive")
    np.savez(tmp_path / "other.npz", mu=np.zeros(3), sigma=np.zeros(3))
    np.savez(tmp_path / "float.npz", np.zeros((2, 4, 4, 3)))
    for name, size in (("a.png", (4, 4)), ("b.JPG", (5, 4))):
        Image.new("L", size).save(tmp_path / name)
    for name, message in NO_SETS.items():
        kind = FileNotFoundError if name in ("none.npz", "empty") else ValueError
        with pytest.raises(kind, match=message):
            list(read_images(tmp_path / name))


def test_without_the_extra_fid_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", None)
    with refused(r"pip install 'harmonica-dit\[fid\]' brings it"):
        fid_inception(tmp_path / "a.npz", tmp_path / "b.npz")


class Metric(torch.nn.Module):
    """Stands in for a metric of torchmetrics, and notes what it is given."""

    def __init__(self, **settings):
        super().__init__()
        type(self).settings, type(self).calls = settings, []

    def update(self, images, *more, **which):
        assert images.dtype == torch.uint8
        self.calls.append((images.permute(0, 2, 3, 1).numpy(), *more, *which.values()))

    def compute(self):
        return torch.tensor([3.0, 0.5]) if "splits" in self.settings else torch.tensor(1.5)


@pytest.fixture
def metric(monkeypatch, request):
    """Stand in for torchmetrics, which no test needs to have."""
    *places, name = f"torchmetrics.{request.param}".split(".")
    for i in range(1, len(places) + 1):
        above = ".".join(places[:i])
        monkeypatch.setitem(sys.modules, above, module := type(sys)(above))
    setattr(module, name, Metric)
    return Metric


@pytest.mark.parametrize("metric", ["image.fid.FrechetInceptionDistance"], indirect=True)
def test_fid_is_given_channels_first_bytes_of_both_sets(metric, tmp_path):
    one, two = written(tmp_path / "one.npz"), written(tmp_path / "two.npz", 1, 3)
    assert fid_inception(tmp_path / "one.npz", tmp_path / "two.npz", batch_size=4) == 1.5
    assert metric.settings == {"feature": 2048}
    for real, images in ((False, one), (True, two)):
        given = np.concatenate([batch for batch, which in metric.calls if which == real])
        assert np.array_equal(given, images)


@pytest.mark.parametrize("metric", ["image.inception.InceptionScore"], indirect=True)
def test_the_inception_score_is_of_all_images_and_needs_one_a_split(metric, tmp_path):
    images = written(tmp_path / "one.npz")
    assert inception_score(tmp_path / "one.npz", splits=COUNT, batch_size=4) == (3.0, 0.5)
    assert np.array_equal(np.concatenate([batch for (batch,) in metric.calls]), images)
    with refused(rf"splits is {COUNT + 1}; .*one.npz has {COUNT} images"):
        inception_score(tmp_path / "one.npz", splits=COUNT + 1)


@pytest.mark.parametrize("metric", ["multimodal.clip_score.CLIPScore"], indirect=True)
def test_the_clip_score_pairs_each_image_with_its_prompt(metric, tmp_path):
    images, prompts = written(tmp_path / "one.npz"), [f"prompt {i}" for i in range(COUNT)]
    assert clip_score(tmp_path / "one.npz", prompts, batch_size=4) == 1.5
    assert [text for _, texts in metric.calls for text in texts] == prompts
    assert np.array_equal(np.concatenate([batch for batch, _ in metric.calls]), images)
    for wrong in (prompts[:-1], [*prompts, "one more"]):
        with refused(rf"has {COUNT} images, there are {len(wrong)} prompts"):
            clip_score(tmp_path / "one.npz", wrong, batch_size=4)


@pytest.mark.parametrize(("model", "goal"), [("tiny", 0.97), ("garments", 0.88)])
def test_what_a_bundled_model_draws_is_recognised(model, goal):
    denoiser, judge = load(model, steps=10), judge_of(model)
    labels = torch.arange(100) % 10
    x, _ = start(denoiser, 100, 11)
    images = sample(denoiser, x, labels)
    assert judge.agreement(images, labels) >= goal
    assert judge.agreement(images, (labels + 1) % 10) < 0.2
    near, far = judge.frechet(images), judge.frechet(torch.randn_like(images))
    assert 0.0 < near < far / 2
    assert judge.frechet_of_features(judge.features(images)) == near


def test_real_digits_are_at_distance_zero_and_recognised_and_garments_are_a_denoiser():
    (images, labels), judge = digits(), judge_of("tiny")
    assert (images.shape, images.min(), images.max()) == ((1797, 1, 8, 8), -1, 1)
    assert judge.frechet(images) == pytest.approx(0.0, abs=1e-6)
    assert judge.frechet(images + 0.5) == pytest.approx(64 * 0.25, rel=1e-5)
    assert judge.agreement(images, labels) > 0.98
    with refused("no judge knows the pictures of 'uvit-h'"):
        judge_of("uvit-h")
    check_denoiser(load("garments", steps=2))
    assert BUNDLED["garments"].stat().st_size <= 3_000_000
