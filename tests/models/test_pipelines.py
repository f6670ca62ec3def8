"""Stock diffusers pipelines under a schedule: exact when nothing is reused, loud when something is wrong."""

import copy
from dataclasses import replace
from pipes import (
    count_calls,
    dit_pipe,
    dit_transformer,
    flux_pipe,
    pixart_pipe,
    randomised,
    run,
    run_embedded,
    wan_pipe,
)

import pytest
import torch
from conftest import refused, seeded
from hypothesis import given
from hypothesis import strategies as st

from harmonica import Schedule, train_sdt
from harmonica.columns import fit
from harmonica.models.pipelines import from_pipeline
from harmonica.models.pipelines.caching import cached, disable_cache, enable_cache, summary
from harmonica.models.sites import sites

PIPES = {
    "dit": dit_pipe,
    "pixart-alpha": pixart_pipe,
    "pixart-alpha with micro-conditions": lambda: pixart_pipe(micro=True),
    "pixart-sigma": lambda: pixart_pipe("sigma"),
}


@pytest.fixture(params=PIPES)
def pipe(request):
    return PIPES[request.param]()


def table(pipe, steps: int = 4, every: int = 2) -> Schedule:
    """Compute everything at every other step."""
    rows = [[k % every == 0] * len(sites(pipe.transformer)) for k in range(steps)]
    return Schedule(rows, sites=tuple(sites(pipe.transformer)))


def decoded(pipe, latents: torch.Tensor) -> torch.Tensor:
    """Decode as DiTPipeline does, to the bit."""
    return (pipe.vae.decode(1 / pipe.vae.config.scaling_factor * latents).sample / 2 + 0.5).clamp(
        0, 1
    )


def snapshot(pipe) -> dict:
    """Everything that anybody has put on the instances."""
    modules = {name: dict(vars(m)) for name, m in pipe.transformer.named_modules()}
    for attributes in modules.values():
        attributes["_forward_pre_hooks"] = dict(attributes["_forward_pre_hooks"])
    scheduler = {k: v for k, v in vars(pipe.scheduler).items() if callable(v)}
    return {"modules": modules, "scheduler": scheduler, "pipe": set(vars(pipe))}


def test_computing_everything_is_the_stock_pipeline_bit_for_bit(pipe):
    plain = run(pipe, batch=2)
    with cached(pipe, Schedule(torch.ones(4, len(sites(pipe.transformer))))):
        assert torch.equal(run(pipe, batch=2), plain)
        assert torch.equal(run(pipe, batch=2), plain)  # the second image too
    assert torch.equal(run(pipe, batch=2), plain)


@pytest.mark.parametrize("scheduler", ["DDIM", "DPMSolverMultistep", "DDPM", "SASolver"])
@pytest.mark.parametrize("name", PIPES)
def test_under_each_of_the_four_samplers_computing_everything_is_the_stock_pipeline(
    name, scheduler
):
    import diffusers

    pipe = PIPES[name]()
    made = getattr(diffusers, f"{scheduler}Scheduler")
    pipe.scheduler = (
        made() if scheduler in ("DPMSolverMultistep", "SASolver") else made(clip_sample=False)
    )
    torch.manual_seed(0)  # DiTPipeline hands no generator to a stochastic scheduler
    plain = run(pipe, batch=2)
    with cached(pipe, Schedule(torch.ones(4, len(sites(pipe.transformer))))):
        torch.manual_seed(0)
        assert torch.equal(run(pipe, batch=2), plain)
    with cached(pipe, table(pipe)) as session:
        assert run(pipe, batch=2).isfinite().all()
        assert session.skipped == 2 * len(session.sites)


def test_every_image_inside_the_with_is_the_same_and_skips_the_same(pipe):
    """SmoothCache's second image silently has no speedup; others leak state from one call into the next."""
    with cached(pipe, table(pipe)) as session:
        images = [run(pipe) for _ in range(3)]
        assert session.skipped == 3 * 2 * len(session.sites)
    assert torch.equal(images[0], images[1])
    assert torch.equal(images[0], images[2])
    assert not torch.equal(images[0], run(pipe))


