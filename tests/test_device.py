"""On a device that is not the CPU: nothing waits that need not, and everything gives the CPU's numbers.

The device is a sham (tests/sham.py), so these laws hold, or fail, on any machine.
"""

from contextlib import nullcontext
from dataclasses import replace
from functools import cache, partial
from importlib import import_module
from pipes import WALKS, dit_pipe, pixart_pipe, run, stock_dit, vae, walked
from types import SimpleNamespace

import pytest
import rivals
import torch
from conftest import seeded, start, with_noise
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from sham import Sham, ShamDevice
from small import loaded, random_table
from smoothcache import smoothcache
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map_only

from harmonica import Router, Schedule, fused_sum, image_error, macs, sample, sdt, train_sdt
from harmonica.command_line import dtype_of
from harmonica.forecast import weighted_sum
from harmonica.inference.timing import milliseconds
from harmonica.inference.walk import Walk
from harmonica.models import autoencoder, load
from harmonica.models.pipelines import cached, denoiser, from_pipeline
from harmonica.models.sites import sites
from harmonica.search import baselines
from harmonica.search.flip_effects import flip_effects_at
from harmonica.search.learn import learn_in_turn
from harmonica.search.references import Pool, references
from harmonica.search.target import Target

pytestmark = pytest.mark.usefixtures("small_models", "few_noises")

STOCK = {"dit": dit_pipe, "alpha": pixart_pipe, "sigma": partial(pixart_pipe, "Sigma")}
MODELS = ["tiny", "dit-xl", "pixart-alpha-256", "pixart-alpha-1024", "uvit-h"]


@pytest.fixture
def device():
    with ShamDevice() as device:
        yield device


def ordered(d, order=0):
    return replace(random_table(d), order=order)


WAYS = {
    "plain": lambda d: lambda x, cond: sample(d, x, cond),
    "cached": lambda d: lambda x, cond: sample(d, x, cond, ordered(d)),
    "first order": lambda d: lambda x, cond: sample(d, x, cond, ordered(d, 1)),
    "second order": lambda d: lambda x, cond: sample(d, x, cond, ordered(d, 2)),
    "Walk": lambda d: Walk(d, ordered(d)),
    "exact Walk": lambda d: Walk(d, ordered(d), exact=True),
    "Walk of order 1": lambda d: Walk(d, ordered(d, 1)),
}


@pytest.mark.parametrize("sampler", ["ddim", "dpm-solver++"])
@pytest.mark.parametrize("name", [*MODELS, "stock DiT"])
def test_a_deterministic_walk_waits_for_nothing_and_gives_the_cpus_image(name, sampler):
    stock = name == "stock DiT"
    with sdpa_kernel(SDPBackend.MATH):
        d, x, cond = with_noise(stock_dit() if stock else loaded(name, sampler), 2, 0)
        expected = {way: make(d)(x, cond) for way, make in WAYS.items()}
    with ShamDevice() as device:
        d = stock_dit() if stock else loaded(name, sampler, device="cuda")
        d.model.to("cuda")
        x, cond = start(d, 2, 0)
        for way, make in WAYS.items():
            walk = make(d)
            with device.watched(strict=True):
                image = walk(x, cond)
            assert image.is_cuda
            torch.testing.assert_close(image.held, expected[way], rtol=1e-5, atol=1e-6, msg=way)


@pytest.mark.parametrize("name", STOCK)
def test_under_a_schedule_a_pipelines_walk_waits_no_more_than_alone(name, device):
    pipe = STOCK[name]().to("cuda")
    names = tuple(sites(pipe.transformer))
    rows = torch.rand(4, len(names), generator=seeded(0)) > 0.5
    rows[0] = True
    with device.watched() as waits:
        run(pipe)
        plain = waits.total()
    with cached(pipe, Schedule(rows, sites=names)):
        with device.watched() as waits:
            run(pipe)
        assert waits.total() <= plain, waits


