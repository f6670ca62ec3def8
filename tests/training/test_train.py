"""train_sdt: progress, checkpoints, resuming, stopping, and what it will take, counted before."""

import copy
import math
import subprocess
import time
from pathlib import Path

import pytest
import torch
from conftest import counted, make, press_ctrl_c, raising, refused, seeded, single, start, started

from harmonica import Router, Schedule, macs, references, sdt, train, train_sdt
from harmonica.models import load
from harmonica.models.dit import DiT, DiTDenoiser
from harmonica.samplers import DDIM
from harmonica.sdt import BETA
from harmonica.search.flip_effects import flip_effects_at
from harmonica.search.references import pool_errors, with_images
from harmonica.storage.files import exclusive_lock, read_tensors, write_tensors
from harmonica.training.checkpoint import Checkpoint
from harmonica.training.dry_run import DryRun, dry_run, metered

QUICK = {"batch_size": 2, "beta": 1e-4, "lr": 0.05, "refresh_every": 2, "progress": False}


def router_of(d, iterations, **more):
    return train_sdt(d, iterations=iterations, **{**QUICK, **more})


@pytest.mark.parametrize("stop", [1, 3, 4, 6, 7, 11])
def test_a_resumed_router_is_the_uninterrupted_one_bit_for_bit(tmp_path, stop):
    whole, path = router_of(single(), 12), tmp_path / "checkpoint"
    router_of(single(), stop, checkpoint=path)
    assert torch.equal(router_of(single(), 12, checkpoint=path, resume=True).logits, whole.logits)
    assert torch.equal(Router.load(path).logits, whole.logits)


def test_iterations_are_updates_and_stop_everything():
    d = single()
    moved = router_of(d, 2, proxy=None)  # in the middle of the first trajectory of three updates
    fresh = Router(4, d.sites, generator=seeded(0))
    assert (moved.logits == fresh.logits).all(1).tolist() == [False, False, True]


def test_training_repeats_itself_and_follows_its_generator_and_not_torchs_own():
    d, before = single(), torch.get_rng_state()
    one, two, other = (router_of(d, 6, generator=seeded(seed)).logits for seed in (0, 0, 1))
    assert torch.equal(one, router_of(d, 6).logits)
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("proxy", ["leave-one-out", "telescoping"])
def test_no_batch_repeats_whatever_lambda_does(proxy):
    d, drawn = single(), []
    draw = d.draw
    d.draw = lambda batch, generator: drawn.append(draw(batch, generator)) or drawn[-1]
    router_of(d, 24, proxy=proxy)
    flat = torch.stack([x for x, _ in drawn if len(x) == 2]).flatten(1)
    assert len(torch.unique(flat, dim=0)) == len(flat) == 8


def test_a_checkpoint_is_written_every_so_often(tmp_path, monkeypatch):
    writes, write = [], Checkpoint.write

    def watched(self):
        write(self)
        writes.append(read_tensors(self.path)[1]["updates"])

    monkeypatch.setattr(Checkpoint, "write", watched)
    router_of(single(), 12, checkpoint=tmp_path / "c", checkpoint_every=5)
    assert writes == [6, 12, 12]  # at the first start of a trajectory after 5, and at the end


def test_a_checkpoint_is_not_overwritten_and_only_continued_by_the_same_run(tmp_path):
    d, path = single(), tmp_path / "c"
    again = lambda d=d, **more: router_of(d, 6, checkpoint=path, resume=True, **more)  # noqa: E731
    with pytest.raises(FileNotFoundError, match="no such file"):
        again()
    with refused("resume is True without a checkpoint; name the file"):
        router_of(d, 3, resume=True)
    with pytest.raises(FileExistsError, match="is a folder; name a file in it"):
        router_of(d, 3, checkpoint=tmp_path)
    locked = pytest.raises(BlockingIOError, match="c is being written to by another")
    with exclusive_lock(path), locked:
        router_of(d, 3, checkpoint=path)
    router_of(d, 3, checkpoint=path)
    with pytest.raises(FileExistsError, match="resume=True continues it"):
        router_of(d, 3, checkpoint=path)
    assert list(tmp_path.iterdir()) == [path]  # no lock is left, and no half-written file
    with refused(r"trained with other settings \(weights"):
        again(single(seed=1))
    with refused(r"other settings \(beta 0.0001 -> 0.1\)"):
        again(beta=0.1)
    with refused("guidance 1.5 -> 4.0"):
        again(single(guidance=4.0))
    with refused("steps 4 -> 5"):
        again(single(5))
    tensors, facts = read_tensors(path)
    for broken in ({"state.lam": torch.ones(9)}, facts), ({}, {**facts, "updates": None}):
        write_tensors(path, {**tensors, **broken[0]}, broken[1])
        with refused("is a damaged checkpoint"):
            again()
    Router(4, d.sites).save(path)
    with refused("without the state of its training"):
        again()


