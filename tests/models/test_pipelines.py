"""Stock diffusers pipelines under a schedule: exact when all computes, loud when it is wrong."""

import contextlib
import copy
import gc
import pipes
import weakref
from dataclasses import replace
from pipes import count_calls, dit_pipe, everything, pixart_pipe, randomised, run, table, under

import diffusers
import pytest
import torch
from accelerate import cpu_offload_with_hook
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from conftest import attributes, equal, refused, seeded
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, inject_adapter_in_model

from harmonica import Schedule, train_sdt
from harmonica.models.pipelines import from_pipeline
from harmonica.models.pipelines.caching import cached, disable_cache, enable_cache
from harmonica.models.sites import sites
from harmonica.models.weights import dit_from_diffusers
from harmonica.site_names import fit

PIPES = {
    "dit": dit_pipe,
    "pixart-alpha": pixart_pipe,
    "pixart-alpha with micro-conditions": lambda: pixart_pipe(micro=True),
    "pixart-sigma": lambda: pixart_pipe("Sigma"),
}
STOCK = dit_pipe()


@pytest.fixture(params=PIPES)
def pipe(request):
    return PIPES[request.param]()


def snapshot(pipe) -> dict:
    """Everything that anybody has put on the instances."""
    scheduler = {k: v for k, v in vars(pipe.scheduler).items() if callable(v)}
    modules = attributes(pipe.transformer)
    return {"modules": modules, "scheduler": scheduler, "pipe": set(vars(pipe))}


@pytest.mark.parametrize("scheduler", ["DDIM", "DPMSolverMultistep", "DDPM", "SASolver"])
@pytest.mark.parametrize("name", PIPES)
def test_under_each_sampler_computing_everything_is_the_stock_pipeline(name, scheduler):
    pipe, options = PIPES[name](), {} if "Solver" in scheduler else {"clip_sample": False}
    pipe.scheduler = getattr(diffusers, f"{scheduler}Scheduler")(**options)
    torch.manual_seed(0)  # DiTPipeline hands no generator to a stochastic scheduler
    plain = run(pipe, batch=2)
    with cached(pipe, everything(pipe)):
        for _ in range(2):  # the second image too
            torch.manual_seed(0)
            assert torch.equal(run(pipe, batch=2), plain)
    with cached(pipe, table(pipe)) as session:
        assert run(pipe, batch=2).isfinite().all()
        assert session.skipped == 2 * len(session.sites)
    torch.manual_seed(0)
    assert torch.equal(run(pipe, batch=2), plain)


def test_every_image_inside_the_with_is_the_same_and_skips_the_same(pipe):
    """SmoothCache's second image silently has no speedup; others leak state into the next call."""
    with cached(pipe, table(pipe)) as session:
        images = [run(pipe) for _ in range(3)]
        assert session.skipped == 3 * 2 * len(session.sites)
    assert equal(images[1:], images[:1] * 2)
    assert not torch.equal(images[0], run(pipe))


def test_exactly_the_scheduled_sites_run(pipe):
    names, modules = zip(*sites(pipe.transformer).items(), strict=True)
    rows = torch.tensor([[k == 0 or (k + i) % 3 == 1 for i in range(len(names))] for k in range(4)])
    with cached(pipe, Schedule(rows, names)):
        assert count_calls(modules, lambda: run(pipe)) == rows.sum(0).tolist()


def test_heun_calls_the_model_seven_times_in_four_steps_and_each_call_is_a_step():
    pipe = dit_pipe(scheduler=diffusers.HeunDiscreteScheduler())
    plain = run(pipe, 4)
    assert len(pipe.scheduler.timesteps) == 7
    assert torch.equal(under(pipe, Schedule(torch.ones(7, 4)), run, pipe, 4), plain)
    with cached(pipe, table(pipe, 7)) as session:
        run(pipe, 4)
        assert session.skipped == 3 * 4


