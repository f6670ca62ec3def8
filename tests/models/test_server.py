"""The laws of a server: threads, interrupted calls, siblings, sudden changes, other libraries.

Where nothing valid is kept, the cache computes; what is reused is counted as it happens.
"""

import asyncio
import contextlib
import copy
import gc
import itertools
import logging
import pipes
import threading
import weakref
from pipes import dit_transformer, everything, randomised, run, run_embedded, table, under

import diffusers
import pytest
import torch
from conftest import equal, make, noting, raising, refused, seeded, start
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from peft import LoraConfig, inject_adapter_in_model
from small import MADE, random_table
from torch import nn

from harmonica import Schedule, gated, sample
from harmonica.inference.walk import Walk
from harmonica.models.pipelines import session as session_module
from harmonica.models.pipelines.caching import cached, disable_cache, enable_cache
from harmonica.models.sites import sites
from harmonica.override import overridden

pytestmark = pytest.mark.filterwarnings("ignore:no site was skipped")


def one(k):
    return 1


class Loop:
    """A pipeline of a diffusers DiT that can be bent: where it starts, what it calls, what follows a step."""

    def __init__(self, transformer, scheduler=None):
        self.transformer, self.scheduler = transformer, scheduler or DDIMScheduler()

    def __call__(self, seed=1, *, steps=4, start=0, batch=one, calls=one, after=None, **times):
        x, labels = torch.randn(1, 4, 8, 8, generator=seeded(seed)), torch.tensor([seed, 1000])
        self.scheduler.set_timesteps(**(times or {"num_inference_steps": steps}))
        for k, t in list(enumerate(self.scheduler.timesteps))[start:]:
            for call in range(calls(k)):
                n = batch(k)
                y = labels[call % 2, None] if n == 1 else labels
                x_n = x.expand(n, -1, -1, -1).to(self.transformer.dtype)
                out = self.transformer(x_n, timestep=t.expand(n), class_labels=y).sample
            x = self.step(out[:1, :4], t, x)
            if after is not None:
                after(k)
        return x

    def step(self, eps, t, x):
        return self.scheduler.step(eps, t, x).prev_sample


def loop():
    return Loop(dit_transformer())


def is_stock(transformer):
    kept = ("forward", "_forward_pre_hooks", "_forward_hooks")
    return not any(vars(m).get(name) for m in transformer.modules() for name in kept)


def asked(transformer):
    """Return what a transformer answers to one question."""
    return transformer(torch.ones(1, 4, 8, 8), torch.tensor([250]), torch.tensor([3])).sample


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("how", ["sample", "one Walk", "two Walks"])
def test_eight_threads_on_one_denoiser_make_the_images_that_each_makes_alone(name, how):
    d = MADE[name]()
    noise = [start(d, 1, seed) for seed in range(8)]
    tables = [random_table(d, seed=seed % 2) for seed in range(8)]
    walks = [Walk(d, schedule, exact=True) for schedule in tables[:2]]
    walk = {
        "sample": lambda i: sample(d, *noise[i], tables[i] if i % 4 else None),
        "one Walk": lambda i: walks[0](*noise[i]),
        "two Walks": lambda i: walks[i % 2](*noise[i]),
    }[how]
    alone = [walk(i) for i in range(8)]
    for _ in range(2):
        assert equal(pipes.in_threads([lambda i=i: walk(i) for i in range(8)]), alone)
    assert all("forward" not in vars(module) for module in d.model.modules())


def test_pipelines_that_share_a_transformer_run_at_once_each_under_its_own_table_or_none():
    shared = loop().transformer
    own = [Loop(shared, DDIMScheduler()) for _ in range(8)]
    tables = [table(own[0]), table(own[0], every=4), everything(own[0]), None]
    for pipe, each in zip(own, tables * 2, strict=True):
        if each is not None:
            enable_cache(pipe, each)
    jobs = [lambda pipe=pipe, i=i: pipe(i) for i, pipe in enumerate(own)]
    alone = [job() for job in jobs]
    for _ in range(3):
        assert equal(pipes.in_threads(jobs), alone)
    assert len({tuple(image.flatten().tolist()) for image in alone}) == 8
    for pipe in own:
        disable_cache(pipe)
    assert is_stock(shared)