def test_exactly_the_scheduled_sites_run(pipe):
    modules = sites(pipe.transformer)
    rows = [[True] * len(modules)] + [
        [(k + i) % 3 == 0 for i in range(len(modules))] for k in range(3)
    ]
    originals = {name: m.forward for name, m in modules.items()}
    computed = []
    for name, module in modules.items():
        module.forward = lambda *a, name=name, **kw: (
            computed.append(name),
            originals[name](*a, **kw),
        )[1]
    with cached(pipe, Schedule(rows, sites=tuple(modules))):
        run(pipe)
    assert computed == [
        name for row in rows for name, entry in zip(modules, row, strict=True) if entry
    ]


def test_heun_calls_the_model_seven_times_in_four_steps_and_each_call_is_a_step():
    from diffusers import HeunDiscreteScheduler

    pipe = dit_pipe(scheduler=HeunDiscreteScheduler())
    plain = run(pipe, 4)
    assert len(pipe.scheduler.timesteps) == 7
    with cached(pipe, Schedule(torch.ones(7, 4))):
        assert torch.equal(run(pipe, 4), plain)
    with cached(pipe, table(pipe, 7)) as session:
        run(pipe, 4)
        assert session.skipped == 3 * 4


@pytest.mark.parametrize("make", [flux_pipe, wan_pipe])
def test_pipelines_that_nobody_here_wrote_an_adapter_for_are_exact_too(make):
    """Flux and Wan: features that are tuples, two calls in a step, timesteps that are not integers."""
    pipe = make()
    plain, before = run_embedded(pipe), snapshot(pipe)
    with cached(pipe, Schedule(torch.ones(4, len(sites(pipe.transformer))))):
        assert torch.equal(run_embedded(pipe), plain)
    with cached(pipe, table(pipe)) as session:
        image = run_embedded(pipe)
        assert torch.equal(run_embedded(pipe), image)
        assert session.skipped == 2 * 2 * 2 * len(
            session.sites
        )  # walks, calls in a step, steps that reuse
        assert "theoretical speedup" in str(session)
    assert not torch.equal(image, plain)
    assert snapshot(pipe) == before


def test_guidance_as_two_calls_has_one_cache_for_each():
    """Some pipelines call the transformer once for each half: the halves must not meet."""
    pipe = dit_pipe()
    x = torch.randn(1, 4, 8, 8, generator=seeded(0))

    def walk():
        latent = x
        pipe.scheduler.set_timesteps(4)
        for t in pipe.scheduler.timesteps:
            halves = [
                pipe.transformer(latent, timestep=t[None], class_labels=torch.tensor([y])).sample
                for y in (1, 1000)
            ]
            eps = halves[1][:, :4] + 3 * (halves[0][:, :4] - halves[1][:, :4])
            latent = pipe.scheduler.step(eps, t, latent).prev_sample
        return latent

    with cached(pipe, Schedule(torch.ones(4, 4))) as session, session.walk():
        everything = walk()
    assert torch.equal(everything, walk())
    with cached(pipe, table(pipe)) as session, session.walk():
        separate = walk()
        assert session.skipped == 2 * 2 * 4
    batched = dit_pipe()
    latent = x
    batched.scheduler.set_timesteps(4)
    with cached(batched, table(batched)) as session, session.walk():
        batched.scheduler.set_timesteps(4)
        for t in batched.scheduler.timesteps:
            labels = torch.tensor([1, 1000])
            out = batched.transformer(
                torch.cat([latent, latent]), timestep=t.expand(2), class_labels=labels
            ).sample
            eps = out[1:, :4] + 3 * (out[:1, :4] - out[1:, :4])
            latent = batched.scheduler.step(eps, t, latent).prev_sample
    torch.testing.assert_close(separate, latent, rtol=1e-3, atol=1e-3)