def test_settings_that_make_no_sense_are_refused_before_training():
    counts, nan = (0, -1, True, 2.0, "2", None, math.inf), math.nan
    counted = ("iterations", "batch_size", "checkpoint_every", "refresh_every")
    wrong = {"tau": (1, nan, "0.1"), "beta": (-1, nan, math.inf, "1", None), "budget": (-1, "2")}
    wrong |= {"order": (-1, True, 1.0, None), "target_cur": (1, nan, "0.5")}
    wrong |= {"lr": (0, -1, nan, True), "target_speedup": (0, nan, math.inf, True, "2")}
    for option, values in (wrong | dict.fromkeys(counted, counts)).items():
        for value in values:
            with refused(f"{option.removesuffix('_speedup')}.* is {value!r}"):
                train_sdt(make(), **{"iterations": 3, "batch_size": 2, option: value})
    for options in ({}, {"target_speedup": 1.5}):
        with pytest.raises(TypeError, match=r"Linear is no Denoiser, it lacks steps, sites, about"):
            train_sdt(torch.nn.Linear(1, 1), **options)
    with refused("1 step, which always computes"):
        train_sdt(make(1))
    with refused("give target_speedup as well"):
        train_sdt(make(), iterations=3, **QUICK, toward="reference")
    with refused("toward is 'images'"):
        train_sdt(make(), iterations=3, **QUICK, toward="images")


def test_half_precision_weights_train_a_float32_router_on_the_error_of_float32_weights():
    half, wide, mse = make(dtype=torch.bfloat16), single(), []
    wide.model.load_state_dict(half.model.state_dict())
    for d in (half, wide):
        router, (x, y) = Router(d.steps, d.sites, generator=seeded(0)), d.draw(2, seeded(0))
        mse.append(next(sdt(d, router, [(x.float(), y)], proxy=None)).mse)
        assert router.rows[0].grad.dtype == torch.float32
        assert router.rows[0].grad.isfinite().all()
    assert mse[0] == pytest.approx(mse[1], rel=0.1)


SCRIPT = """
import signal, sys; sys.path.insert(0, {tests!r})
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell hands its children a deaf ear
from conftest import make
from harmonica import train_sdt
import torch
try:
    train_sdt(make(20, dtype=torch.float32), iterations=10**6, batch_size=2, checkpoint={path!r}, checkpoint_every=50)
except KeyboardInterrupt as stop:
    print(stop)
"""


def test_ctrl_c_writes_the_checkpoint_and_says_so_in_one_line(tmp_path):
    path = tmp_path / "c"
    script = SCRIPT.format(tests=str(Path(__file__).parents[1]), path=str(path))
    child, deadline = started("-c", script, stdout=subprocess.PIPE), time.monotonic() + 120
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    said, _ = press_ctrl_c(child)
    assert child.returncode == 0
    assert said.startswith("stopped after ")
    assert said.endswith(f"updates; {path} continues it with resume=True\n")
    done = read_tensors(path)[1]["updates"]
    assert done >= 50
    how = {"iterations": done, "batch_size": 2, "checkpoint": path}
    again = train_sdt(single(20), **how, resume=True)
    assert torch.equal(again.logits, Router.load(path).logits)  # nothing left to do, nothing lost


@pytest.mark.parametrize("lam", [1.0, 1e-3, 1e-6])
def test_half_precision_does_not_lose_the_gradient_of_the_image_error(lam):
    """λ·2Δ/numel is below what float16 can say; unscaled, β alone would train the table."""
    gradients = {}
    for dtype in (torch.float32, torch.float16):
        d = load("tiny", steps=4, dtype=dtype)
        router, noise = Router(4, d.sites, generator=seeded(0)), [d.draw(4, seeded(1))]
        next(sdt(d, router, noise, beta=0.0, proxy=None, lam=torch.full((4,), lam)))
        gradients[dtype] = router.rows[0].grad
    full, half = (gradient.double() / lam for gradient in gradients.values())
    assert float(full @ half / full.norm() / half.norm()) > 0.95
    assert float(half.norm() / full.norm()) == pytest.approx(1.0, abs=0.2)


def test_provenance_counts_the_updates_that_were_made(tmp_path, small):
    path, how = tmp_path / "r.safetensors", {"batch_size": 1, "progress": False}
    train_sdt(small, iterations=6, checkpoint=path, **how)
    assert Router.load(path).about["provenance"]["iterations"] == 6
    with refused("has 6 updates already and 3 were asked for"):
        train_sdt(small, iterations=3, checkpoint=path, resume=True, **how)
    router = train_sdt(small, iterations=6, checkpoint=path, resume=True, **how)
    told = router.schedule(0.2)
    assert (told.model, told.sampler, told.guidance, told.threshold) == ("small", "ddim", 1.5, 0.2)
    assert (told.timesteps, told.provenance["iterations"]) == (small.sampler.timesteps, 6)
    assert torch.equal(Router.load(path).logits, router.logits)
    with pytest.raises(FileNotFoundError, match="no such folder; make it for r"):
        train_sdt(small, iterations=3, checkpoint=tmp_path / "no" / "r.safetensors", **how)