@pytest.mark.parametrize("kind", [Loop, type("Another", (Loop,), {})])
@pytest.mark.parametrize("inner_cached", [True, False])
def test_a_pipeline_called_in_the_walk_of_another_changes_neither_image(inner_cached, kind):
    outer, images = loop(), []
    inner = kind(outer.transformer, DDIMScheduler())
    with torch.no_grad(), contextlib.ExitStack() as stack:
        if inner_cached:
            stack.enter_context(cached(inner, table(inner, every=4)))
        elif kind is not Loop:  # else it would follow the table
            stack.enter_context(cached(inner, [], otherwise="compute"))
        alone, expected = inner(2), under(outer, table(outer), outer)
        outer.step = lambda *args: images.append(inner(2)) or Loop.step(outer, *args)
        assert torch.equal(under(outer, table(outer), outer), expected)
    assert equal(images, [alone] * 4)


class Streaming(Loop):
    """Yields the image after each step, again if it is told so, with a scheduler of its own."""

    def __call__(self, seed=1):
        x = torch.randn(1, 4, 8, 8, generator=seeded(seed))
        scheduler = copy.deepcopy(self.scheduler)
        scheduler.set_timesteps(4)
        for t in scheduler.timesteps:
            out = self.transformer(x, timestep=t[None], class_labels=torch.tensor([seed]))
            x = scheduler.step(out.sample[:, :4], t, x).prev_sample
            try:
                while (yield x) == "again":
                    pass
            except KeyError:
                x = -x


class Awaiting(Streaming):
    """Lets other tasks run between two steps."""

    async def __call__(self, seed=1):
        for image in super().__call__(seed):
            await asyncio.sleep(0)
            last = image
        return last


class StreamingToTask(Streaming):
    async def __call__(self, seed=1):
        for image in super().__call__(seed):
            await asyncio.sleep(0)
            yield image


def test_generators_and_tasks_of_one_pipeline_take_turns_without_meeting():
    pipe, kinds = loop(), (Streaming, Awaiting, StreamingToTask)
    streaming, awaiting, to_task = (kind(pipe.transformer, pipe.scheduler) for kind in kinds)
    with cached(streaming, table(pipe)) as session:
        alone = [list(streaming(seed))[-1] for seed in (1, 2)]
        assert equal(list(zip(streaming(1), streaming(2), strict=True))[-1], alone)
        assert session.skipped == 4 * 2 * 4

        images = streaming(1)
        heard = [next(images), images.send("again"), images.throw(KeyError("minus")), *images]
    images = streaming(1)
    computed = [next(images), images.send("again"), images.throw(KeyError("minus")), *images]
    assert equal(heard[:2], computed[:2])
    assert len(heard) == len(computed) == 5

    async def all_at_once():
        return await asyncio.gather(*(awaiting(seed) for seed in (1, 2)))

    with cached(awaiting, table(pipe)):
        assert equal(asyncio.run(all_at_once()), alone)

    async def last_of(images):
        return [(image, asked(pipe.transformer)) async for image in images][-1]

    async def all_streamed():
        return await asyncio.gather(*(last_of(to_task(seed)) for seed in (1, 2)))

    stock = asked(pipe.transformer)
    with cached(to_task, table(pipe)):
        images, between = zip(*asyncio.run(all_streamed()), strict=True)
    assert equal(images, alone)
    assert equal(between, [stock] * 2)


def test_calls_that_one_step_makes_in_two_threads_find_their_own_features():
    class Halves(Loop):
        async def __call__(self, how):
            x, texts = torch.ones(1, 4, 8, 8), torch.tensor([1000, 5]).split(1)
            self.scheduler.set_timesteps(4)
            for t in self.scheduler.timesteps:
                run = lambda y, t=t: self.transformer(x, timestep=t[None], class_labels=y).sample  # noqa: E731
                a, b = await how(run, texts)
                x = self.step((3 * b - 2 * a)[:, :4], t, x)
            return x

    async def in_turn(run, texts):
        return map(run, texts)

    async def at_once(run, texts):
        with first.register_forward_pre_hook(lambda *_: both.wait() * 0 or None):
            return await asyncio.gather(*(asyncio.to_thread(run, text) for text in texts))

    pipe, both = Halves(dit_transformer()), threading.Barrier(2)
    first = pipe.transformer.transformer_blocks[0]
    with torch.no_grad(), cached(pipe, table(pipe)) as session:
        alone = asyncio.run(pipe(in_turn))
        assert torch.equal(asyncio.run(pipe(at_once)), alone)
        assert not session.report()["beyond"]


