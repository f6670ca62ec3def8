"""A denoiser of any pipeline walks as the pipeline does, keeps every law, and gives `tune` a table."""

import copy
import gc
import weakref
from contextlib import nullcontext
from functools import wraps
from importlib import import_module
from pipes import WALKS, dit_pipe, in_threads, pixart_pipe, randomised, run_embedded, walked

import diffusers
import pytest
import torch
import torch.nn.functional as F
from conftest import equal, raising, refused, seeded, start
from PIL import Image
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack as modes
from torch.utils._pytree import tree_map_only

import harmonica
from harmonica import Schedule, blend, check_denoiser, gated, image_error, macs, train_sdt
from harmonica.cost import Macs
from harmonica.denoise import denoise, final_image, sample
from harmonica.models.pipelines import cached, from_pipeline, tune
from harmonica.models.pipelines.pipeline_run import PipelineRun
from harmonica.models.sites import macs_per_token, sites
from harmonica.search.baselines import dynamic_programming
from harmonica.search.learn import weighted_walk
from harmonica.search.refine import Search


def denoiser_of(name, steps=4, **more):
    make, arguments = WALKS[name]
    return (pipe := make()), from_pipeline(pipe, steps=steps, **{**arguments, **more})


def cond_of(batch):
    return torch.tensor([[0, 7], [1, 8]])[:batch]


SCHEDULERS = [
    "DDPM",
    "EulerAncestralDiscrete",
    "SASolver",
    "HeunDiscrete",
    "PNDM",
    "KDPM2AncestralDiscrete",
]