@pytest.mark.parametrize("name", ["dit", "pixart", "flux", "wan"])
def test_a_denoiser_of_a_pipeline_waits_no_more_than_a_run_of_it_at_every_step(name, monkeypatch):
    """Each of its predictions runs the pipeline's own code, which waits; under a schedule nothing is added."""

    def prepared(place):
        make, arguments = WALKS[name]
        pipe = make().to(place)
        arguments = tree_map_only(torch.Tensor, lambda tensor: tensor.to(place), arguments)
        d = from_pipeline(pipe, steps=3, **arguments)
        return pipe, d, Schedule([[k != 1] * len(d.sites) for k in range(3)], tuple(d.sites))

    with sdpa_kernel(SDPBackend.MATH):
        _, d, schedule = prepared("cpu")
        expected = sample(d, *start(d, 1, 0), schedule)
    # The sham device is a dispatch mode itself; a real one stays when dispatch modes are left.
    monkeypatch.setattr(denoiser, "without_modes", lambda: nullcontext(()))
    with ShamDevice() as device:
        pipe, d, schedule = prepared("cuda")
        x, cond = start(d, 1, 0)
        with device.watched() as waits:
            walked(pipe, d.inputs.of([tuple(c) for c in cond.tolist()]))
            most = d.steps * waits.total()
        for table in (None, schedule):
            with device.watched() as waits:
                image = sample(d, x, cond, table)
            assert waits.total() <= most, waits
    torch.testing.assert_close(image.held, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["dit-xl", "pixart-alpha-1024", "uvit-h"])
def test_random_weights_are_drawn_on_the_device(name, device):
    with device.watched() as waits:
        model = load(name, weights="random", device="cuda").model
    assert all(parameter.is_cuda for parameter in model.parameters())
    copies = [line for line in waits if "copy" in line]
    assert all("pixart.py" in line for line in copies), copies  # prompts


@pytest.mark.parametrize("name", ["dit-xl", "pixart-alpha-256"])
def test_an_update_waits_five_times_at_most_and_lambda_once_a_prediction(name, device):
    d = loaded(name, device="cuda")
    router = Router(d.steps, d.sites, generator=seeded(0)).to("cuda")
    x, cond = start(d, 2, 0)
    with device.watched() as waits:
        image_error(d, router(), x, cond)
    assert waits.total() <= d.steps * (d.steps + 1) // 2, waits
    with device.watched() as waits:
        updates = list(sdt(d, router, [(x, cond)], proxy=None))
    assert waits.total() <= 5 * len(updates), waits


def trained(place, name="dit-xl", **settings):
    d = loaded(name, steps=3, device=place, activation_checkpointing=settings.pop("again", False))
    how = {"iterations": 5, "batch_size": 2, "lr": 0.1, "refresh_every": 1, "progress": False}
    return train_sdt(d, **how | settings).logits


REFINED = {"target_speedup": 1.3, "budget": 2000, "batch_size": 4, "iterations": 2}
SETTINGS = [{}, {"proxy": None}, {"proxy": "telescoping"}, {"again": True}, {"name": "uvit-h"}]
SETTINGS += [{"name": "pixart-alpha-256"}, {"target_speedup": 1.3, "budget": 0}]
SETTINGS += [{"target_cur": 0.3, "budget": 0}, REFINED, REFINED | {"order": 1}]
SETTINGS += [REFINED | {"toward": "reference"}]


def resumed(place, out):
    how = {"target_speedup": 1.3, "budget": 0, "checkpoint": out / f"{place}.safetensors"}
    trained(place, iterations=3, **how)
    return trained(place, iterations=5, resume=True, **how)


L2C = {"speedup": 1.1, "updates": 4, "batch_size": 2}
BASELINES = {
    "FORA": lambda d, x, y: baselines.every(d, speedup=1.5),
    "SmoothCache": lambda d, x, y: smoothcache(d, x, y, speedup=1.5),
    "delta-DiT": lambda d, x, y: rivals.delta_dit(d, speedup=1.2),
    "L2C": lambda d, x, y: rivals.learning_to_cache(d, x, y, **L2C),
    "path": lambda d, x, y: baselines.dynamic_programming(d, x, y, speedup=1.5),
    "greedy": lambda d, x, y: rivals.greedy(d, x, y, speedup=1.5, budget=400),
    "chance": lambda d, x, y: rivals.random_table(d, speedup=1.5, generator=seeded(0)),
}


def baseline(name, place):
    d, x, y = with_noise(loaded("dit-xl", steps=3, device=place), 2, 0)
    return BASELINES[name](d, x, y).compute