def test_blocks_that_backward_runs_again_in_another_thread_ask_the_gate_of_the_step():
    """As on a GPU, where autograd has threads of its own."""
    d = make()
    d.model.activation_checkpointing = True
    x, y = start(d, 1, 0)
    r, gradients = torch.full((4,), 0.5, dtype=torch.float64, requires_grad=True), []
    for elsewhere in (False, True):
        with gated(d.sites, lambda site, compute: r[site] * compute()):
            loss = d.predict(x, 1, y).square().sum()
            if elsewhere:
                pipes.in_threads([loss.backward])
            else:
                loss.backward()
        gradients.append(r.grad.clone())
        r.grad = None
    assert torch.equal(*gradients)


def ends(pipe, how):
    async def cancelled():
        task = asyncio.ensure_future(pipe())
        for _ in range(3):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    if how == "exception":
        with pytest.raises(KeyboardInterrupt):
            pipe(after=lambda k: raising(KeyboardInterrupt)() if k == 1 else None)
    elif how == "generator":
        images = pipe()
        next(images)
        images.close()
    elif how == "generator of a task":

        async def closed():
            images = pipe()
            await anext(images)
            await images.aclose()

        asyncio.run(closed())
    else:
        asyncio.run(cancelled())


@pytest.mark.parametrize("how", ["exception", "generator", "generator of a task", "cancelled"])
def test_after_a_call_that_was_broken_off_the_model_is_the_stock_one_and_features_are_gone(how):
    plain = loop()
    kinds = {"generator": Streaming, "generator of a task": StreamingToTask, "cancelled": Awaiting}
    kind = kinds.get(how, Loop)
    pipe = kind(plain.transformer, plain.scheduler)
    stock = asked(pipe.transformer)
    first, features = next(iter(sites(pipe.transformer).values())), []
    with cached(pipe, Schedule([[1] * 4, *[[0] * 4] * 3])):
        with overridden([(first, "forward", keeping(features))]):
            ends(pipe, how)
        gc.collect()
        assert {feature() for feature in features} == {None}
        assert torch.equal(asked(pipe.transformer), stock)
        assert is_stock(pipe.transformer)
        assert torch.equal(Loop(pipe.transformer)(), loop()())
    assert "__call__" in vars(kind)
    assert vars(kind)["__call__"].__qualname__ == f"{kind.__name__}.__call__"


def keeping(features):
    def answer(forward, args, kwargs):
        out = forward(*args, **kwargs)
        features.append(weakref.ref(out))
        return out

    return answer


@pytest.mark.parametrize("calls", [1, 50])
def test_features_are_let_go_before_the_image_is_decoded_and_do_not_pile_up(calls):
    pipe, features, alive = loop(), [], []

    def count(k):
        gc.collect()
        alive.append(sum(feature() is not None for feature in features))

    first = next(iter(sites(pipe.transformer).values()))
    with cached(pipe, table(pipe)), overridden([(first, "forward", keeping(features))]):
        pipe(after=count, calls=lambda k: calls)
    assert (alive[-1], max(alive) < 50) == (0, True)


def test_after_the_last_step_everything_computes():
    pipe, answers = loop(), []
    last = lambda k: answers.append(asked(pipe.transformer)) if k == 3 else None  # noqa: E731
    under(pipe, table(pipe), pipe, after=last)
    assert torch.equal(answers[0], asked(pipe.transformer))


class Tail(DDIMScheduler):
    """Leaves out the first timestep of the scheduler that it derives from."""

    def set_timesteps(self, *args, **kwargs):
        super().set_timesteps(*args, **kwargs)
        self.timesteps = self.timesteps[1:]


def test_a_scheduler_is_followed_while_the_class_that_it_derives_from_is_followed_too():
    pipe, other = Loop(loop().transformer, Tail()), loop()
    rows = Schedule([[1] * 4, [0] * 4, [1] * 4], timesteps=(500, 250, 0))
    with cached(pipe, rows), cached(other, table(other)) as session, session.walk():
        assert computed(pipe) == [4, 0, 4]