def test_nothing_outlives_the_with_exception_or_not(pipe):
    before = snapshot(pipe)
    with cached(pipe, table(pipe)):
        run(pipe)
    assert snapshot(pipe) == before
    with pytest.raises(ZeroDivisionError), cached(pipe, table(pipe)):
        run(pipe, callback=lambda *_: 1 / 0, callback_steps=1) if "PixArt" in type(
            pipe
        ).__name__ else 1 / 0
    assert snapshot(pipe) == before


@given(st.lists(st.sampled_from(["enable", "disable"]), max_size=6))
def test_enabling_any_number_of_times_is_undone_by_disabling_once(actions):
    """DeepCache cannot be undone after enabling twice."""
    pipe = STOCK
    before = snapshot(pipe)
    for action in actions:
        enable_cache(pipe, table(pipe)) if action == "enable" else disable_cache(pipe)
    with (
        pytest.warns(UserWarning, match="no site was skipped")
        if actions[-1:] == ["enable"]
        else _nothing()
    ):
        disable_cache(pipe)
    assert snapshot(pipe) == before


def _nothing():
    import contextlib

    return contextlib.nullcontext()


STOCK = dit_pipe()


def test_enable_summary_disable_have_the_shape_that_people_know():
    pipe = dit_pipe()
    plain = run(pipe)
    assert summary(pipe).startswith("no cache is enabled")
    enable_cache(pipe, table(pipe))
    run(pipe)
    text = summary(pipe)
    assert "4 steps × 4 sites, CUR 50.0%" in text
    assert "50.0% of the sites reused so far, walks: 1" in text
    assert "theoretical speedup" in text
    disable_cache(pipe)
    assert torch.equal(run(pipe), plain)


def test_nested_and_repeated_use_restores_exactly_what_was_there():
    pipe = dit_pipe()
    plain, before = run(pipe), snapshot(pipe)
    for _ in range(2):
        with cached(pipe, table(pipe)):
            outer = run(pipe)
            with cached(pipe, Schedule(torch.ones(4, 4))):  # the innermost is in force
                assert torch.equal(run(pipe), plain)
            assert torch.equal(run(pipe), outer)
    assert snapshot(pipe) == before


def test_two_pipelines_at_once_share_nothing():
    """TeaCache and others keep state on the class, shared between instances."""
    one, other = dit_pipe(0), dit_pipe(1)
    with cached(one, table(one)):
        alone = [run(one), None]
    with cached(other, table(other, 4, 4)):
        alone[1] = run(other)
    with cached(one, table(one)), cached(other, table(other, 4, 4)):
        assert torch.equal(run(one), alone[0])
        assert torch.equal(run(other), alone[1])
        assert torch.equal(run(one), alone[0])


def test_a_copy_made_under_a_cache_runs_its_own_weights():
    """A overridden forward that still belonged to the original would run the original's weights."""
    pipe = dit_pipe()
    x, t, y = torch.randn(1, 4, 8, 8), torch.tensor([500]), torch.tensor([1])
    with (
        torch.no_grad(),
        pytest.warns(UserWarning, match="no site was skipped"),
        cached(pipe, table(pipe)),
    ):
        twin = copy.deepcopy(pipe.transformer)
        randomised(twin, seed=9)
        mine = twin(x, timestep=t, class_labels=y).sample
    with torch.no_grad():
        assert torch.equal(
            mine,
            randomised(copy.deepcopy(pipe.transformer), seed=9)(
                x, timestep=t, class_labels=y
            ).sample,
        )
        assert not torch.equal(mine, pipe.transformer(x, timestep=t, class_labels=y).sample)


def test_a_scheduler_copied_under_a_cache_keeps_its_own_state():
    from diffusers import DPMSolverMultistepScheduler

    pipe = pixart_pipe(scheduler=DPMSolverMultistepScheduler())
    x = torch.randn(1, 4, 8, 8)
    with cached(pipe, Schedule(torch.ones(4, 6))):
        twin = copy.deepcopy(pipe.scheduler)
        twin.set_timesteps(4)
        twin.step(x, twin.timesteps[0], x)
        assert twin.lower_order_nums == 1
        assert pipe.scheduler.lower_order_nums == 0
        assert pipe.scheduler.num_inference_steps is None


