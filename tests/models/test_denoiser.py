"""A denoiser of any pipeline walks as the pipeline does, and keeps every law that the library relies on."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from harmonica import Schedule, blend, check_denoiser, image_error, macs, train_sdt
from harmonica.denoise import denoise, final_image, sample
from harmonica.models.pipelines import cached, from_pipeline
from harmonica.search.baselines import dynamic_programming
from tests.pipes import walked, walks

WALKS = walks()


def denoiser_of(name, steps=4, **more):
    make, arguments = WALKS[name]
    pipe = make()
    pipe.set_progress_bar_config(disable=True)
    return pipe, from_pipeline(pipe, steps=steps, **{**arguments, **more})


def cond_of(batch):
    return torch.tensor([[0, 7], [1, 8]])[:batch]


@pytest.mark.parametrize("name", WALKS)
def test_the_walk_is_the_pipelines_after_every_step(name):
    pipe, d = denoiser_of(name)
    for batch in (1, 2) if d.batched else (1,):
        cond = cond_of(batch)
        mine = list(denoise(d, d.noise(cond), cond))
        theirs = walked(pipe, d.inputs.of([tuple(c) for c in cond.tolist()]), seed=7)
        assert len(mine) == len(theirs) == d.steps
        assert all(torch.equal(a, b[: len(a)]) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("name", WALKS)
def test_it_keeps_the_laws_of_denoisers(name):
    check_denoiser(denoiser_of(name)[1])


# ------------------------------------------------------------------------------------------ what a table is made with


@pytest.mark.parametrize("name", WALKS)
def test_cached_runs_what_sample_runs(name):
    pipe, d = denoiser_of(name)
    generator, cond = torch.Generator().manual_seed(1), cond_of(1)
    x = d.noise(cond)
    for order in (0, 1):
        compute = torch.rand(d.steps, len(d.sites), generator=generator) < 0.5
        compute[0] = True
        schedule = Schedule(compute, sites=tuple(d.sites), order=order, **d.about)
        mine = sample(d, x, cond, schedule)
        with cached(pipe, schedule):
            theirs = walked(pipe, d.inputs.of([(0, 7)]), seed=7)[-1]
        assert torch.equal(mine, theirs[: len(mine)])


@pytest.mark.parametrize("name", WALKS)
def test_lambda_is_brute_force_and_costs_so_many_predictions(name):
    pipe, d = denoiser_of(name, steps=3)
    cond = cond_of(1)
    x = d.noise(cond)
    r = torch.rand(d.steps, len(d.sites), generator=torch.Generator().manual_seed(2))
    r[0] = 1.0
    calls = []
    hook = pipe.transformer.register_forward_hook(lambda *_: calls.append(1))
    lam = image_error(d, r, x, cond)
    hook.remove()
    assert len(calls) == d.calls * d.steps * (d.steps + 1) // 2
    for k in range(1, d.steps):
        without = r.clone()
        without[k] = 1.0
        ends = [final_image(denoise(d, x, cond, _blending(table))) for table in (r, without)]
        assert torch.equal(lam[k], F.mse_loss(*ends))


def _blending(table):
    cache = {}
    return lambda k: blend(table[k], cache, 0.1)


@pytest.mark.parametrize("name", ["pixart", "flux-two-calls", "sd3-controlnet"])
def test_it_trains_and_finds_whole_steps_and_refines(name):
    _, d = denoiser_of(name, steps=3)
    x, cond = d.draw(1, torch.Generator().manual_seed(0))
    assert dynamic_programming(d, x, cond, speedup=1.2).speedup(macs(d)) >= 1.2
    router = train_sdt(
        d, iterations=3, batch_size=1, target_speedup=1.2, refine=200, progress=False
    )
    assert router.schedule().speedup(macs(d)) >= 1.2