def test_siblings_that_share_transformer_and_scheduler_make_their_stock_images():
    pipe = pipes.pixart_pipe()
    plain, kind = run(pipe), type(pipe)
    siblings = [copy.copy(pipe), kind(**pipe.components), kind.from_pipe(pipe)]
    with cached(pipe, table(pipe)) as session:
        assert all(torch.equal(run(pipes.silent(sibling)), plain) for sibling in siblings)
        assert session.walks == 0
        assert not torch.equal(run(pipe), plain)


def adapters(model):
    """Return all adapters by name, which are put on all linear layers of a model that has none."""
    if not any(hasattr(module, "lora_A") for module in model.modules()):
        names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
        inject_adapter_in_model(LoraConfig(r=2, target_modules=names), model)
        for i, (name, p) in enumerate(model.named_parameters()):
            if "lora_" in name:
                p.data = torch.randn(p.shape, generator=seeded(i)) * 0.3
        model.eval()
    return [(name, module) for name, module in model.named_modules() if hasattr(module, "lora_A")]


def scale(model):
    for _, module in adapters(model):
        module.scaling["default"] *= 3.0


def fuse_and_remove(model):
    for name, module in adapters(model):
        module.merge()
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, module.get_base_layer())


def load(model):
    model.load_state_dict({k: 0.5 * v + 0.01 for k, v in model.state_dict().items()})


def swap(model):
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if name in ("to_k", "emb", "linear_1"):
                setattr(module, name, randomised(copy.deepcopy(child), 5))


CHANGES = {f.__name__: f for f in (scale, fuse_and_remove, load, swap)}
CHANGES["to double"] = nn.Module.double


@pytest.mark.parametrize("change", CHANGES)
def test_after_any_change_of_the_model_computing_everything_is_the_stock_image(change):
    """Made by a callback in the middle of a walk, and followed by another walk."""

    def images(pipe):
        between = lambda k: CHANGES[change](pipe.transformer) if k == 1 else None  # noqa: E731
        return pipe(after=between), pipe()

    with torch.no_grad():
        expected, pipe = images(loop()), loop()
        with cached(pipe, everything(pipe)):
            assert equal(images(pipe), expected)
            assert not torch.equal(*expected)


def test_a_feature_changed_in_place_is_never_reused_spoilt():
    def halved(in_place):
        pipe = loop()
        for site in sites(pipe.transformer).values():
            site.register_forward_hook(lambda _, __, out: out.mul_(0.5) if in_place else out * 0.5)
        return pipe

    stock = halved(in_place=True)
    with torch.no_grad():
        plain = stock()
        with cached(stock, table(stock)) as session:
            assert torch.equal(stock(), plain)
            assert (session.skipped, session.report()["beyond"]) == (0, {"changed in place": 8})
    with torch.inference_mode():  # torch counts no changes there: features are copied
        for options in ({}, {"offload": True}):
            images = []
            for pipe in map(halved, (True, False)):
                with cached(pipe, table(pipe, every=4), **options) as session:
                    images.append(pipe())
                    assert session.skipped == 12
            assert torch.equal(*images)


def computed(pipe, **call):
    """Return how many sites run at each step of one call."""
    log, counts = [], [0]
    with gated(list(sites(pipe.transformer).values()), noting(log)):
        pipe(after=lambda k: counts.append(len(log)), **call)
    return [after - before for before, after in itertools.pairwise(counts)]


@pytest.mark.parametrize("start", [0, 1, 2, 3])
def test_the_first_step_that_runs_computes_and_the_others_follow_their_rows(start):
    pipe = loop()
    plain = pipe(start=start, steps=6)
    assert torch.equal(under(pipe, everything(pipe, 6), pipe, start=start, steps=6), plain)
    with cached(pipe, table(pipe, 6, every=3)):
        ran = computed(pipe, start=start, steps=6)
    assert ran == [4] + [4 if k % 3 == 0 else 0 for k in range(start + 1, 6)]