def flip_effects(place, order=0):
    d, x, y = with_noise(loaded("dit-xl", steps=3, device=place), 2, 0)
    model = flip_effects_at(d, ordered(d, order), Pool(x, y, sample(d, x, y)), torch.ones_like(x))
    return model.gradient, model.curvature


def learned_in_turn(place, out):
    d = loaded("dit-xl", steps=3, device=place)
    pool = references(d, noises=4, factor=2, generator=seeded(1))
    first, target = baselines.every(d, speedup=1.5), Target(1.3, macs(d), 3)
    last = learn_in_turn(d, first, pool, target, turns=1, iterations=2, batch_size=2)
    return last.compute, last.weights


WORK = {f"training {s}": lambda place, _, s=s: trained(place, **s) for s in SETTINGS}
WORK |= {name: lambda place, _, name=name: baseline(name, place) for name in BASELINES}
WORK |= {f"flips, order {n}": lambda place, _, n=n: flip_effects(place, n) for n in (0, 1)}
WORK |= {"resuming": resumed, "table and weights in turn": learned_in_turn}


@pytest.mark.parametrize("name", WORK)
def test_training_and_search_give_the_cpus_numbers(name, tmp_path):
    with sdpa_kernel(SDPBackend.MATH):  # the kernel that the sham device has
        expected = tree_leaves(WORK[name]("cpu", tmp_path))
    with ShamDevice():
        leaves = tree_leaves(WORK[name]("cuda", tmp_path))
    result = [leaf.held if isinstance(leaf, Sham) else leaf for leaf in leaves]
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-7)


def test_milliseconds_are_measured_on_the_device(device):
    measured = milliseconds(loaded("dit-xl", device="cuda"), 2, repeats=1)
    assert bool((measured.sites > 0).all())
    assert measured.rest > 0


TRAIN = "--steps 3 --iterations 2 --batch-size 2"
COMMANDS = {
    "train": ("train", f"--model tiny {TRAIN}"),
    "train to a target": ("train", f"{TRAIN} --target 1.3 --budget 0"),
    "demo": ("demo", "--steps 3 --iterations 2 --images 2"),
    "image_sets": ("image_sets", "--model tiny --steps 3 --count 4 --batch-size 2"),
}


def command(name, place, out):
    """Return the exit code of a command that runs on a device and writes to a folder."""
    module, options = COMMANDS[name]
    options = [*options.split(), "--device", place, "--out", str(out)]
    return import_module(f"harmonica.{module}").main(options)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_runs_on_the_device(name, tmp_path, capsys, monkeypatch, short_demo):
    # Whether it fits is counted on meta tensors, which the sham device cannot have beside its own.
    fits = SimpleNamespace(check=lambda *_, **__: None)
    monkeypatch.setattr("harmonica.train.needs", lambda args: fits)
    monkeypatch.setattr("harmonica.demo.POOL", 8)
    with ShamDevice():
        code = command(name, "cuda", tmp_path / "out")
    assert (code, capsys.readouterr().err) == (0, "")


TYPES = {"--device cuda": "bfloat16", "--device cuda:1 --dtype float32": "float32", "": "float32"}