def test_only_the_innermost_schedule_is_held_against_the_run():
    pipe = dit_pipe()
    with cached(pipe, table(pipe, 4)):
        under = run(pipe, 4)
        with cached(pipe, table(pipe, 6)) as inner:
            run(pipe, 6)
            assert inner.skipped == 3 * 4
        assert torch.equal(run(pipe, 4), under)


def test_a_walk_under_inference_mode_does_not_break_later_training():
    pipe = dit_pipe()
    with torch.inference_mode(), cached(pipe, table(pipe)):
        run(pipe)
    d = from_pipeline(pipe, steps=3)
    train_sdt(d, iterations=2, batch_size=1, progress=False)


def test_it_works_under_accelerates_cpu_offload_and_leaves_its_hooks_alone():
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module

    pipe = dit_pipe()
    plain = run(pipe)
    with cached(pipe, table(pipe)):
        under = run(pipe)
    hooked = [
        pipe.transformer,
        *sites(pipe.transformer).values(),
        *pipe.transformer.transformer_blocks[0].ff.net,
    ]
    for module in hooked:
        add_hook_to_module(module, AlignDevicesHook("cpu"))
    before = snapshot(pipe)
    with cached(pipe, table(pipe)):
        assert torch.equal(run(pipe), under)
    assert snapshot(pipe) == before
    assert torch.equal(run(pipe), plain)
    with cached(pipe, table(pipe)):
        run(pipe)
        for module in (
            hooked
        ):  # what a pipeline does at its end under offloading; it takes ours off the sites as well
            remove_hook_from_module(module)
    assert torch.equal(run(pipe), plain)
    assert not any(hasattr(module, "_hf_hook") for module in pipe.transformer.modules())


def test_a_hook_put_on_top_inside_the_with_stays_and_the_cache_below_it_is_silent():
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    pipe = dit_pipe()
    plain = run(pipe)
    site = next(iter(sites(pipe.transformer).values()))
    with cached(pipe, table(pipe)):
        under = run(pipe)
        add_hook_to_module(site, AlignDevicesHook("cpu"))
        assert torch.equal(run(pipe), under)
    assert hasattr(site, "_hf_hook")
    assert torch.equal(run(pipe), plain)


def test_it_works_with_model_cpu_offload_again_and_again(monkeypatch):
    """The pipeline takes its hooks off and puts them on at the end of each call."""
    from accelerate import cpu_offload_with_hook

    pipe = dit_pipe()
    with cached(pipe, table(pipe)):
        under = run(pipe)
    _, hook = cpu_offload_with_hook(pipe.transformer, "cpu")
    with cached(pipe, table(pipe)) as session:
        assert torch.equal(run(pipe), under)
        hook.remove()
        _, hook = cpu_offload_with_hook(pipe.transformer, "cpu")
        assert torch.equal(run(pipe), under)
        assert session.skipped == 2 * 2 * 4


def test_it_works_with_lora_wrapped_linears():
    from peft import LoraConfig, inject_adapter_in_model

    pipe = pixart_pipe()
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q", "to_v"]), pipe.transformer)
    randomised(pipe.transformer, 3)
    plain = run(pipe)
    with cached(pipe, Schedule(torch.ones(4, 6))):
        assert torch.equal(run(pipe), plain)
    with cached(pipe, table(pipe)) as session:
        run(pipe)
        assert session.skipped


def test_it_works_with_fused_qkv_and_under_autocast():
    pipe = pixart_pipe()
    pipe.transformer.fuse_qkv_projections()
    with torch.autocast("cpu", torch.bfloat16):
        plain = run(pipe)
        with cached(pipe, Schedule(torch.ones(4, 6))):
            assert torch.equal(run(pipe), plain)
        with cached(pipe, table(pipe)):
            assert run(pipe).isfinite().all()