@pytest.mark.parametrize("as_number", [False, True])
def test_a_run_and_a_table_may_share_only_some_timesteps_in_a_row(as_number):
    pipe = Loop(loop().transformer, DDPMScheduler())
    if as_number:
        pipe.step = lambda eps, t, x: Loop.step(pipe, eps, int(t), x)
    rows = Schedule([[1] * 4, [0] * 4] * 2, tuple(sites(pipe.transformer)), (800, 600, 400, 200))
    with cached(pipe, rows):
        assert computed(pipe, timesteps=[600, 400, 200]) == [4, 4, 0]
        with refused(r"for the 3 steps .700 … 200. .*for 4 steps .800 … 200"):
            pipe(timesteps=[700, 400, 200])
    with cached(pipe, [rows, Schedule([[1] * 4, [0] * 4], rows.sites, (600, 400))]):
        assert computed(pipe, timesteps=[900, 600, 400, 100]) == [4, 4, 0, 4]
        assert computed(pipe, timesteps=[900, 600, 400, 100], start=1) == [4, 0, 4]
        assert computed(pipe, timesteps=[800, 600, 400, 200]) == [4, 0, 4, 0]
    pipe = pipes.flux_pipe()
    names = tuple(sites(pipe.transformer))
    other = Schedule([[1] * len(names)] * 4, names, (1000.0, 750.0, 500.0, 250.0))
    with cached(pipe, other), refused("shifts its timesteps with the resolution"):
        run_embedded(pipe)


CHANGING = {
    "same": ({}, 16, 0),
    "batch": ({"batch": lambda k: 2 if k < 3 else 1}, 12, 4),  # guidance ends
    "fewer calls": ({"calls": lambda k: 2 if k < 3 else 1}, 20, 0),
    "more calls": ({"calls": lambda k: 1 if k < 3 else 2}, 24, 4),
    "a call left out": ({"calls": lambda k: 1 if k in (1, 2) else 2}, 24, 4),
}


@pytest.mark.parametrize(("change", "skipped", "beyond"), CHANGING.values(), ids=CHANGING)
def test_what_has_no_feature_of_its_shape_computes_and_is_reused_later(change, skipped, beyond):
    pipe, rows = loop(), Schedule([[k in (0, 2)] * 4 for k in range(6)])
    with torch.no_grad():
        plain = pipe(steps=6, **change)
        assert torch.equal(under(pipe, everything(pipe, 6), pipe, steps=6, **change), plain)
        with cached(pipe, rows) as session:
            pipe(steps=6, **change)
    told = session.report()
    assert (told["skipped"], sum(told["beyond"].values())) == (skipped, beyond)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("told_by", ["its text", "a part of all texts", "a flag"])
def test_the_call_that_is_left_finds_its_own_features(told_by, mode):
    """Guidance as two calls ends, and the one that is left was the second."""

    class Guided(Loop):
        def __call__(self, last=4):
            x, labels = torch.ones(1, 4, 8, 8), torch.tensor([1000, 5])
            self.scheduler.set_timesteps(4)
            texts = {"its text": labels.split(1), "a part of all texts": labels[:, None]}
            for k, t in enumerate(self.scheduler.timesteps):
                for i in (0, 1) if k < last else (1,):
                    y = texts.get(told_by, labels.clone()[:, None])[i]
                    how = {"class_labels": y, "return_dict": told_by == "a flag" and i == 1}
                    out = self.transformer(x, timestep=t[None], **how)[0][:, :4]
                self.scheduler.step(out, t, x)
            return out

    pipe = Guided(dit_transformer())
    with mode(), cached(pipe, Schedule([*[[1] * 4] * 3, [0] * 4])):
        assert torch.equal(pipe(), pipe(last=3))


def test_each_walk_takes_the_table_for_its_timesteps():
    pipe = loop()
    tables, alone = {4: table(pipe, 4), 6: table(pipe, 6, every=3)}, {}
    for steps, rows in tables.items():
        alone[steps] = under(pipe, rows, pipe, steps=steps)
    with cached(pipe, [*tables.values()]):
        for steps in (6, 4, 6):
            assert torch.equal(pipe(steps=steps), alone[steps])
        with refused(r"no table is for the 5 steps .*4 steps .*; 6 steps"):
            pipe(steps=5)
    for bad in ([], [tables[4], tables[4]], "schedule.json", {4: tables[4]}, None):
        with pytest.raises((ValueError, TypeError), match="schedule"):
            cached(pipe, bad).__enter__()
    plain = pipe(steps=5)
    with cached(pipe, [*tables.values()], otherwise="compute") as session:
        assert torch.equal(pipe(steps=5), plain)
        assert session.skipped == 0