@pytest.mark.parametrize("make", [pipes.flux_pipe, pipes.wan_pipe])
def test_pipelines_that_nobody_here_wrote_an_adapter_for_are_exact_too(make):
    """Flux and Wan: features that are tuples, two calls in a step, fractional timesteps."""
    pipe = make()
    plain, before = pipes.run_embedded(pipe), snapshot(pipe)
    assert torch.equal(under(pipe, everything(pipe), pipes.run_embedded, pipe), plain)
    with cached(pipe, table(pipe)) as session:
        image = pipes.run_embedded(pipe)
        assert torch.equal(pipes.run_embedded(pipe), image)
        walks = calls_in_a_step = steps_that_reuse = 2
        assert session.skipped == walks * calls_in_a_step * steps_that_reuse * len(session.sites)
        assert "theoretical speedup" in str(session)
    assert not torch.equal(image, plain)
    assert snapshot(pipe) == before


def test_guidance_as_two_calls_has_one_cache_for_each():
    """Some pipelines call the transformer once for each half: the halves must not meet."""

    def walk(batched):
        latent = torch.randn(1, 4, 8, 8, generator=seeded(0))
        pipe.scheduler.set_timesteps(4)
        for t in pipe.scheduler.timesteps:
            labels = [(1, 1000)] if batched else [(1,), (1000,)]
            x = latent.expand(1 + batched, -1, -1, -1)
            calls = [pipe.transformer(x, t.expand(len(x)), torch.tensor(y)).sample for y in labels]
            mine, null = torch.cat(calls)[:, None, :4]
            latent = pipe.scheduler.step(null + 3 * (mine - null), t, latent).prev_sample
        return latent

    pipe = dit_pipe()
    with cached(pipe, everything(pipe)) as session, session.walk():
        exact = walk(batched=False)
    assert torch.equal(exact, walk(batched=False))
    images = []
    for batched in (False, True):
        with cached(pipe, table(pipe)) as session, session.walk():
            images.append(walk(batched))
            assert session.skipped == 2 * 4 * (1 if batched else 2)
    torch.testing.assert_close(*images, rtol=1e-3, atol=1e-3)


def test_nothing_outlives_the_with_exception_or_not(pipe):
    before = snapshot(pipe)
    with cached(pipe, table(pipe)):
        run(pipe)
    assert snapshot(pipe) == before
    hook = pipe.transformer.transformer_blocks[-1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), cached(pipe, table(pipe)):
        run(pipe)
    hook.remove()
    assert snapshot(pipe) == before


@given(st.lists(st.sampled_from(["enable", "disable"]), max_size=6))
def test_enabling_any_number_of_times_is_undone_by_disabling_once(actions):
    """DeepCache cannot be undone after enabling twice."""
    pipe = STOCK
    before = snapshot(pipe)
    for action in actions:
        enable_cache(pipe, table(pipe)) if action == "enable" else disable_cache(pipe)
    unused = pytest.warns(UserWarning, match="no site was skipped")
    with unused if actions[-1:] == ["enable"] else contextlib.nullcontext():
        disable_cache(pipe)
    assert snapshot(pipe) == before


def test_enable_and_disable_have_the_shape_that_people_know():
    """A table that does not fit leaves the one that does, and nothing keeps a pipeline alive."""
    plain = run(pipe := dit_pipe())
    session, image = enable_cache(pipe, table(pipe)), run(pipe)
    for words in ("4 steps × 4 sites, CUR 50.0%", "theoretical speedup", "so far, walks: 1"):
        assert words in str(session)
    with refused("has 2 sites"):
        enable_cache(pipe, Schedule([[1, 1]], ("a", "b")))
    assert torch.equal(run(pipe), image)
    disable_cache(pipe)
    assert torch.equal(run(pipe), plain)
    enable_cache(pipe, table(pipe))
    run(pipe)
    alive = weakref.ref(pipe), weakref.ref(pipe.transformer)
    del pipe
    gc.collect()
    assert [ref() for ref in alive] == [None, None]


def test_nested_and_repeated_use_restores_exactly_what_was_there():
    """The innermost schedule is in force, and it alone is held against the run."""
    plain, before = run(pipe := dit_pipe(), 6), snapshot(pipe)
    for _ in range(2):
        with cached(pipe, table(pipe)):
            outer = run(pipe)
            assert torch.equal(under(pipe, everything(pipe, 6), run, pipe, 6), plain)
            assert torch.equal(run(pipe), outer)
    assert snapshot(pipe) == before