@pytest.mark.parametrize("name", [*WALKS, *SCHEDULERS])
def test_the_walk_is_the_pipelines_after_every_step(name):
    if name in WALKS:
        pipe, d = denoiser_of(name)
    else:
        pipe = pixart_pipe(scheduler=getattr(diffusers, f"{name}Scheduler")())
        d = from_pipeline(pipe, steps=4, **WALKS["pixart"][1])
    for batch in (1, 2) if d.batched else (1,):
        cond = cond_of(batch)
        mine = list(denoise(d, d.noise(cond), cond))
        theirs = walked(pipe, d.inputs.of([tuple(c) for c in cond.tolist()]), seed=7)
        assert len(mine) == len(theirs) == d.steps
        assert all(torch.equal(a, b[: len(a)]) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("name", ["pixart", "dit"])
def test_an_image_is_let_go_with_the_last_name_for_it(name):
    _, d = denoiser_of(name)
    gc.collect()
    gc.disable()
    try:
        x = d.noise(cond_of(1))
        seen = [weakref.ref(x), *(weakref.ref(after) for after in denoise(d, x, cond_of(1)))]
        del x
        assert [ref() for ref in seen] == [None] * (d.steps + 1)
    finally:
        gc.enable()


@pytest.mark.parametrize("name", WALKS)
def test_it_keeps_the_laws_of_denoisers_and_cached_runs_what_sample_runs(name):
    pipe, d = denoiser_of(name)
    check_denoiser(d)
    generator, cond = seeded(1), cond_of(1)
    x = d.noise(cond)
    for order in (0, 1, 2):
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
    x, r = d.noise(cond), torch.rand(d.steps, len(d.sites), generator=seeded(2))
    r[0] = 1.0
    calls = []
    with pipe.transformer.register_forward_hook(lambda *_: calls.append(1)):
        lam = image_error(d, r, x, cond)
    assert len(calls) == len(d.facts.shapes) * d.steps * (d.steps + 1) // 2
    for k in range(1, d.steps):
        without = r.clone()
        without[k] = 1.0
        ends = []
        for table in (r, without):
            gate = lambda k, table=table, cache={}: blend(table[k], cache, 0.1)  # noqa: E731
            ends.append(final_image(denoise(d, x, cond, gate)))
        assert torch.equal(lam[k], F.mse_loss(*ends))


@pytest.mark.parametrize("name", WALKS)
def test_it_trains_and_finds_whole_steps_and_refines(name, monkeypatch):
    _, d = denoiser_of(name, steps=2)
    x, cond = start(d, 1, 0)
    price = Macs(torch.ones(len(d.sites)), 0.1)  # a true count takes as long as all the rest
    monkeypatch.setattr("harmonica.search.refine_router.NOISES", 2)
    monkeypatch.setattr("harmonica.search.baselines.macs", lambda _: price)
    assert dynamic_programming(d, x, cond, speedup=1.2).speedup(price) >= 1.2
    how = {"iterations": 2, "batch_size": 1, "budget": 40, "progress": False}
    assert train_sdt(d, target_speedup=1.2, cost=price, **how).schedule().speedup(price) >= 1.2


def double_denoiser(name, checkpointing):
    make, arguments = WALKS[name]
    pipe = make()
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.double()
    double = lambda leaf: leaf.double() if leaf.is_floating_point() else leaf  # noqa: E731
    d = from_pipeline(pipe, steps=3, **tree_map_only(torch.Tensor, double, arguments))
    if checkpointing:
        pipe.transformer.enable_gradient_checkpointing()
    return d


def assert_slope(value, at, seed=0):
    """Hold the gradient of value(at) against a difference along a random direction.

    Schedulers step in float32, whatever they are given, so a smaller difference drowns in rounding.
    """
    along = torch.randn(at.shape, dtype=at.dtype, generator=seeded(seed))
    slope = (value(at.requires_grad_())[1] * along).sum()
    ahead, behind = (value(at.detach() + step * along)[0] for step in (1e-3, -1e-3))
    assert float(slope) == pytest.approx(float(ahead - behind) / 2e-3, rel=1e-3)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", WALKS)
def test_the_gradient_through_a_whole_walk_is_finite_differences(name, checkpointing):
    d, generator, cond = double_denoiser(name, checkpointing), seeded(0), cond_of(1)
    x = d.noise(cond)
    table = torch.rand(d.steps, len(d.sites), generator=generator) < 0.6
    table[0] = True
    towards = torch.randn(x.shape, dtype=torch.float64, generator=generator)
    weights = Schedule(table, sites=tuple(d.sites), order=1).gate_weights.double()

    def value(weights):
        image = (weighted_walk(d, table.tolist(), weights, x, cond) * towards).sum()
        return image, torch.autograd.grad(image, weights)[0] if weights.requires_grad else None

    assert_slope(value, weights + 0.1)


def test_a_block_that_backward_runs_again_knows_the_call_that_it_belongs_to():
    d, cond, cache, memory = double_denoiser("flux-two-calls", True), cond_of(1), {}, {}
    r, x = torch.rand(len(d.sites), dtype=torch.float64, generator=seeded(0)), d.noise(cond)
    with torch.no_grad(), gated(d.sites, blend(torch.ones_like(r), cache, 0.1)):
        x = d.step(x, d.predict(x, 0, cond), 0, memory)

    def value(r):
        with gated(d.sites, blend(r, cache.copy(), 0.1)):
            out = (d.predict(x, 1, cond) * x.cos()).sum()
            return out, torch.autograd.grad(out, r)[0] if r.requires_grad else None

    assert_slope(value, r)


@pytest.mark.parametrize("name", ["wan", "sd3-controlnet"])
def test_an_exception_at_a_site_leaves_everything_as_it_was(name):
    (pipe, d), cond = denoiser_of(name), cond_of(1)
    x = d.noise(cond)
    plain = d.predict(x, 2, cond)

    def shown():
        parts = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
        modules = [set(vars(module)) for part in parts for module in part.modules()]
        return str([vars(pipe), vars(pipe.scheduler), modules])

    last, broken = len(d.sites) - 1, raising(KeyboardInterrupt)
    fail = lambda site, compute: broken() if site == last else compute()  # noqa: E731
    before, random = shown(), torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt), gated(d.sites, fail):
        d.predict(x, 2, cond)
    assert shown() == before
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.is_grad_enabled()
    assert torch.equal(d.predict(x, 2, cond), plain)


def test_the_pipeline_and_another_denoiser_of_it_may_run_in_between():
    make, arguments = WALKS["flux"]
    pipe, calls = make(), []
    with pipe.transformer.register_forward_hook(lambda *_: calls.append(1)):
        d, other = (from_pipeline(pipe, steps=4, **arguments) for _ in range(2))
    assert len(calls) == 2, "making one runs the transformer once"
    cond = cond_of(2)
    x = d.noise(cond)
    plain, between = [y.clone() for y in denoise(d, x, cond)], []
    for y, _ in zip(denoise(d, x, cond), denoise(other, x, cond), strict=True):
        walked(pipe, d.inputs.of([(1, 3)]))
        between.append(y.clone())
    assert equal(plain, between)


@pytest.mark.parametrize("part", ["transformer", "scheduler"])
def test_a_part_that_was_replaced_later_is_refused(part):
    (pipe, d), cond = denoiser_of("flux"), cond_of(1)
    x = d.noise(cond)
    setattr(pipe, part, copy.deepcopy(getattr(pipe, part)))
    with refused("another transformer or scheduler; call from_pipeline again"):
        d.predict(x, 1, cond)