def test_a_table_covers_both_transformers_of_a_walk():
    pipe = pipes.wan_pipe()
    pipe.register_modules(transformer_2=randomised(copy.deepcopy(pipe.transformer), 3))
    pipe.register_to_config(boundary_ratio=0.5)
    plain, n = run_embedded(pipe, 6), len(sites(pipe.transformer))
    with cached(pipe, Schedule(torch.ones(6, 2 * n))) as session:
        assert torch.equal(run_embedded(pipe, 6), plain)
        assert session.sites[n].startswith("transformer_2.blocks.0")
    with cached(pipe, Schedule([[k % 2 == 0] * 2 * n for k in range(6)])) as session:
        image = run_embedded(pipe, 6)
        assert torch.equal(run_embedded(pipe, 6), image)
    told = session.report()
    assert 1.0 < session.speedup() < 2.0
    assert told["skipped"] + sum(told["beyond"].values()) == 2 * 3 * 2 * n


class Copying(Loop):
    """Steps a copy of its scheduler for each half of the latent, as diffusion forcing does."""

    def __call__(self, seed=1, *, after=None):
        self.scheduler.set_timesteps(4)
        self.copies = [copy.deepcopy(self.scheduler) for _ in range(2)]
        return super().__call__(seed, after=after)

    def step(self, eps, t, x):
        parts = zip(self.copies, eps.chunk(2, 2), x.chunk(2, 2), strict=True)
        return torch.cat([s.step(e, t, part).prev_sample for s, e, part in parts], 2)


class Twice(Loop):
    """Steps twice a step, as Cosmos does."""

    def step(self, eps, t, x):
        self.scheduler.step(eps, t, x)
        return super().step(eps, t, x)


@pytest.mark.parametrize("kind", [Copying, Twice])
def test_copied_and_doubled_steps_are_followed(kind):
    pipe = kind(loop().transformer, DPMSolverMultistepScheduler() if kind is Copying else None)
    plain = pipe()
    assert torch.equal(under(pipe, everything(pipe), pipe), plain)
    with cached(pipe, table(pipe)):
        assert computed(pipe) == [4, 0, 4, 0]


@pytest.mark.parametrize("start", [0, 1])
def test_a_scheduler_whose_methods_somebody_has_wrapped_is_followed(start):
    pipe = loop()
    schedule = Schedule([[k != 2] * 4 for k in range(4)], tuple(sites(pipe.transformer)))
    expected = under(pipe, schedule, pipe, start=start)
    for name in ("set_timesteps", "step"):
        method = getattr(pipe.scheduler, name)
        setattr(pipe.scheduler, name, lambda *a, method=method, **kw: method(*a, **kw))
    before = dict(vars(pipe.scheduler))
    with cached(pipe, schedule) as session:
        assert torch.equal(pipe(start=start), expected)
        assert session.skipped == 4
    assert all(vars(pipe.scheduler)[name] is before[name] for name in ("set_timesteps", "step"))


COMPILED = {
    "compile": lambda parent, name, part: part.compile(),
    "forward": lambda parent, name, part: setattr(part, "forward", torch.compile(part.forward)),
    "torch.compile": lambda parent, name, part: setattr(parent, name, torch.compile(part)),
}


@pytest.mark.parametrize("part", ["transformer_blocks.1", ""])
@pytest.mark.parametrize("how", COMPILED)
def test_a_transformer_compiled_in_place_is_refused_with_what_to_do(how, part):
    if (how, part) == ("torch.compile", ""):
        part = "transformer_blocks.0"
    pipe, message = loop(), r"compiled in place.*compile its sites instead"
    rows = table(pipe)
    with cached(pipe, rows):
        pipe()
        model = pipe.transformer
        COMPILED[how](model.transformer_blocks, part[-1:], model.get_submodule(part))
        with refused(message):
            pipe()
    with refused(message):
        cached(pipe, rows).__enter__()


def test_compiled_sites_work_where_blocks_are_not_known():
    with cached(pipe := pipes.flux_pipe(), table(pipe)):
        expected = run_embedded(pipe)
        for site in sites(pipe.transformer).values():
            site.compile(backend="eager")
        assert torch.equal(run_embedded(pipe), expected)


