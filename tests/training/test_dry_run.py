"""Dry run: what training will take is counted before anything is computed."""

import copy

import pytest
import torch
from conftest import make, refused, start
from test_laws import counted

from harmonica import Router, Schedule, macs, sdt, train, train_sdt
from harmonica.memory import metered
from harmonica.models.dit import DiT, DiTDenoiser
from harmonica.samplers import DDIM
from harmonica.search.flip_effects import flip_effects_at
from harmonica.search.references import with_images
from harmonica.training.dry_run import DryRun, dry_run

GIB = 2**30


def on_meta(d):
    there = copy.deepcopy(d)
    there.model.to("meta")
    return there


@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_meta_device_counts_the_memory_that_the_cpu_takes(checkpointed):
    d = make(3, dtype=torch.float32)
    d.model.activation_checkpointing = checkpointed
    x, cond = start(d, 16, 0)
    router = Router(d.steps, d.sites, logits=torch.full((2, len(d.sites)), 4.0))
    with metered() as real:
        for _ in sdt(d, router, [(x, cond)], proxy=None):
            pass
    assert dry_run(on_meta(d), batch_size=16).memory["update"] == pytest.approx(real.peak, rel=0.05)


def test_the_search_of_a_long_walk_is_told_from_short_ones():
    model = DiT(input_size=16, hidden_size=256, depth=2, num_heads=2, num_classes=3)
    d = on_meta(DiTDenoiser(model, DDIM(12)))  # so wide that features are most of it
    x, cond = start(d, 1, 0)
    with metered() as whole:
        table = Schedule(torch.ones(d.steps, len(d.sites)), tuple(d.sites))
        flip_effects_at(d, table, with_images(d, x, cond), torch.ones_like(x))
    assert dry_run(d, target=True).memory["search"] == pytest.approx(whole.peak, rel=0.01)


def test_it_counts_predictions_and_the_multiply_accumulates_of_them_and_of_backward_passes():
    d = make(3, 1, dtype=torch.float32)
    how = {"iterations": 12, "batch_size": 2, "refresh_every": 2}
    meta, calls = on_meta(d), counted(d)
    train_sdt(d, **how, progress=False)
    assert dry_run(meta, **how).predictions == len(calls)
    d = make(4, 1, dtype=torch.float32)
    one = 2 * macs(d).total  # of both noises
    how = {"iterations": 3, "batch_size": 2, "refresh_every": 1}
    plain, lam = (dry_run(on_meta(d), **how, proxy=proxy).macs for proxy in (False, True))
    assert lam - plain == pytest.approx(10 * one)  # T(T+1)/2 predictions
    assert 3 * 2 < plain / one - 1 < 3 * 3  # step 0; teacher, student, and most of backward


def test_a_search_is_counted_only_for_a_target():
    d = on_meta(make(3, 1, dtype=torch.float32))
    assert set(dry_run(d).memory) == {"update", "lambda"}
    with_search = dry_run(d, target=True, refine=100)
    assert with_search.predictions == dry_run(d).predictions + 100
    assert with_search.memory["search"] > with_search.weights
    assert "search" not in dry_run(d, target=True, refine=0).memory


def test_what_does_not_fit_is_said_with_the_numbers_and_what_to_change(small):
    with refused("the denoiser is on cpu; a dry run takes one on the meta"):
        dry_run(small)
    plan = DryRun(1, 1e15, 2 * GIB, {"update": 34 * GIB, "lambda": 10 * GIB}, 32)
    plan.check(40 * GIB, checkpointing=False)
    with refused(r"needs 34.0 GiB at batch size 32 and the device has 24.0"):
        plan.check(24 * GIB, checkpointing=False)
    with refused("--batch-size 22 or --activation-checkpointing"):
        plan.check(24 * GIB, checkpointing=False)
    with refused("take a larger device"):
        plan.check(1 * GIB, checkpointing=True)


def test_the_command_says_what_training_takes_and_writes_nothing(tmp_path, capsys):
    out = ["--out", str(tmp_path / "x"), "--steps", "3", "--device", "cuda", "--dry-run"]
    assert train.main(out) == 0  # on a machine that need not have the device
    said = capsys.readouterr().out
    for word in ("predictions", "multiply-accumulates", "hours", "peak memory, update", "lambda"):
        assert word in said
    assert not (tmp_path / "x").exists()
