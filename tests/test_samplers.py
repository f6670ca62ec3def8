"""Samplers: diffusers' schedulers under another owner of their state; forks; noise that can be drawn again."""

import pytest
import torch
from conftest import SMALL, redrawn, seeded, with_noise
from diffusers import DPMSolverMultistepScheduler, SASolverScheduler
from hypothesis import given
from hypothesis import strategies as st

from harmonica import Schedule, check_denoiser, denoise, train_sdt
from harmonica.denoise import final_image
from harmonica.models.dit import DiT, DiTDenoiser
from harmonica.samplers import SAMPLERS, alphas_cumprod, make_sampler, spaced_timesteps
from harmonica.samplers import noise_generator as noise_of

BETAS = ("linear", "scaled-linear")
names = st.sampled_from(sorted(SAMPLERS))


def image(d, x, y, **more):
    """Return the image of a plain walk."""
    return final_image(denoise(d, x, y, **more))


def under(name: str, steps: int, *, learn_sigma: bool = True, betas: str = "linear") -> DiTDenoiser:
    """Return the small denoiser of the laws under another sampler."""
    model = redrawn(DiT(**SMALL, depth=2, learn_sigma=learn_sigma).double(), 0)
    return DiTDenoiser(model, make_sampler(name, steps, betas), guidance=1.5, guided_channels=1)


@pytest.mark.parametrize("name", ["iddpm", "sa-solver"])
def test_noise_differs_between_samples_steps_and_walks_but_not_between_runs(name):
    d, x, y = with_noise(under(name, 6), batch=3)
    before = torch.get_rng_state()
    one, again = image(d, x, y), image(d, x, y)
    assert torch.equal(one, again)
    assert torch.equal(before, torch.get_rng_state())
    drawn, other = (image(d, x, y, memory={"seeds": seeds}) for seeds in ((1, 2, 3), (1, 2, 4)))
    assert torch.equal(drawn[:2], other[:2])  # a sample's seed is its own
    assert not torch.equal(drawn[2], other[2])
    assert not torch.equal(drawn[0], one[0])
    twice = x[:1].expand(2, -1, -1, -1), y[:1].expand(2)
    same = image(d, *twice, memory={"seeds": (5, 6)})
    assert not torch.equal(same[0], same[1])  # the noise, not only x_T, makes the image


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_every_sampler_needs_no_variance_channels_and_keeps_the_laws_without(name):
    """Walks, forks and λ with variance channels: test_every_model.py."""
    check_denoiser(under(name, 4, learn_sigma=False, betas="scaled-linear"))


@pytest.mark.parametrize("betas", BETAS)
@pytest.mark.parametrize("name", ["dpm-solver++", "sa-solver"])
def test_a_multistep_walk_is_the_one_diffusers_takes(name, betas):
    low, high = (1e-4, 0.02) if betas == "linear" else (0.00085, 0.012)
    facts = {"beta_start": low, "beta_end": high, "beta_schedule": betas.replace("-", "_")}
    kind = {"dpm-solver++": DPMSolverMultistepScheduler, "sa-solver": SASolverScheduler}[name]
    scheduler = kind(**facts)
    scheduler.set_timesteps(8)
    sampler = make_sampler(name, 8, betas)
    assert sampler.timesteps == tuple(scheduler.timesteps.tolist())
    x = ours = torch.randn(1, 2, 4, 4, generator=seeded(3))
    memory = {"seeds": (11,)}
    for k, t in enumerate(scheduler.timesteps):
        noise = {"generator": noise_of(11, k)}
        x = scheduler.step(torch.tanh(x) + t / 1000, t, x, return_dict=False, **noise)[0]
        ours = sampler.step(ours, torch.cat([torch.tanh(ours) + t / 1000, ours], 1), k, memory)
        assert torch.equal(x, ours), k


@pytest.mark.parametrize("learned", [True, False])
def test_iddpm_is_its_definition(learned):
    """Nichol & Dhariwal 2021: mean of the posterior, log-variance between its own and β by the model's v in [−1, 1]."""
    steps, times, a, generator = 7, spaced_timesteps(7), alphas_cumprod(), seeded(0)
    sampler = make_sampler("iddpm", steps)
    assert sampler.timesteps == times
    x = torch.randn(2, 2, 4, 4, generator=generator, dtype=torch.float64)
    for k in range(steps):
        out = torch.randn(2, 4, 4, 4, generator=generator, dtype=torch.float64)
        eps, v = out.chunk(2, 1)
        now, after = a[times[k]], a[times[k + 1]] if k < steps - 1 else torch.tensor(1.0)
        beta = 1 - now / after
        x0 = (x - (1 - now).sqrt() * eps) / now.sqrt()
        mean = after.sqrt() * beta / (1 - now) * x0
        mean = mean + (now / after).sqrt() * (1 - after) / (1 - now) * x
        small = ((1 - after) / (1 - now) * beta).clamp(min=1e-20)
        v = v if learned else -torch.ones_like(v)
        log = (v + 1) / 2 * beta.log() + (1 - v) / 2 * small.log()
        noises = [noise_of(seed, k) for seed in (5, 6)]
        z = torch.cat([torch.randn(1, 2, 4, 4, generator=g, dtype=torch.float64) for g in noises])
        expected = mean + (log / 2).exp() * z * (k < steps - 1)
        memory = {"seeds": (5, 6), **({"scheduler": {}} if k else {})}
        got = sampler.step(x, out if learned else eps, k, memory)
        torch.testing.assert_close(got, expected, rtol=2e-4, atol=2e-4)
        x = expected


def test_no_sampler_clips_latents():
    """Diffusers' DDIM and DDPM clip x₀ to [−1, 1] unless told not to."""
    for name in SAMPLERS:
        sampler, x = make_sampler(name, 4), torch.full((1, 1, 2, 2), 30.0)
        moved = sampler.step(x, torch.zeros_like(x), 0, {"seeds": (0,)})
        assert float(moved.abs().max()) > 5.0, name


def test_a_multistep_walk_cannot_start_in_the_middle():
    message = r"step 2 of dpm-solver\+\+ needs what the steps before it left"
    with pytest.raises(RuntimeError, match=message):
        image(*with_noise(under("dpm-solver++", 5)), start=2)


@given(names, st.sampled_from(BETAS), st.integers(1, 200))
def test_every_sampler_has_one_timestep_for_each_prediction(name, betas, steps):
    sampler = make_sampler(name, steps, betas)
    assert len(sampler.timesteps) == steps
    assert list(sampler.timesteps) == sorted(sampler.timesteps, reverse=True)
    assert sampler.timesteps[0] == 999


def test_a_schedule_trained_under_sa_solver_is_saved(tmp_path):
    """Its scheduler holds a function, which no configuration file can say; a schedule holds names and numbers."""
    d = under("sa-solver", 3)
    schedule = train_sdt(d, iterations=2, batch_size=1, progress=False).schedule()
    schedule.save(tmp_path / "s.json")
    assert (Schedule.load(tmp_path / "s.json"), schedule.sampler) == (schedule, "sa-solver")


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.integers(0, 999))
def test_seeds_that_differ_anywhere_draw_different_noise(seed, other, k):
    """Torch's own generator takes 5 and 5 + 2³² for one."""
    noise = lambda *place: torch.randn(4, generator=noise_of(*place))  # noqa: E731
    assert torch.equal(noise(seed, k), noise(seed, k))
    assert not torch.equal(noise(seed, k), noise(seed, k + 1))
    assert seed == other or not torch.equal(noise(seed, k), noise(other, k))