def test_other_caches_on_the_same_transformer_are_refused_by_name_both_ways_round(monkeypatch):
    def refuses(message):
        with refused(message):
            cached(pipe, table(pipe)).__enter__()

    pipe, config = pipes.flux_pipe(), diffusers.FirstBlockCacheConfig(threshold=0.1)
    with cached(pipe, table(pipe)):
        pipe.transformer.enable_cache(config)
        with refused("another cache enabled, diffusers' FirstBlockCache"):
            run_embedded(pipe)
    refuses("FirstBlockCacheConfig")
    pipe.transformer.disable_cache()
    with cached(pipe, table(pipe)):
        run_embedded(pipe)
    diffusers.hooks.apply_first_block_cache(pipe.transformer, config)
    refuses("diffusers' hook fbc_leader")
    pipe = loop()
    monkeypatch.setattr(type(pipe), "_is_cached", True, raising=False)  # a sibling has that cache
    with cached(pipe, table(pipe)):
        pass
    pipe.transformer._is_cached = True
    refuses("cache-dit")


def test_counts_are_of_what_ran_and_a_summary_never_raises(monkeypatch, caplog, capsys):
    pipe = loop()
    modules, rows = list(sites(pipe.transformer).values()), table(pipe, 6, every=3)
    call = {"steps": 6, "batch": lambda k: 2 if k < 4 else 1}
    with cached(pipe, rows) as session:
        ran = sum(pipes.count_calls(modules, lambda: pipe(**call)))
        told = {"asked": 24, "skipped": 24 - ran, "beyond": {"nothing of these shapes was kept": 4}}
        assert told.items() <= session.report().items()
        assert session.speedup() < rows.compute.numel() / ran
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            pipe(**call)
        assert "said once" not in caplog.text  # but at the first walk
        assert "50.0%" in str(session)
    monkeypatch.setattr(session_module, "cost_of_call", lambda *_: 1 / 0)
    with cached(pipe, table(pipe)) as session:
        pipe()
        assert "2.00x" not in str(session)
        assert session.speedup() is None
    assert capsys.readouterr().out == ""


def test_a_model_saved_or_copied_while_enabled_even_in_a_walk_is_the_stock_one(tmp_path):
    pipe = loop()
    stock, copies = asked(pipe.transformer), []

    def save(k):
        torch.save(pipe.transformer, tmp_path / "model.pt")
        pipe.transformer.save_pretrained(tmp_path / "saved")
        copies.append(torch.load(tmp_path / "model.pt", weights_only=False))
        copies.append(type(pipe.transformer).from_pretrained(tmp_path / "saved"))
        copies.extend((copy.deepcopy(pipe.transformer), copy.deepcopy(pipe).transformer))
        assert "theoretical speedup" in str(session)

    with cached(pipe, table(pipe)) as session:
        image = pipe()
        assert torch.equal(pipe(after=lambda k: save(k) if k == 1 else None), image)
        save(None)
        assert all(torch.equal(asked(model.eval()), stock) for model in copies)
        loaded, copied, own = (
            asked(randomised(m, 9)) for m in (*copies[::2][:2], dit_transformer())
        )
        assert equal([loaded, copied], [own, own])  # they run their own weights
        assert not torch.equal(own, stock)


def test_features_in_host_memory_give_the_same_image_and_a_late_start_repeats_what_there_is():
    pipe = loop()
    for order in (0, 1):
        rows = Schedule(table(pipe, 6, every=3).compute, order=order)
        expected = under(pipe, rows, pipe, steps=6)
        with cached(pipe, rows, offload=True) as session:
            assert torch.equal(pipe(steps=6), expected)
            assert session.skipped == 16
    pipe, images = loop(), []
    for order in (0, 1):
        with cached(pipe, Schedule([[1] * 4] * 2 + [[0] * 4] * 2, order=order)):
            images.append(pipe(start=1))
    assert torch.equal(*images)


def test_another_scheduler_or_transformer_inside_the_with_is_followed():
    pipe = pipes.dit_pipe()
    with cached(pipe, table(pipe)) as session:
        run(pipe)
        pipe.scheduler, pipe.transformer = DDPMScheduler(), dit_transformer(7)
        torch.manual_seed(0)
        image = run(pipe)
        assert session.skipped == 16
    torch.manual_seed(0)
    assert torch.equal(under(pipe, table(pipe), run, pipe), image)
