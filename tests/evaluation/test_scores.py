"""Scores of sets of images: what is read, what torchmetrics is given, what a judge recognises."""

import sys

import numpy as np
import pytest
import torch
from conftest import refused, start
from PIL import Image
from scores import clip_score, fid_inception, inception_score, read_images

from harmonica import check_denoiser, sample
from harmonica.evaluation.judge import GARMENTS, digits, judge_of
from harmonica.models import BUNDLED, load

COUNT = 11


def written(path, seed=0, count=COUNT):
    """Write random images (N, 4, 4, 3) uint8 and return them."""
    images = np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    np.savez(path, images)
    return images


def test_reading_refuses_what_is_no_set_of_images(tmp_path):
    read = lambda name: list(read_images(tmp_path / name))  # noqa: E731
    for name, message in {
        "none.npz": r"none\.npz: no such file",
        "": "has no image; expected files in .png",
    }.items():
        with pytest.raises(FileNotFoundError, match=message):
            read(name)
    (tmp_path / "text.npz").write_text("not an archive")
    np.savez(tmp_path / "other.npz", mu=np.zeros(3), sigma=np.zeros(3))
    np.savez(tmp_path / "float.npz", np.zeros((2, 4, 4, 3)))
    for name, message in {
        "text": r"text\.npz is neither an \.npz nor a folder",
        "other": "has arrays mu, sigma; expected arr_0 of uint8",
        "float": r"has arr_0 float64 \(2, 4, 4, 3\)",
    }.items():
        with refused(message):
            read(f"{name}.npz")
    for name, size in (("a.png", (4, 4)), ("b.JPG", (5, 4))):
        Image.new("L", size).save(tmp_path / name)
    with refused(r"b\.JPG is \(4, 5\), .*a\.png \(4, 4\)"):
        read("")


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
    assert len(GARMENTS) == 10