def test_two_pipelines_at_once_share_nothing():
    """TeaCache and others keep state on the class, shared between instances."""
    one, other = dit_pipe(0), dit_pipe(1)
    alone = [under(one, table(one), run, one), under(other, table(other, 4, 4), run, other)]
    with cached(one, table(one)), cached(other, table(other, 4, 4)):
        assert equal([run(one), run(other), run(one)], [*alone, alone[0]])


def test_a_walk_under_inference_mode_does_not_break_later_training():
    pipe = dit_pipe()
    with torch.inference_mode(), cached(pipe, table(pipe)):
        run(pipe)
    train_sdt(from_pipeline(pipe, steps=3), iterations=2, batch_size=1, progress=False)


def test_it_works_under_accelerates_cpu_offload_and_leaves_its_hooks_alone():
    plain = run(pipe := dit_pipe())
    image = under(pipe, table(pipe), run, pipe)
    first = pipe.transformer.transformer_blocks[0]
    hooked = [pipe.transformer, *sites(pipe.transformer).values(), *first.ff.net]
    for module in hooked:
        add_hook_to_module(module, AlignDevicesHook("cpu"))
    before = snapshot(pipe)
    assert torch.equal(under(pipe, table(pipe), run, pipe), image)
    assert snapshot(pipe) == before
    assert torch.equal(run(pipe), plain)
    with cached(pipe, table(pipe)):
        run(pipe)
        for module in hooked:  # as a pipeline does at its end; it takes ours off as well
            remove_hook_from_module(module)
    assert torch.equal(run(pipe), plain)
    assert not any(hasattr(module, "_hf_hook") for module in pipe.transformer.modules())


def test_a_hook_put_on_top_inside_the_with_stays_and_the_cache_below_it_is_silent():
    plain = run(pipe := dit_pipe())
    site = next(iter(sites(pipe.transformer).values()))
    with cached(pipe, table(pipe)):
        image = run(pipe)
        add_hook_to_module(site, AlignDevicesHook("cpu"))
        assert torch.equal(run(pipe), image)
    assert hasattr(site, "_hf_hook")
    assert torch.equal(run(pipe), plain)


def test_it_works_with_model_cpu_offload_again_and_again():
    """The pipeline takes its hooks off and puts them on at the end of each call."""
    pipe = dit_pipe()
    image = under(pipe, table(pipe), run, pipe)
    _, hook = cpu_offload_with_hook(pipe.transformer, "cpu")
    with cached(pipe, table(pipe)) as session:
        assert torch.equal(run(pipe), image)
        hook.remove()
        _, hook = cpu_offload_with_hook(pipe.transformer, "cpu")
        assert torch.equal(run(pipe), image)
        assert session.skipped == 2 * 2 * 4


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("change", ["lora", "fused qkv"])
def test_it_works_with_lora_wrapped_linears_fused_qkv_and_under_autocast(change, autocast):
    pipe = pixart_pipe()
    if change == "lora":
        inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q", "to_v"]), pipe.transformer)
        randomised(pipe.transformer, 3)
    else:
        pipe.transformer.fuse_qkv_projections()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        plain = run(pipe)
        assert torch.equal(under(pipe, everything(pipe), run, pipe), plain)
        with cached(pipe, table(pipe)) as session:
            assert run(pipe).isfinite().all()
            assert session.skipped


def test_a_schedule_in_the_originals_names_without_names_or_for_kinds_runs():
    pipe, images = dit_pipe(), []
    rows = table(pipe).compute
    names = tuple(f"blocks.{i}.{kind}" for i in range(2) for kind in ("attn", "mlp"))
    kinds = Schedule(rows[:, :2], ("attn", "mlp"))
    for schedule in (table(pipe), Schedule(rows, names), Schedule(rows), kinds):
        with cached(pipe, schedule):
            images.append(run(pipe))
    assert equal(images, images[:1] * 4)


