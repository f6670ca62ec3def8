"""The fast walk: the images of the plain one, less work, nothing left behind; and as one graph."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pipes import count_calls, randomised
from types import SimpleNamespace

import pytest
import torch
from conftest import attributes, equal, make, raising, refused, seeds, start, tables, with_noise
from hypothesis import given
from sham import ShamDevice
from small import MADE, in_double, loaded, random_table
from torch import nn

from harmonica import Macs, Schedule, sample, train_sdt
from harmonica.inference.graph import GraphWalk, key_of
from harmonica.inference.timing import milliseconds
from harmonica.inference.walk import Accelerated, Walk
from harmonica.models import MODELS, load, precompute
from harmonica.samplers import SAMPLERS


def relative(a, b):
    return float((a - b).norm() / b.norm())


@given(tables(), seeds)
def test_an_exact_walk_is_sample_bit_for_bit_and_another_to_rounding(schedule, seed):
    d, x, y = with_noise(make(), seed=seed)
    plain = sample(d, x, y, schedule)
    assert torch.equal(Walk(d, schedule, exact=True)(x, y), plain)
    assert relative(Walk(d, schedule)(x, y), plain) < 1e-11


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.usefixtures("small_models")
def test_every_model_under_every_sampler(name, sampler):
    d, x, cond = with_noise(in_double(loaded(name, sampler)), 2, 0)
    schedule = random_table(d)
    plain = sample(d, x, cond, schedule)
    assert torch.equal(Walk(d, schedule, exact=True)(x, cond), plain)
    assert relative(Walk(d, schedule)(x, cond), plain) < 1e-9
    assert relative(Walk(d)(x, cond), sample(d, x, cond)) < 1e-9


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_the_bundled_model_agrees_to_the_rounding_of_its_type(dtype, rounding):
    d, x, y = with_noise(load("tiny", dtype=dtype), 16, 0)
    for rows in (random_table(d, seed=seed) for seed in range(3)):
        plain = sample(d, x, y, rows)
        assert relative(Walk(d, rows)(x, y), plain) < rounding
        assert torch.equal(Walk(d, rows, exact=True)(x, y), plain)


@pytest.mark.parametrize("name", MADE)
def test_nothing_is_left_on_the_model_exception_or_not(name):
    d, x, cond = with_noise(MADE[name](), 1, 0)
    before, step = attributes(d.model), d.step
    Walk(d, random_table(d))(x, cond)
    assert attributes(d.model) == before
    broken = raising(RuntimeError("broken"))
    d.step = lambda x, out, k, memory: (broken if k == 2 else step)(x, out, k, memory)
    with pytest.raises(RuntimeError, match="broken"):
        Walk(d, random_table(d))(x, cond)
    assert attributes(d.model) == before


@pytest.mark.parametrize("name", MADE)
def test_a_walk_remembers_nothing_of_the_one_before_and_sees_weights_changed_since(name):
    d = in_double(MADE[name]())
    walk = Walk(d, random_table(d))
    first, second = (start(d, b, b) for b in (3, 2))
    walk(*first)
    assert torch.equal(walk(*second), Walk(d, random_table(d))(*second))
    randomised(d.model, seed=9)
    assert relative(walk(*second), sample(d, *second, random_table(d))) < 1e-9


def test_modulations_of_all_steps_are_one_product_per_block_or_of_as_many_as_fit(monkeypatch):
    d, x, y = with_noise(make(5))
    linears = [block.adaLN_modulation[1] for block in (*d.model.blocks, d.model.final_layer)]
    assert count_calls(linears, lambda: sample(d, x, y)) == [5, 5, 5]
    assert count_calls(linears, lambda: Walk(d)(x, y)) == [1, 1, 1]
    assert count_calls(linears, lambda: Walk(d, exact=True)(x, y)) == [5, 5, 5]
    assert count_calls([d.model.t_embedder, d.model.y_embedder], lambda: Walk(d)(x, y)) == [1, 1]
    for steps, products in ((2, 3), (1, 5), (5, 1), (4, 2)):
        monkeypatch.setattr(precompute, "rows_that_fit", lambda *_, steps=steps: steps * 4)
        assert count_calls(linears, lambda: Walk(d)(x, y)) == [products] * 3
        assert relative(Walk(d)(x, y), sample(d, x, y)) < 1e-11


def test_the_text_is_projected_once_a_walk():
    d, x, cond = with_noise(MADE["pixart"](), 2, 0)
    blocks = d.model.transformer_blocks
    text = [layer for block in blocks for layer in (block.attn2.to_k, block.attn2.to_v)]
    text.append(d.model.caption_projection)
    assert count_calls(text, lambda: sample(d, x, cond)) == [4] * 5
    assert count_calls(text, lambda: Walk(d, exact=True)(x, cond)) == [1] * 5


def test_what_is_unknown_walks_by_overriding_sites_and_has_nothing_ahead():
    inner, members = make(), ("steps", "sites", "about", "predict", "step", "draw")
    d = SimpleNamespace(**{name: getattr(inner, name) for name in members})
    d, x, y = with_noise(d)
    assert not isinstance(d, Accelerated)
    assert torch.equal(Walk(d, random_table(d))(x, y), sample(d, x, y, random_table(d)))
    with precompute.precomputed(model := nn.Linear(2, 2), (1.0,), exact=False):
        assert "forward" not in vars(model)
    with refused("this schedule has 2 steps"):
        Walk(make(), Schedule([[1] * 4, [0] * 4]))


def slowed(function, seconds):
    def slow(*args, **kwargs):
        time.sleep(seconds)
        return function(*args, **kwargs)

    return slow


def test_milliseconds_are_the_sites_own_and_the_rest_is_what_no_schedule_saves(monkeypatch):
    d = make()
    slow = d.sites["blocks.1.attn"]
    monkeypatch.setattr(slow, "forward", slowed(slow.forward, 0.02))
    monkeypatch.setattr(d.sampler, "step", slowed(d.sampler.step, 0.06))
    found, site = milliseconds(d, 2, repeats=3), list(d.sites).index("blocks.1.attn")
    assert 20 <= found.sites[site] < 40
    assert 60 <= found.rest < 79  # not the slow site as well
    assert all(0 < float(each) < 20 for i, each in enumerate(found.sites) if i != site)
    without = Schedule([[True] * 4] + [[i != site for i in range(4)]] * 3)
    assert 1.1 < without.speedup(found) < 1.4  # 80 + … a step, or 60 + … in three of four


def test_a_table_lands_on_a_target_in_milliseconds_of_something():
    d = make(dtype=torch.float32)
    cost = Macs(torch.tensor([1.0, 5.0, 1.0, 1.0], dtype=torch.float64), 2.0)
    how = {"iterations": 12, "batch_size": 2, "lr": 0.2, "budget": 0, "progress": False}
    assert train_sdt(d, target_speedup=1.5, cost=cost, **how).schedule(0.1).speedup(cost) >= 1.5
    for bad in ({"batch_size": 0}, {"repeats": 0}):
        with refused("expected a whole number, 1 or more"):
            milliseconds(make(), **bad)


class Tape:
    """Captures by keeping the function, and replays by running it into the same output tensor."""

    def __init__(self, fails: Exception | None = None):
        self.captured, self.replayed, self.fails = 0, 0, fails

    def __call__(self, run, device):
        if self.fails:
            raise self.fails
        self.captured += 1
        output = run()

        def replay():
            self.replayed += 1
            output.copy_(run())

        return replay, output


def test_a_graph_is_captured_once_and_every_batch_is_copied_in():
    d, tape = make(), Tape()
    walk = Walk(d, random_table(d))
    draw, noise = GraphWalk(walk, capture=tape), [start(d, seed=seed) for seed in range(3)]
    expected, images = [walk(*batch) for batch in noise], []
    for x, y in noise:
        images.append(draw(x, y))
        x.zero_(), y.zero_()  # the caller's tensors are not the graph's
    assert (tape.captured, tape.replayed, len(draw.graphs), draw.reason) == (1, 3, 1, None)
    assert equal(images, expected)  # nor overwritten by those that followed


def test_threads_that_draw_from_one_graph_take_turns():
    d = make()
    walk = Walk(d, random_table(d))
    draw, noise = GraphWalk(walk, capture=Tape()), [start(d, seed=seed) for seed in range(8)]
    expected = [walk(*batch) for batch in noise]
    with ThreadPoolExecutor(4) as threads:
        for _ in range(5):
            images = list(threads.map(lambda batch: draw(*batch), noise))
            assert equal(images, expected)


def test_each_shape_of_noise_and_condition_has_a_graph_and_the_oldest_makes_room():
    d, tape = make(), Tape()
    draw = GraphWalk(Walk(d, random_table(d)), most=2, capture=tape)
    batches = {size: start(d, batch=size) for size in (1, 2, 3)}
    for size, captured in ((1, 1), (2, 2), (1, 2), (3, 3), (1, 3), (2, 4)):
        draw(*batches[size])
        assert tape.captured == captured, size
        assert len(draw.graphs) <= 2
    with refused("most is 0"):
        GraphWalk(Walk(d), most=0)


def test_a_key_is_shapes_types_and_what_is_no_tensor():
    x, y = torch.zeros(2, 3), torch.zeros(2)
    same = key_of(x, {"y": y, "mode": "a"})
    assert key_of(x + 1, {"y": y + 1, "mode": "a"}) == same
    others = [key_of(x, {"y": y, "mode": "b"}), key_of(x, {"y": y[:1], "mode": "a"}), key_of(x, y)]
    assert same not in [*others, key_of(x.double(), {"y": y, "mode": "a"})]


@pytest.mark.usefixtures("small_models")
def test_a_sampler_that_draws_noise_is_not_captured():
    for sampler in ("ddim", "dpm-solver++", "iddpm", "sa-solver"):
        d, tape, draws = loaded("pixart-alpha-256", sampler), Tape(), sampler[0] in "is"
        draw = GraphWalk(Walk(d, random_table(d)), capture=tape)
        draw(*start(d, 1, 0))
        assert tape.captured == (not draws)
        assert ("the sampler draws noise at every step" in (draw.reason or "")) == draws


WHY_NOT = {"waits": "capturing failed: _local_scalar_dense at test_walk", "succeeds": "None"}
WHY_NOT |= {"fails": "capturing failed: the first cause"}


@pytest.mark.parametrize("how", WHY_NOT)
@pytest.mark.usefixtures("small_models")
def test_a_capture_fails_with_its_first_cause_and_the_stream_is_put_back(how, monkeypatch):
    monkeypatch.setattr(threading, "active_count", lambda: 1)
    with ShamDevice() as device:
        d = loaded("dit-xl", device="cuda")
        walk, batch = Walk(d, random_table(d)), start(d, 2, 0)
        step, capture = d.step, torch.cuda.graph.return_value
        if how == "fails":
            capture.__enter__.side_effect = RuntimeError("the first cause")
            capture.__exit__.side_effect = RuntimeError("what follows from it")
        if how == "waits":
            d.step = lambda x, *rest: step(x + float(x.mean()) * 0, *rest)
        draw = GraphWalk(walk)
        assert torch.equal(draw(*batch).held, walk(*batch).held)
        assert not device.strict
        assert torch.cuda.CUDAGraph.called == (how != "waits")  # refused before it is captured
        assert torch.cuda.set_stream.call_args.args == (torch.cuda.current_stream(),)
        assert torch.cuda.device.call_args.args == (batch[0].device,)
    assert str(draw.reason).startswith(WHY_NOT[how])
    assert len(draw.graphs) == (how == "succeeds")


def test_a_capture_that_fails_falls_back_and_keeps_good_graphs_and_is_tried_again_for_memory():
    d, tape = make(), Tape()
    walk = Walk(d, random_table(d))
    cpu, draw = GraphWalk(walk), GraphWalk(walk, most=1, capture=tape)
    assert torch.equal(cpu(*start(d)), walk(*start(d)))
    assert cpu.reason == "x is on cpu; graphs are for CUDA devices"
    draw(*start(d, batch=1))
    errors = {2: RuntimeError("not permitted\nmore"), 3: torch.OutOfMemoryError("no")}
    for batch, error in errors.items():
        tape.fails = error
        assert torch.equal(draw(*start(d, batch)), walk(*start(d, batch)))
        assert draw.reason == f"capturing failed: {str(error).splitlines()[0]}"
        tape.fails = None
        draw(*start(d, batch=1))  # its graph is still there
        assert (tape.captured, draw.reason) == (1, None)
        draw(*start(d, batch))
        assert tape.captured == 1 + isinstance(error, torch.OutOfMemoryError)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["tiny", "dit-xl-512", "pixart-alpha-256", "uvit-h"])
@pytest.mark.parametrize("sampler", ["ddim", "dpm-solver++"])
@pytest.mark.parametrize("order", [0, 2])
@pytest.mark.usefixtures("small_models")
def test_a_replayed_graph_is_the_eager_walk_bit_for_bit(name, sampler, order):
    d = loaded(name, sampler, device="cuda")
    walk = Walk(d, replace(random_table(d), order=order))
    draw = GraphWalk(walk)
    for seed in range(3):
        x, cond = start(d, 2, seed)
        assert torch.equal(draw(x, cond), walk(x, cond))
        assert draw.reason is None