def test_a_batch_may_be_met_first_at_a_later_step_and_open_gates_are_asked_once():
    (_, d), (_, other) = denoiser_of("flux"), denoiser_of("flux")
    cond, asked = torch.tensor([[0, 7], [1, 8], [0, 9]]), []
    x = d.noise(cond)
    with gated(d.sites, lambda site, compute: (asked.append(site), compute())[1]):
        out = d.predict(x, 2, cond)
    assert sorted(asked) == list(range(len(d.sites)))
    other.predict(x, 0, cond)
    assert torch.equal(out, other.predict(x, 2, cond))


def tuned(name, pipe=None, **more):
    make, arguments = WALKS[name]
    arguments = {**arguments, "steps": 4, "progress": False, "speedup": 1.3, **more}
    return (pipe := pipe or make()), tune(pipe, **arguments)


@pytest.mark.parametrize("name", ["flux", "wan"])
def test_a_tuned_schedule_is_on_target_and_runs_and_tells_the_predictions_that_it_took(name):
    pipe, rows, one = WALKS[name][0](), [], {"flux": 1, "wan": 0.5}[name]

    def count(module, args, options):
        rows.append(0 if modes() else len(options["hidden_states"]) * one)  # a count of MACs

    with pipe.transformer.register_forward_pre_hook(count, with_kwargs=True):
        pipe, schedule = tuned(name, pipe, budget=1400)
    assert schedule.provenance["predictions"] == sum(rows) <= 1400
    d = from_pipeline(pipe, steps=4, **WALKS[name][1])
    assert schedule.speedup(macs(d)) >= 1.3
    assert (schedule.model, schedule.timesteps) == (d.about["model"], d.about["timesteps"])
    with cached(pipe, schedule) as session:
        walked(pipe, d.inputs.of([(0, 7)]))
        assert session.skipped > 0


@pytest.mark.parametrize("order", [0, 1, None])
def test_a_table_for_runs_that_begin_from_an_image_runs_as_it_was_searched(order):
    pipe, how = WALKS["flux-img2img"][0](), {"strength": 0.5, "steps": 6, "budget": 100}
    if order is None:
        pipe, schedule = tuned_unfollowed("flux-img2img", pipe, **how)
    else:
        pipe, schedule = tuned("flux-img2img", pipe, order=order, **how)
    d = from_pipeline(pipe, **{**WALKS["flux-img2img"][1], "steps": 6, "strength": 0.5})
    assert (schedule.timesteps, schedule.steps) == (d.about["timesteps"], 3)
    with cached(pipe, schedule) as session:
        theirs = walked(pipe, d.inputs.of([(0, 7)]), seed=7)[-1]
    assert session.skipped == int((~schedule.compute).sum()) > 0
    assert torch.equal(sample(d, d.noise(cond_of(1)), cond_of(1), schedule), theirs)


def tuned_unfollowed(name, pipe=None, **more):
    """Tune a pipeline whose scheduler somebody has wrapped."""
    pipe = pipe or WALKS[name][0]()
    step = pipe.scheduler.step
    pipe.scheduler.step = wraps(step)(lambda *args, **kwargs: step(*args, **kwargs))
    try:
        with pytest.warns(UserWarning, match="wrapped.*Whole steps are chosen from runs") as told:
            pipe, schedule = tuned(name, pipe, **more)
    finally:
        del pipe.scheduler.step
    [message] = [str(each.message) for each in told if "Whole steps" in str(each.message)]
    ignored = [word for word in ("method", "budget", "cost", "order") if more.get(word)]
    assert f"Ignored: {', '.join(ignored)}" in message or not ignored
    return pipe, schedule


def test_a_pipeline_that_cannot_be_followed_gets_whole_steps_and_is_told_what_was_ignored():
    how = {"method": "sdt", "budget": 9, "cost": "milliseconds", "order": 1, "guidance": 2.0}
    pipe, schedule = tuned_unfollowed("flux", **how)
    assert schedule.speedup(macs_per_token(pipe.transformer, sites(pipe.transformer))) >= 1.3
    assert {tuple(row) for row in schedule.compute.tolist()} <= {(True,) * 9, (False,) * 9}
    with refused("the 5 steps"), cached(pipe, schedule):
        run_embedded(pipe, 5)