def test_columns_in_another_order_are_put_in_order():
    rows = torch.tensor([[1, 1, 1], [0, 1, 0]])
    schedule = Schedule(rows, ("blocks.0.mlp", "blocks.0.attn", "skip"))
    fitted = fit(schedule, ("transformer_blocks.0.attn1", "transformer_blocks.0.ff", "skip"))
    assert fitted.compute.int().tolist() == [[1, 1, 1], [1, 0, 0]]
    sites = ("b.0.attn1", "b.0.attn2", "b.0.ff", "b.0.conv")
    kinds = fit(Schedule([[1, 1], [0, 1]], ("attn", "mlp")), sites)
    assert kinds.compute.int().tolist() == [[1] * 4, [0, 0, 1, 1]]  # what is not named computes
    only = fit(Schedule([[1], [0]], ("attn1",)), sites)
    assert only.compute.int().tolist() == [[1] * 4, [0, 1, 1, 1]]
    for rows, names, others in (
        ([[1, 1], [0, 1]], ("attn", "mlp"), ("b.0.conv", "b.0.norm")),
        ([[1], [0]], ("blocks.0.mlp",), ("blocks.0.mlp", "blocks.0.ff")),
    ):
        strange = Schedule(rows, names)
        assert fit(strange, others) is strange


def test_modules_of_ones_own_choice_are_cached_and_counted():
    pipe = dit_pipe()
    mine = {"first": pipe.transformer.transformer_blocks[0].ff}
    with cached(pipe, Schedule([[1], [0], [0], [1]], ("first",)), sites=mine) as session:
        run(pipe)
        assert session.skipped == 2
        assert "theoretical speedup of the transformer 1." in str(session)


BAD = {
    "steps": (lambda pipe: table(pipe, 6), r"for the 4 steps .*there are tables for 6 steps .any t"),
    "timesteps": (lambda pipe: replace(table(pipe), timesteps=(999, 700, 400, 100)),
                  r"for the 4 steps .750 … 0. of this run; there are tables for 4 steps .999 … 100"),
    "sites": (lambda _: Schedule([[1, 1]], ("a", "b")),
              r"has 2 sites, a … b, the model has 4 sites, transformer_blocks\.0\.attn1"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_other_steps_timesteps_or_sites_are_refused_and_named(what):
    """SmoothCache silently caches nothing where the schedule's names are not the model's."""
    pipe, (schedule, message) = dit_pipe(), BAD[what]
    with refused(message), cached(pipe, schedule(pipe)):
        run(pipe)


def test_training_mode_is_refused_before_and_inside():
    """In training mode every block of diffusers' DiT drops labels on its own."""
    with cached(pipe := dit_pipe(), table(pipe)):
        run(pipe)
        pipe.transformer.train()
        with refused(r"training mode.*call its eval\(\)"):
            run(pipe)
    with refused(r"is in training mode.*call its eval\(\)"), cached(pipe, table(pipe)):
        pass


def test_a_cache_that_never_skipped_anything_warns_unless_its_table_reuses_nothing():
    """TaylorSeer's default pattern silently caches nothing on DiT; so does SmoothCache's helper."""
    pipe, other = dit_pipe(), dit_pipe(1)
    with pytest.warns(UserWarning, match=r"no site was skipped .* open \(0 walks were begun\)"):
        with cached(pipe, table(pipe)):
            run(other)
    with cached(pipe, everything(pipe)):
        run(pipe)


def test_sites_replaced_inside_a_known_block_are_still_asked():
    alone = run(pipe := dit_pipe())
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
    for open_cache in (cached, enable_cache):
        with pytest.raises(TypeError, match="unexpected keyword argument 'exact'"):
            open_cache(dit_pipe(), Schedule([[1]]), exact=False)


def test_the_timestep_embeddings_of_a_stock_dit_are_copies_of_one():
    """Every block owns one; copies that differ cannot become the original's single one."""
    with refused(r"transformer_blocks\.1\..* differs from block 0's"):
        dit_from_diffusers(pipes.dit_transformer().state_dict(), torch.zeros(1))


@given(st.permutations(["a", "b", "c"]))
def test_sessions_closed_in_any_order_leave_nothing_behind(order):
    pipe = STOCK
    before, open_sessions = snapshot(pipe), {}
    for name in "abc":
        open_sessions[name] = cached(pipe, everything(pipe))
        open_sessions[name].__enter__()
    for name in order:
        open_sessions[name].__exit__(None, None, None)
    assert snapshot(pipe) == before