def test_a_schedule_in_the_originals_names_without_names_or_for_kinds_runs():
    pipe = dit_pipe()
    rows = table(pipe).compute
    names = [f"blocks.{i}.{kind}" for i in range(2) for kind in ("attn", "mlp")]
    images = []
    for schedule in (
        table(pipe),
        Schedule(rows, tuple(names)),
        Schedule(rows),
        Schedule(rows[:, :2], ("attn", "mlp")),
    ):
        with cached(pipe, schedule):
            images.append(run(pipe))
    assert all(torch.equal(image, images[0]) for image in images)


def test_columns_in_another_order_are_put_in_order():
    rows = torch.tensor([[1, 1, 1], [0, 1, 0]])
    schedule = Schedule(rows, ("blocks.0.mlp", "blocks.0.attn", "skip"))
    fitted = fit(schedule, ("transformer_blocks.0.attn1", "transformer_blocks.0.ff", "skip"))
    assert fitted.compute.int().tolist() == [[1, 1, 1], [1, 0, 0]]
    sites = ("b.0.attn1", "b.0.attn2", "b.0.ff", "b.0.conv")
    kinds = fit(Schedule([[1, 1], [0, 1]], ("attn", "mlp")), sites)
    assert kinds.compute.int().tolist() == [
        [1, 1, 1, 1],
        [0, 0, 1, 1],
    ]  # what the table does not name computes
    only = fit(Schedule([[1], [0]], ("attn1",)), sites)
    assert only.compute.int().tolist() == [[1, 1, 1, 1], [0, 1, 1, 1]]
    strange = Schedule([[1, 1], [0, 1]], ("attn", "mlp"))
    assert fit(strange, ("b.0.conv", "b.0.norm")) is strange
    one = Schedule([[1], [0]], ("blocks.0.mlp",))
    assert fit(one, ("blocks.0.mlp", "blocks.0.ff")) is one


def test_other_sites_are_refused_and_named():
    """SmoothCache silently caches nothing where the schedule's names are not the model's."""
    pipe = dit_pipe()
    with refused(r"has 2 sites, a … b, the model has 4 sites, transformer_blocks\.0\.attn1"):
        cached(pipe, Schedule([[1, 1]], ("a", "b"))).__enter__()


def test_modules_of_ones_own_choice_are_cached_too():
    pipe = dit_pipe()
    mine = {"first": pipe.transformer.transformer_blocks[0].ff}
    with cached(pipe, Schedule([[1], [0], [0], [1]], ("first",)), sites=mine) as session:
        run(pipe)
        assert session.skipped == 2


def test_another_number_of_steps_is_refused():
    pipe = dit_pipe()
    with refused("this schedule has 4 steps .*the run has 6"), cached(pipe, table(pipe)):
        run(pipe, 6)


def test_other_timesteps_than_trained_on_are_refused():

    pipe = dit_pipe()
    schedule = replace(table(pipe), timesteps=(999, 700, 400, 100), sampler="ddim")
    with (
        refused(r"was made at timesteps 999 … 100 \(ddim\), the run has 750 … 0"),
        cached(pipe, schedule),
    ):
        run(pipe)


def test_chunked_feed_forward_is_refused():
    pipe = pixart_pipe()
    block = pipe.transformer.transformer_blocks[0]
    block.set_chunk_feed_forward(8, 1)
    with refused(r"set_chunk_feed_forward\(None, 0\)"), cached(pipe, Schedule([[1] * 6] * 4)):
        pass


def test_training_mode_is_refused_before_and_inside():
    """In training mode every block of diffusers' DiT drops labels on its own."""
    pipe = dit_pipe()
    schedule = table(pipe)
    pipe.transformer.train()
    with refused(r"is in training mode.*call its eval\(\)"), cached(pipe, schedule):
        pass
    pipe.transformer.eval()
    with cached(pipe, schedule):
        run(pipe)
        pipe.transformer.train()
        with refused(r"training mode.*call its eval\(\)"):
            run(pipe)


