"""The walk as one graph: keys, copying in, room and reasons on any machine; capturing itself where there is a GPU."""

import threading

import pytest
import torch
from conftest import equal, make, refused, start, with_noise
from sham import ShamDevice
from test_blocks import table
from test_every_model import loaded, small  # noqa: F401 (a fixture: every model is small)

from harmonica.inference.graph import GraphWalk, key_of
from harmonica.inference.walk import Walk


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
    walk = Walk(d, table(d))
    draw = GraphWalk(walk, capture=tape)
    noise = [start(d, seed=seed) for seed in range(3)]
    expected, images = [walk(*batch) for batch in noise], []
    for x, y in noise:
        images.append(draw(x, y))
        x.zero_(), y.zero_()  # the caller's tensors are not the graph's
    assert (tape.captured, tape.replayed, len(draw.graphs), draw.reason) == (1, 3, 1, None)
    assert equal(images, expected)  # nor overwritten by those that followed


def test_each_shape_of_noise_and_condition_has_a_graph_and_the_oldest_makes_room():
    d, tape = make(), Tape()
    draw = GraphWalk(Walk(d, table(d)), most=2, capture=tape)
    batches = {size: start(d, batch=size) for size in (1, 2, 3)}
    for size, captured in ((1, 1), (2, 2), (1, 2), (3, 3), (1, 3), (2, 4)):
        draw(*batches[size])
        assert tape.captured == captured, size
        assert len(draw.graphs) <= 2
    with refused("most is 0; it must be 1 graph or more"):
        GraphWalk(Walk(d), most=0)


def test_a_key_is_shapes_types_and_what_is_no_tensor():
    x, y = torch.zeros(2, 3), torch.zeros(2)
    same = key_of(x, {"y": y, "mode": "a"})
    assert key_of(x + 1, {"y": y + 1, "mode": "a"}) == same
    others = [key_of(x, {"y": y, "mode": "b"}), key_of(x, {"y": y[:1], "mode": "a"}), key_of(x, y)]
    assert same not in [*others, key_of(x.double(), {"y": y, "mode": "a"})]


def test_without_a_cuda_device_the_walk_runs_and_says_why():
    d, x, y = with_noise(make())
    walk = Walk(d, table(d))
    draw = GraphWalk(walk)
    assert torch.equal(draw(x, y), walk(x, y))
    assert draw.reason == "x is on cpu; graphs are for CUDA devices"
    assert len(draw.graphs) == 0


@pytest.mark.usefixtures("small")
def test_a_sampler_that_draws_noise_is_not_captured():
    for sampler in ("ddim", "dpm-solver++", "iddpm", "sa-solver"):
        d, tape, draws = loaded("pixart-alpha-256", sampler), Tape(), sampler[0] in "is"
        draw = GraphWalk(Walk(d, table(d)), capture=tape)
        draw(*start(d, 1, 0))
        assert tape.captured == (not draws)
        assert ("the sampler draws noise at every step" in (draw.reason or "")) == draws


def test_a_good_graph_stays_where_the_next_capture_fails():
    d, tape = make(), Tape()
    draw = GraphWalk(Walk(d, table(d)), most=1, capture=tape)
    draw(*start(d, batch=1))
    tape.fails = RuntimeError("no")
    draw(*start(d, batch=2))
    assert len(draw.graphs) == 1
    draw(*start(d, batch=1))
    assert (tape.captured, tape.replayed, draw.reason) == (1, 2, None)


WHY_NOT = {"waits": "capturing failed: _local_scalar_dense at test_graph", "succeeds": "None"}
WHY_NOT |= {"fails": "capturing failed: the first cause"}


@pytest.mark.parametrize("how", WHY_NOT)
@pytest.mark.usefixtures("small")
def test_a_capture_fails_with_its_first_cause_and_the_stream_is_put_back(how, monkeypatch):
    monkeypatch.setattr(threading, "active_count", lambda: 1)
    with ShamDevice() as device:
        d = loaded("dit-xl", device="cuda")
        walk, batch = Walk(d, table(d)), start(d, 2, 0)
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


def test_a_capture_that_fails_falls_back_and_is_not_tried_again_but_for_memory():
    d, x, y = with_noise(make())
    walk = Walk(d, table(d))
    for error in (RuntimeError("not permitted\nmore"), torch.OutOfMemoryError("no room")):
        tape = Tape(error)
        draw = GraphWalk(walk, capture=tape)
        assert torch.equal(draw(x, y), walk(x, y))
        assert draw.reason == f"capturing failed: {str(error).splitlines()[0]}"
        tape.fails = None
        draw(x, y)
        assert tape.captured == isinstance(error, torch.OutOfMemoryError)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "name", ["tiny", "dit-xl", "pixart-alpha-256", "pixart-alpha-1024", "uvit-h"]
)
@pytest.mark.parametrize("sampler", ["ddim", "dpm-solver++"])
@pytest.mark.usefixtures("small")
def test_a_replayed_graph_is_the_eager_walk_bit_for_bit(name, sampler):
    d = loaded(name, sampler, device="cuda")
    walk = Walk(d, table(d))
    draw = GraphWalk(walk)
    for seed in range(3):
        x, cond = start(d, 2, seed)
        assert torch.equal(draw(x, cond), walk(x, cond))
        assert draw.reason is None