@pytest.mark.parametrize(("options", "expected"), TYPES.items())
def test_weights_are_bfloat16_on_cuda_unless_the_command_line_names_a_type(options, expected):
    args = import_module("harmonica.train").parser().parse_args(options.split())
    assert dtype_of(args, args.device) == getattr(torch, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_latents_decoded_a_few_at_a_time_are_those_of_one_at_a_time(dtype, tmp_path, monkeypatch):
    vae().save_pretrained(tmp_path)
    half = dtype == torch.bfloat16  # float16 overflows there: it is float32
    monkeypatch.setattr(autoencoder, "ROOM", 5 * 3 * 2 * 64**2 * (2 if half else 4))
    run, x, sizes = AutoencoderKL.decode, torch.randn(5, 4, 8, 8, generator=seeded(0)), []
    noted = lambda self, z: sizes.append(len(z)) or run(self, z)  # noqa: E731
    monkeypatch.setattr(AutoencoderKL, "decode", noted)
    decode = autoencoder.decoder("dit-xl", vae=tmp_path, dtype=dtype)
    images = decode(x)
    assert (sizes, images.dtype) == ([2, 2, 1], torch.float32)
    alone = torch.cat([decode(one[None]) for one in x])
    torch.testing.assert_close(images, alone, atol=0.05 if half else 1e-5, rtol=0)


def test_whatever_is_reduced_over_processes_lies_on_the_device(monkeypatch, device):
    """Two processes that have drawn the same: a sum is twice what one has."""
    reduced = []
    fakes = {"is_available": True, "is_initialized": True, "get_rank": 0, "get_world_size": 2}
    fakes["barrier"] = None
    for name, value in {**fakes, "get_backend": "nccl", "broadcast_object_list": None}.items():
        monkeypatch.setattr(torch.distributed, name, lambda *_, value=value: value)
    note = lambda tensor: reduced.append((tensor.device.type, tuple(tensor.shape)))  # noqa: E731
    all_reduce = lambda tensor: note(tensor) or tensor.mul_(2)  # noqa: E731
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    trained("cuda", **REFINED)
    assert {place for place, _ in reduced} == {"cuda"}
    # λ, what an update tells, gradients of scores, errors of runs and of tables, effects of flips
    assert {shape for _, shape in reduced} == {(3,), (2,), (4,), (3, 3), (), (8,), (8, 8)}


def lambda_of(place, _):
    d = loaded("tiny", device=place)
    router = Router(d.steps, d.sites, generator=seeded(0)).to(place)
    return image_error(d, router(), *start(d, 2, 0))


ON_A_CARD = {
    "lambda": lambda_of,
    "training": lambda place, out: trained(place, iterations=1),
    "training to a target": lambda place, out: trained(place, target_speedup=1.3, budget=0).shape,
    "refinement": lambda place, out: trained(place, **REFINED).shape,
    "effects of flips": lambda place, out: flip_effects(place),
    "image sets": lambda place, out: command("image_sets", place, out / place),
    "milliseconds": lambda place, out: milliseconds(loaded("dit-xl", device=place), 2).sites > 0,
}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ON_A_CARD)
def test_a_real_card_gives_the_cpus_numbers_to_rounding(name, tmp_path):
    result, expected = (tree_leaves(ON_A_CARD[name](place, tmp_path)) for place in ("cuda", "cpu"))
    result = [leaf.cpu() if isinstance(leaf, torch.Tensor) else leaf for leaf in result]
    torch.testing.assert_close(result, expected, rtol=1e-2, atol=1e-3)


def test_a_triton_that_fails_is_said_once_and_left_aside(monkeypatch, device):
    def fails(*_):
        raise RuntimeError("no C compiler")

    for name, value in {"triton": True, "fused_sum": fails, "_alike": lambda _: True}.items():
        monkeypatch.setattr(fused_sum, name, value)  # a sham tensor is no plain one
    monkeypatch.setattr(fused_sum, "_works", cache(fused_sum._works.__wrapped__))
    terms = [torch.ones(2).to("cuda")] * 2
    with pytest.warns(UserWarning, match="term by term: .*no C compiler") as said:
        sums = [weighted_sum([2.0, 1.0], terms, fused=True) for _ in range(2)]
    assert [each.cpu().tolist() for each in sums] == [[3.0, 3.0]] * 2
    assert len(said) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
def test_a_fused_sum_of_four_terms_rounds_once(kind):
    """More terms, and terms that are not contiguous, round after each part."""
    pytest.importorskip("triton")
    terms = torch.randn(6, 3, 5, 7, generator=seeded(0)).to("cuda", kind)
    weights = [0.9, -0.4, 1.5, 0.01, 1.0, 0.3]
    for several in (terms, terms.transpose(1, 3)):
        for n in range(1, 7):
            assert fused_sum._works(terms.device, kind)
            pairs = list(zip(weights[:n], several.unbind(), strict=False))
            exact = sum(w * term.double() for w, term in pairs).to(kind)
            often = {"rtol": 0.02, "atol": 0.05} if n > 4 or several is not terms else {}
            with torch.no_grad():
                result = weighted_sum(weights[:n], [term for _, term in pairs], fused=True)
            torch.testing.assert_close(result, exact, **often)