def test_a_cache_that_never_skipped_anything_warns():
    """TaylorSeer's default pattern silently caches nothing on DiT, and so does SmoothCache's helper."""
    pipe, other = dit_pipe(), dit_pipe(1)
    with pytest.warns(
        UserWarning, match=r"no site was skipped while cached was open \(0 walks were begun\)"
    ):
        with cached(pipe, table(pipe)):
            run(other)
    with cached(pipe, Schedule(torch.ones(4, 4))):  # a schedule that reuses nothing does not warn
        run(pipe)


def test_sites_replaced_inside_a_known_block_are_still_asked():
    pipe = dit_pipe()
    alone = run(pipe)
    with cached(pipe, table(pipe)) as session:
        expected = run(pipe)
        for block in pipe.transformer.transformer_blocks:
            block.attn1, block.ff = copy.deepcopy(block.attn1), copy.deepcopy(block.ff)
        assert torch.equal(run(pipe), expected)
    assert session.skipped > 0
    assert not torch.equal(alone, expected)


def test_what_is_not_such_a_pipeline_is_refused():
    with pytest.raises(TypeError, match="object has no transformer; expected a diffusers pipeline"):
        cached(object(), Schedule([[1]])).__enter__()
    pipe = dit_pipe()
    pipe.transformer = torch.compile(pipe.transformer)
    with pytest.raises(TypeError, match="is compiled"):
        cached(pipe, Schedule([[1]])).__enter__()
    pipe = wan_pipe()


def test_the_timestep_embeddings_of_a_stock_dit_are_copies_of_one():
    """Every block owns one; a checkpoint whose copies differ cannot become the original's single one."""
    from harmonica.models.weights import dit_from_diffusers

    state = dit_transformer().state_dict()
    with refused(r"transformer_blocks\.1\..* differs from block 0's"):
        dit_from_diffusers(state, torch.zeros(1))


def test_asking_the_session_or_copying_the_model_in_the_middle_of_a_walk_changes_nothing():
    pipe = pixart_pipe()
    with cached(pipe, table(pipe)):
        whole = run(pipe)
    x, text = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 12)
    sizes = {"resolution": None, "aspect_ratio": None}
    plain = pipe.transformer(x, text, torch.tensor([5]), sizes, return_dict=False)[0]

    with cached(pipe, table(pipe)) as session:

        def look(step, *_):
            assert "theoretical speedup" in str(session)
            twin = copy.deepcopy(pipe.transformer)
            assert torch.equal(twin(x, text, torch.tensor([5]), sizes, return_dict=False)[0], plain)

        assert torch.equal(run(pipe, callback=look, callback_steps=1), whole)


@pytest.mark.parametrize("name", PIPES)
def test_what_is_not_exact_differs_by_rounding(name):
    pipe = PIPES[name]()
    exact, fast = [], []
    for images, options in ((exact, {}), (fast, {"exact": False})):
        with cached(pipe, table(pipe), **options):
            images += [run(pipe, seed=seed, batch=2) for seed in (1, 2)]
    for one, other in zip(exact, fast, strict=True):
        assert (
            float((one - other).norm() / one.norm()) < 1e-3
        )  # float32, under weights that amplify


def test_a_stock_pipeline_projects_its_text_and_embeds_its_labels_once():
    pipe = pixart_pipe()
    blocks = pipe.transformer.transformer_blocks
    text = [
        pipe.transformer.caption_projection,
        *(layer for b in blocks for layer in (b.attn2.to_k, b.attn2.to_v)),
    ]

    def under_the_cache(sites, walks):
        with cached(pipe, Schedule(torch.ones(4, sites))):
            for _ in range(walks):
                run(pipe)

    assert count_calls(text, lambda: under_the_cache(6, walks=2)) == [2] * 5
    pipe = dit_pipe()
    embeddings = [block.norm1.emb for block in pipe.transformer.transformer_blocks]
    embeddings[1].load_state_dict(embeddings[0].state_dict())
    plain = run(pipe)
    in_blocks_and_at_the_end = 4 * (2 + 1)
    assert sum(count_calls(embeddings, lambda: run(pipe))) == in_blocks_and_at_the_end
    assert sum(count_calls(embeddings, lambda: under_the_cache(4, walks=1))) == 4
    with cached(pipe, Schedule(torch.ones(4, 4))):
        assert torch.equal(run(pipe), plain)


