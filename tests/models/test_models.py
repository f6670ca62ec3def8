"""Models, samplers and cost: DiT and DDIM against their definitions, MACs against published ones."""

import math
from itertools import product

import pytest
import torch
from conftest import SMALL, attributes, make, refused, seeded, start, with_noise
from hypothesis import given
from hypothesis import strategies as st
from speed import SIZES

from harmonica import Router, macs
from harmonica.inference import timing as timing_module
from harmonica.inference.timing import measure
from harmonica.models import DITS, digits, load
from harmonica.models.dit import DiT, DiTDenoiser, sincos_positions
from harmonica.models.pipelines import from_pipeline
from harmonica.models.sites import sites
from harmonica.models.uvit import UViT
from harmonica.models.weights import dit_from_diffusers, dit_to_diffusers
from harmonica.samplers import DDIM, alphas_cumprod, make_sampler, spaced_timesteps


def test_positions_are_columns_first_and_alphas_those_of_diffusers():
    table = sincos_positions(8, 2)[0]  # tokens (0,0), (0,1), (1,0), (1,1)
    assert torch.equal(table[0, :4], table[2, :4])  # same column
    assert torch.equal(table[0, 4:], table[1, 4:])  # same row
    assert table[1, 0].item() == pytest.approx(torch.tensor(1.0).sin().item())
    from diffusers import DDIMScheduler

    theirs = DDIMScheduler(beta_schedule="linear", beta_start=1e-4, beta_end=0.02).alphas_cumprod
    torch.testing.assert_close(alphas_cumprod().float(), theirs, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", SIZES)
def test_every_original_size_has_its_original_number_of_parameters(name):
    millions = {"S": 33, "B": 131, "L": 458, "XL": 675}  # Peebles & Xie, table 4, patch size 2
    with torch.device("meta"):
        model = DiT(**SIZES[name])
    count = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
    assert count == pytest.approx(millions[name[4:].split("/")[0]], rel=0.02)


def test_guidance_mixes_the_channels_it_is_told_to_and_returns_both_halves():
    d, x, y = with_noise(make(guidance=3.0))
    out = d.predict(x, 1, y)
    assert out.shape == (4, 4, 4, 4)  # both halves, two noise and two variance channels
    plain = make(guidance=1.0)
    conditional, null = plain.predict(x, 1, y), plain.predict(x, 1, torch.full_like(y, 3))
    torch.testing.assert_close(out[:2, :1], null[:, :1] + 3.0 * (conditional - null)[:, :1])
    torch.testing.assert_close(out[:, 1:], torch.cat([conditional, null])[:, 1:])


@given(st.integers(1, 12))
def test_a_model_of_any_number_of_classes_has_its_own_null_class(classes):
    """The released code has 1000 written into it."""
    model, asked = DiT(**{**DITS["tiny"], "num_classes": classes}), []
    assert model.y_embedder.embedding_table.num_embeddings == classes + 1
    model.y_embedder.register_forward_hook(lambda _, inputs, __: asked.append(inputs[0].tolist()))
    d, x, y = with_noise(DiTDenoiser(model, DDIM(2), guidance=2.0), 3, 0)
    d.predict(x, 0, y)
    assert asked == [[*y.tolist(), *[classes] * 3]]
    assert max(y.tolist()) < classes


def test_a_denoiser_freezes_its_model_and_what_cannot_be_is_refused_by_name():
    model = DiT(**DITS["tiny"]).train()
    DiTDenoiser(model, DDIM(2))
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    for changes, message in [
        ({"name": "dalle"}, "model is 'dalle'; this version has tiny, garments, dit-xl"),
        ({"sampler": "euler"}, "sampler is 'euler'; this version has ddim"),
        ({"steps": 0}, "steps is 0"),
        *(({"steps": n}, "steps is ") for n in (True, 2.0, "20", None, math.nan, 1001)),
        *(({"guidance": g}, "guidance is ") for g in (0.5, "1.5", True, math.nan, math.inf)),
        *(({"device": where}, "device ") for where in ("gpu", "cuda:77", "", True)),
        ({"name": "pixart-alpha-256", "guidance": 0.5}, "guidance is 0.5; expected a number"),
        ({"name": "pixart-alpha-256", "weights": "random", "prompts": []}, "(has )?no prompts?"),
        ({"name": "pixart-alpha-256", "weights": "random", "prompts": [3]}, "prompts are"),
        ({"name": "uvit-h", "weights": "random", "prompts": ["a cat"]}, "it draws classes"),
    ]:
        with refused(message):
            load(**{"name": "tiny", **changes})
    wrong = {"patch_size 3": {"patch_size": 3}, "num_heads 3": {"num_heads": 3}}
    wrong |= {"num_heads 2, and by 4": {"hidden_size": 6}}
    for kind, (by, size) in product((DiT, UViT), wrong.items()):
        with refused(f"it must be divisible by {by}"):
            kind(**SMALL | size)
    with refused("depth is 3; it must be even"):
        UViT(**SMALL, depth=3)


@given(st.integers(2, 1000))
def test_timesteps_run_from_the_first_to_the_last_without_repeats(steps):
    timesteps = spaced_timesteps(steps)
    assert list(timesteps) == sorted(set(timesteps), reverse=True)
    assert (timesteps[0], timesteps[-1], len(timesteps)) == (999, 0, steps)
    # On a half, as the original's sum: 10 · 49.95 is 499.5, and its sum falls short of that.
    assert (spaced_timesteps(21)[10], spaced_timesteps(31)[15]) == (499, 500)
    assert spaced_timesteps(1) == (999,)  # pure noise
    for none in (0, -1, 1001):
        with refused(f"steps is {none}"):
            make_sampler("ddim", none)


@given(st.integers(2, 50), st.integers(0, 100))
def test_ddim_recovers_an_image_from_its_true_noise(steps, seed):
    """If the model's noise is the true one, every step lands on the true trajectory and the last one on the image."""
    generator = seeded(seed)
    image, noise = torch.randn(2, 1, 2, 2, 2, generator=generator, dtype=torch.float64)
    ddim, alphas = DDIM(steps), alphas_cumprod()
    at = lambda a: a**0.5 * image + (1 - a) ** 0.5 * noise  # noqa: E731
    x = at(alphas[ddim.timesteps[0]])
    for k in range(steps):
        x = ddim.step(x, noise, k, {})
        expected = image if k == steps - 1 else at(alphas[ddim.timesteps[k + 1]])
        torch.testing.assert_close(x, expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", ["dit-xl-256", "dit-xl-512"])
def test_macs_of_dit_xl_are_the_published_ones(name):
    published = {"dit-xl-256": (118.65e9, 0.356, 0.641), "dit-xl-512": (524.6e9, 0.419, 0.580)}
    total, attention, feed_forward = published[name]
    with torch.device("meta"):
        model = DiT(**DITS[name])
    count = macs(DiTDenoiser(model, DDIM(2), guidance=1.0))
    assert count.total == pytest.approx(total, rel=0.005)
    assert float(count.sites[0::2].sum()) / count.total == pytest.approx(attention, abs=0.001)
    assert float(count.sites[1::2].sum()) / count.total == pytest.approx(feed_forward, abs=0.001)


def test_macs_by_hand_and_counting_leaves_nothing():
    d = load("tiny", steps=2, guidance=1.0)
    before = attributes(d.model)
    count, tokens, width = macs(d), 16, 64
    assert attributes(d.model) == before
    assert count.sites[0].item() == tokens * 4 * width**2 + 2 * tokens**2 * width
    assert count.sites[1].item() == tokens * 8 * width**2
    patches, time = 2 * tokens * 4 * width, 256 * width + width**2
    assert count.rest == patches + time + 8 * 6 * width**2 + 2 * width**2
    assert 0.94 < count.covered < 1.0
    assert macs(load("tiny", steps=2, guidance=2.0)).total == 2 * count.total


def test_the_clock_warms_up_takes_turns_and_gives_medians(small, monkeypatch):
    walked, ticks, now = [], [], iter(range(0, 10_000, 10))
    durations = iter([99, 99, 5, 1, 50, 2, 6, 30])  # the first turn is thrown away
    walk = lambda *_, schedule=None: walked.append(schedule)  # noqa: E731
    monkeypatch.setattr(timing_module, "sample", walk)

    def clock():
        ticks.append(next(now) if len(ticks) % 2 == 0 else ticks[-1] + next(durations))
        return ticks[-1]

    monkeypatch.setattr(timing_module.time, "perf_counter", clock)
    schedule = Router(4, small.sites).schedule()
    timing = measure(small, schedule, *start(small), repeats=3)
    assert walked == [None, schedule] * 4
    assert (timing.plain, timing.cached, timing.speedup) == (6, 2, 3)


def test_renaming_to_diffusers_keeps_the_parameters_and_the_predictions():
    state = load("tiny").model.state_dict()
    back = dit_from_diffusers(dit_to_diffusers(state), state["pos_embed"])
    assert set(back) == set(state)
    assert all(torch.equal(back[name], state[name]) for name in state)
    ours = load("tiny", steps=5, sampler="dpm-solver++", guidance=1.5)
    theirs = from_pipeline(digits.pipeline(load("tiny")), steps=5, guidance=1.5)
    x, labels = start(ours, 4, 0)
    cond = torch.stack([labels, torch.arange(4)], 1)
    for k in range(5):
        found, expected = theirs.predict(x, k, cond), ours.predict(x, k, labels)[: len(x)]
        assert (found - expected).norm() < 1e-5 * expected.norm()


def test_all_classes_of_the_pipeline_are_digits():
    pipe = digits.pipeline(load("tiny"))
    options = {"num_inference_steps": 4, "output_type": "pt"}
    one, other = (pipe([label], generator=seeded(1), **options).images for label in (3, 993))
    assert torch.equal(torch.as_tensor(one), torch.as_tensor(other))
    assert len(sites(pipe.transformer)) == 16
