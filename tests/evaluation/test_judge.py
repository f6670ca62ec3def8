"""Judges: what the bundled models draw is recognised, and real pictures are at distance zero."""

import pytest
import torch
from conftest import refused, start

from harmonica import check_denoiser, sample
from harmonica.evaluation.judge import GARMENTS, digits, judge_of
from harmonica.models import BUNDLED, load


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


def test_garments_are_a_denoiser_in_a_small_file():
    check_denoiser(load("garments", steps=2))
    assert BUNDLED["garments"].stat().st_size <= 3_000_000
    assert len(GARMENTS) == 10


def test_real_digits_are_at_distance_zero_and_recognised_and_a_model_without_a_judge_is_named():
    (images, labels), judge = digits(), judge_of("tiny")
    assert (images.shape, images.min(), images.max()) == ((1797, 1, 8, 8), -1, 1)
    assert judge.frechet(images) == pytest.approx(0.0, abs=1e-6)
    assert judge.frechet(images + 0.5) == pytest.approx(64 * 0.25, rel=1e-5)
    assert judge.agreement(images, labels) > 0.98
    with refused("no judge knows the pictures of 'uvit-h'"):
        judge_of("uvit-h")