def test_a_prompt_that_changes_in_the_middle_of_a_walk_is_seen():
    """The text is written to in place, and replaced: what was projected of it before is not used again."""
    for name in ("replaced", "written to"):
        pipe = pixart_pipe()
        forward, steps = pipe.transformer.forward, []

        def changing(
            x, encoder_hidden_states, *args, _forward=forward, _steps=steps, _name=name, **kwargs
        ):
            _steps.append(len(_steps))
            if len(_steps) % 4 == 3:
                if _name == "written to":
                    encoder_hidden_states.mul_(0.5)
                else:
                    encoder_hidden_states = encoder_hidden_states * 0.5
            return _forward(x, encoder_hidden_states, *args, **kwargs)

        pipe.transformer.forward = changing
        plain = run(pipe)
        with cached(pipe, Schedule(torch.ones(4, 6))):
            assert torch.equal(run(pipe), plain)


@pytest.mark.parametrize("name", ["dit", "pixart-alpha"])
def test_a_model_copied_while_much_is_known_ahead_runs_its_own_weights(name):
    pipe = PIPES[name]()
    step = pipe.scheduler.step
    twin = None

    def look(*args, **kwargs):
        nonlocal twin
        twin = twin or copy.deepcopy(pipe.transformer)
        return step(*args, **kwargs)

    pipe.scheduler.step = look
    with cached(pipe, table(pipe), exact=False):
        run(pipe)
    for module in twin.modules():
        randomised(module, seed=7)
    inputs = {
        "hidden_states": torch.randn(1, 4, 8, 8),
        "timestep": torch.tensor([5]),
        "return_dict": False,
    }
    inputs |= {"class_labels": torch.tensor([3])} if name == "dit" else {
        "encoder_hidden_states": torch.randn(1, 5, 12), "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}
    }  # fmt: skip
    clean = PIPES[name]().transformer
    clean.load_state_dict(twin.state_dict())
    torch.testing.assert_close(twin(**inputs)[0], clean(**inputs)[0], rtol=1e-3, atol=1e-3)


def test_rounding_is_allowed_only_where_it_is_known_what_is_rounded():
    pipe = flux_pipe()
    with refused("exact=False is for DiTPipeline, .*, not FluxPipeline; leave it out"):
        cached(pipe, table(pipe), exact=False).__enter__()


def test_a_session_over_sites_of_ones_own_choice_counts_those():
    pipe = dit_pipe()
    mine = {"first": pipe.transformer.transformer_blocks[0].ff}
    with cached(pipe, Schedule([[1], [0], [0], [1]], ("first",)), sites=mine) as session:
        run(pipe)
        assert "theoretical speedup of the transformer 1." in str(session)


def test_enable_cache_does_not_keep_a_pipeline_alive():
    import gc
    import weakref

    pipe = dit_pipe()
    enable_cache(pipe, table(pipe))
    run(pipe)
    alive = weakref.ref(pipe), weakref.ref(pipe.transformer)
    del pipe
    gc.collect()
    assert [ref() for ref in alive] == [None, None]


@given(st.permutations(["a", "b", "c"]))
def test_sessions_closed_in_any_order_leave_nothing_behind(order):
    pipe = STOCK
    before, open_sessions = snapshot(pipe), {}
    for name in "abc":
        open_sessions[name] = cached(pipe, Schedule(torch.ones(4, 4)))
        open_sessions[name].__enter__()
    for name in order:
        open_sessions[name].__exit__(None, None, None)
    assert snapshot(pipe) == before


def test_enabling_a_schedule_that_does_not_fit_leaves_the_one_that_does():
    pipe = dit_pipe()
    enable_cache(pipe, table(pipe))
    image = run(pipe)
    with refused("has 2 sites"):
        enable_cache(pipe, Schedule([[1, 1]], ("a", "b")))
    assert torch.equal(run(pipe), image)
    disable_cache(pipe)