def test_a_search_without_memory_leaves_a_table_on_target_and_can_go_on(tmp_path, monkeypatch):
    no_room = raising(torch.OutOfMemoryError("no room"))
    how = {"target_speedup": 1.2, "beta": BETA, "budget": 16000, "checkpoint": tmp_path / "router"}
    with monkeypatch.context() as patched:
        patched.setattr("harmonica.search.refine.flip_effects_at", no_room)
        with pytest.warns(UserWarning, match="the router is on its target.*resume"):
            landed = router_of(single(3, 1), 6, **how)
    assert torch.equal(Router.load(how["checkpoint"]).logits, landed.logits)
    assert landed.schedule(0.1).speedup(macs(make(3, 1))) >= 1.2
    resumed = router_of(single(3, 1), 6, resume=True, **how)
    how["checkpoint"] = None
    assert torch.equal(resumed.logits, router_of(single(3, 1), 6, **how).logits)


def test_training_towards_the_reference_ends_nearer_to_it():
    d, how = single(5), {**QUICK, "target_speedup": 1.5}
    del how["beta"]
    pool, errors = references(d, noises=64), {}
    for image in ("reference", "uncached"):
        schedule = train_sdt(d, iterations=4, **how, toward=image).schedule()
        errors[image] = float(pool_errors(d, pool, schedule).mean())
    assert errors["reference"] < errors["uncached"]


def on_meta(d):
    there = copy.deepcopy(d)
    there.model.to("meta")
    return there


@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_meta_device_counts_the_memory_that_the_cpu_takes(checkpointed):
    d = single(3)
    d.model.activation_checkpointing = checkpointed
    x, cond = start(d, 16, 0)
    router = Router(d.steps, d.sites, logits=torch.full((2, len(d.sites)), 4.0))
    with metered() as real:
        for _ in sdt(d, router, [(x, cond)], proxy=None):
            pass
    assert dry_run(on_meta(d), batch_size=16).memory["update"] == pytest.approx(real.peak, rel=0.05)


def test_the_search_of_a_long_walk_is_told_from_short_ones():
    model = DiT(input_size=16, hidden_size=128, depth=1, num_heads=2, num_classes=3)
    d = on_meta(DiTDenoiser(model, DDIM(8)))  # so wide that features are most of it
    x, cond = start(d, 1, 0)
    with metered() as whole:
        table = Schedule(torch.ones(d.steps, len(d.sites)), tuple(d.sites))
        flip_effects_at(d, table, with_images(d, x, cond), torch.ones_like(x))
    assert dry_run(d, target=True).memory["search"] == pytest.approx(whole.peak, rel=0.01)


def test_it_counts_predictions_and_the_multiply_accumulates_of_them_and_of_backward_passes():
    d = single(3, 1)
    how = {"iterations": 12, "batch_size": 2, "refresh_every": 2}
    meta, calls = on_meta(d), counted(d)
    train_sdt(d, **how, progress=False)
    assert dry_run(meta, **how).predictions == len(calls)
    d = single(4, 1)
    one = 2 * macs(d).total  # of both noises
    how = {"iterations": 3, "batch_size": 2, "refresh_every": 1}
    plain, lam = (dry_run(on_meta(d), **how, proxy=proxy).macs for proxy in (None, "leave-one-out"))
    assert lam - plain == pytest.approx(10 * one)  # T(T+1)/2 predictions
    assert 3 * 2 < plain / one - 1 < 3 * 3  # step 0; teacher, student, and most of backward


def test_a_search_is_counted_only_for_a_target_and_what_does_not_fit_is_said(small):
    d = on_meta(single(3, 1))
    assert set(dry_run(d).memory) == {"update", "lambda"}
    with_search = dry_run(d, target=True, budget=200)
    assert with_search.predictions == dry_run(d).predictions + 200 // 32
    assert with_search.memory["search"] > with_search.weights
    assert "search" not in dry_run(d, target=True, budget=0).memory
    with refused("the denoiser is on cpu; a dry run takes one on the meta"):
        dry_run(small)
    gib = 2**30
    plan = DryRun(1, 1e15, 2 * gib, {"update": 34 * gib, "lambda": 10 * gib}, 32)
    plan.check(40 * gib, checkpointing=False)
    with refused(r"needs 34.0 GiB at batch size 32 and the device has 24.0"):
        plan.check(24 * gib, checkpointing=False)
    with refused("--batch-size 22 or --activation-checkpointing"):
        plan.check(24 * gib, checkpointing=False)
    with refused("take a larger device"):
        plan.check(1 * gib, checkpointing=True)


def test_the_command_says_what_training_takes_and_writes_nothing(tmp_path, capsys):
    out = ["--out", str(tmp_path / "x"), "--steps", "3", "--device", "cuda", "--dry-run"]
    assert train.main(out) == 0  # on a machine that need not have the device
    said = capsys.readouterr().out
    for word in ("predictions", "multiply-accumulates", "hours", "peak memory, update", "lambda"):
        assert word in said
    assert not (tmp_path / "x").exists()
    assert train.main([*out, "--target", "1e9"]) == 2
    assert "the target speedup is 1e+09 and the maximum here is" in capsys.readouterr().err