def test_a_walk_of_two_transformers_gets_whole_steps_of_both():
    make, arguments = WALKS["wan"]
    pipe = make()
    pipe.register_modules(transformer_2=randomised(copy.deepcopy(pipe.transformer), 3))
    pipe.register_to_config(boundary_ratio=0.5)
    with refused("cannot be followed step by step: it runs two transformers in one walk"):
        from_pipeline(pipe, steps=4, **arguments)
    with pytest.warns(UserWarning, match="two transformers.*Whole steps are chosen from runs"):
        schedule = tuned("wan", pipe)[1]
    with cached(pipe, schedule) as session:
        run_embedded(pipe)
        assert (len(session.sites), session.skipped > 0) == (2 * len(sites(pipe.transformer)), True)


@pytest.mark.parametrize("stage", ["learn_weights", "flips"])
@pytest.mark.parametrize("error", [FloatingPointError("NaN"), torch.OutOfMemoryError("full"), None])
def test_an_error_or_ctrl_c_after_the_first_stage_returns_the_best_schedule_so_far(
    stage, error, monkeypatch
):
    module, tried = import_module("harmonica.models.pipelines.tune"), []

    def fails(*args, **options):
        tried.append(1)
        raise KeyboardInterrupt if error is None else error

    where = (module, "learn_weights") if stage == "learn_weights" else (Search, "improve")
    monkeypatch.setattr(*where, fails)
    told = pytest.warns(UserWarning, match=f"best schedule so far: .*{error}")
    with nullcontext() if error is None else told:
        schedule = tuned("flux", budget=1400)[1]
    assert tried
    assert schedule.timesteps
    assert schedule.provenance["predictions"] > 100


def test_what_tune_cannot_use_is_refused_by_name_before_anything_runs():
    make, arguments = WALKS["flux"]
    message = "FluxPipeline does not take guidence_scale; did you mean guidance_scale"
    with pytest.raises(TypeError, match=message):
        tune(make(), speedup=1.3, guidence_scale=2.0, **arguments)
    for message, how in {
        "maximum here": {"speedup": 50.0},
        "cost is 'ms'; expected 'milliseconds'": {"cost": "ms"},
        "method is 'auto '; expected 'auto'": {"method": "auto "},
        "budget is 37; with 4 steps it takes 38 predictions at least": {"budget": 37},
        "budget is 2; with 4 steps it takes 12": {"budget": 2, "method": "sdt"},
        "budget is '100'; expected a whole number": {"budget": "100"},
        "budget is inf; expected a whole number": {"budget": float("inf")},
        "target speedup is None; expected a number, 1 or more": {"speedup": None},
        "order is 1.5; expected a whole number": {"order": 1.5},
        "steps is True; expected a whole number": {"steps": True},
        "steps is 4 and num_inference_steps 5; they are one argument": {"num_inference_steps": 5},
        "guidance is 1.0 and guidance_scale 2.0": {"guidance": 1.0, "guidance_scale": 2.0},
    }.items():
        with refused(message):
            tuned("flux", **how)
    text, pooled = torch.zeros(2, 5, 12), torch.zeros(3, 8)
    for message, how in {
        "lengths of prompts and each differ": {"pooled_prompt_embeds": pooled},
        "pooled_prompt_embeds is 'ab'; expected a list": {"pooled_prompt_embeds": "ab"},
        "num_images_per_prompt is .2, 2.; a sample is one": {"num_images_per_prompt": [2, 2]},
        "height is given in two ways; give it once": {"height": [64, 64]},
    }.items():
        with pytest.raises((ValueError, TypeError), match=message):
            from_pipeline(make(), steps=2, height=64, each={"prompt_embeds": text, **how})
    how = {"use_resolution_binning": False, "clean_caption": False, "prompt": "the cat"}
    with refused("prompt is given in two ways; give it once"):
        from_pipeline(pixart_pipe(), prompts=["a boat"], **how)


def test_values_of_each_may_be_lists_and_the_number_of_steps_goes_by_two_names():
    pipe, d = denoiser_of("flux")
    each = {name: list(values) for name, values in WALKS["flux"][1]["each"].items()}
    listed = from_pipeline(pipe, num_inference_steps=4, **{**WALKS["flux"][1], "each": each})
    x, cond = d.noise(cond_of(2)), cond_of(2)
    assert listed.steps == d.steps
    assert torch.equal(listed.predict(x, 1, cond), d.predict(x, 1, cond))
    with refused("cond names rows .5.; there are 2 prompts"):
        d.noise(torch.tensor([[5, 0]]))


def test_encoders_may_be_let_go_once_the_denoiser_is_made():
    (pipe, d), (_, other) = denoiser_of("pixart"), denoiser_of("pixart")
    pipe.text_encoder = pipe.tokenizer = None
    x = d.noise(cond_of(2))
    alone = [other.predict(x[i : i + 1], 1, cond_of(2)[i : i + 1]) for i in range(2)]
    assert torch.equal(d.predict(x, 1, cond_of(2)), torch.cat(alone))


@pytest.mark.parametrize("most", [2**30, 0])
def test_encodings_are_remembered_up_to_so_many_bytes(most, monkeypatch):
    monkeypatch.setattr(f"{PipelineRun.__module__}.MOST_BYTES", most)
    (pipe, d), ran = denoiser_of("pixart"), []
    pipe.text_encoder.register_forward_hook(lambda *_: ran.append(1))
    for row in (0, 1, 0):
        d.noise(torch.tensor([[row, 7]]))
    assert bool(ran) is (most == 0)


def test_noise_of_torchs_own_generator_is_the_same_whatever_other_threads_draw():
    d = from_pipeline(dit_pipe(scheduler=diffusers.DDPMScheduler()), steps=3, **WALKS["dit"][1])
    conds = [torch.tensor([[0, seed]]) for seed in range(4)]
    jobs = [lambda cond=cond: sample(d, d.noise(cond), cond) for cond in conds]
    assert equal(in_threads(jobs), [job() for job in jobs])


def test_a_walk_whose_sigmas_are_given_is_tuned_without_a_finer_one():
    sigmas = [1.0, 0.7, 0.4, 0.2]
    schedule = tuned("flux", steps=None, sigmas=sigmas, budget=400)[1]
    d = from_pipeline(WALKS["flux"][0](), sigmas=sigmas, **WALKS["flux"][1])
    assert schedule.timesteps == d.about["timesteps"]
    with refused("runs 4 steps; are its timesteps or sigmas given"):
        d.with_steps(40)


@pytest.mark.parametrize(
    ("method", "budget"), [("sdt", 600), ("auto", 38), ("auto", 100), ("auto", 142)]
)
def test_tuning_keeps_within_the_budget(method, budget):
    schedule = tuned("flux", method=method, budget=budget)[1]
    assert budget // 3 < schedule.provenance["predictions"] <= budget


def test_the_command_tunes_a_saved_pipeline_and_shows_an_image(tmp_path, capsys):
    main = import_module("harmonica.tune").main
    pixart_pipe().save_pretrained(folder := tmp_path / "pipe")
    out = tmp_path / "out"
    command = ["--pipeline", str(folder), "--out", str(out), "--speedup", "1.4", "--steps", "3"]
    call = "use_resolution_binning=false clean_caption=false height=64 negative_prompt=red"
    assert main([*command, "--budget", "80", "--guidance", "2", "--call", *call.split()]) == 0
    schedule = Schedule.load(out / "schedule.json")
    assert (schedule.steps, schedule.guidance) == (3, 2)
    with Image.open(out / "comparison.png") as picture:
        assert picture.size == (3 * 64, 64)
        pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).float()
    without, _, difference = pixels.view(64, 3, 64, 3).unbind(1)
    assert min(without.std(), difference.std()) > 1
    printed = capsys.readouterr().out
    assert "theoretical speedup" in printed
    assert "comparison.png" in printed
    assert main([*command, "--call", "guidence=2"]) == 2
    assert "PixArtAlphaPipeline does not take guidence" in capsys.readouterr().err
    # Importing the command has left the function of its name callable.
    with pytest.raises((TypeError, ValueError), match="NoneType"):
        harmonica.tune(None, speedup=1.5)


class WithoutGenerator(diffusers.DiTPipeline):
    def __call__(self, class_labels, num_inference_steps=2, output_type="pil"):
        how = {"num_inference_steps": num_inference_steps, "output_type": output_type}
        return super().__call__(class_labels, **how)


def test_the_command_shows_one_seed_of_a_pipeline_that_takes_no_generator(tmp_path, monkeypatch):
    command, pipe = import_module("harmonica.tune"), WithoutGenerator(**dit_pipe().components)
    monkeypatch.setattr(command, "_load", lambda *_: pipe)
    random = torch.get_rng_state()
    options = ["--out", str(tmp_path), "--speedup", "1", "--budget", "50"]
    assert command.main(["--pipeline", "x", *options]) == 0
    assert torch.equal(torch.get_rng_state(), random)
    with Image.open(tmp_path / "comparison.png") as picture:
        shown = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).float()
    without, under, _ = shown.view(64, 3, 64, 3).unbind(1)
    assert torch.equal(without, under)  # as the table computes everything
    assert without.std() > 1
