"""`python -m harmonica.train`: what it writes, what it says, what it refuses."""

import inspect
import subprocess
import sys
import time

import pytest
import torch
from conftest import press_ctrl_c, refused, said, seeded
from test_processes import environment, torchrun

from harmonica import Router, Schedule, models, train, train_sdt
from harmonica.models.prompts import read_prompts
from harmonica.storage.files import read_tensors

SHORT = "--steps 4 --iterations 6 --batch-size 2 --refresh-every 2"
QUICK = {"batch_size": 2, "beta": 1e-7, "lr": 0.1, "progress": False}


def trained(out, capsys, more=""):
    """Train by the command and return its router's logits."""
    assert said(train, [*SHORT.split(), *more.split(), "--out", out], capsys)[0] == 0
    return Router.load(out / "router.safetensors").logits


def test_it_trains_freezes_and_says_what_it_wrote(tmp_path, capsys):
    code, out, _ = said(train, [*SHORT.split(), "--out", tmp_path / "a b"], capsys)
    assert code == 0
    schedule = Schedule.load(tmp_path / "a b/schedule.json")
    assert schedule == Router.load(tmp_path / "a b/router.safetensors").schedule(0.1)
    assert (schedule.model, schedule.steps, schedule.threshold) == ("tiny", 4, 0.1)
    assert f"{schedule.cur:.1%}" in out
    assert "theoretical speedup          1." in out
    for name in ("schedule.json", "router.safetensors"):
        assert str(tmp_path / "a b" / name) in out


def test_the_command_is_the_library(tmp_path, capsys):
    options = "--proxy telescoping --beta 1e-5 --lr 0.2 --tau 0.3 --seed 3"
    settings = {"proxy": "telescoping", "beta": 1e-5, "lr": 0.2, "tau": 0.3}
    how = {"iterations": 6, "refresh_every": 2, "generator": seeded(3)}
    router = train_sdt(models.load("tiny", steps=4), **{**QUICK, **settings, **how})
    assert torch.equal(trained(tmp_path, capsys, options), router.logits)


def test_iterations_do_stop_the_command_in_the_middle_of_a_trajectory(tmp_path, capsys):
    trained(tmp_path, capsys, "--iterations 4")
    facts = read_tensors(tmp_path / "router.safetensors")[1]
    assert facts["about"]["provenance"]["iterations"] == 4
    stopped = train_sdt(models.load("tiny", steps=4), iterations=5, proxy=None, **QUICK)
    again = trained(tmp_path / "b", capsys, "--iterations 5 --proxy none")
    assert torch.equal(again, stopped.logits)
    assert not torch.equal(again, Router(4, 16, generator=seeded(0)).logits)


def test_there_is_a_final_checkpoint_however_rarely_they_are_written(tmp_path, capsys):
    router = train_sdt(models.load("tiny", steps=4), iterations=6, refresh_every=2, **QUICK)
    assert torch.equal(trained(tmp_path, capsys, "--checkpoint-every 1000000"), router.logits)


def test_a_resumed_command_ends_where_an_uninterrupted_one_does(tmp_path, capsys):
    whole = trained(tmp_path / "whole", capsys, "--iterations 13")
    trained(tmp_path / "parts", capsys, "--iterations 4")
    assert torch.equal(trained(tmp_path / "parts", capsys, "--iterations 13 --resume"), whole)
    one, two = (tmp_path / name / "schedule.json" for name in ("whole", "parts"))
    assert one.read_text() == two.read_text()


def test_the_defaults_are_the_authors_but_for_the_bundled_model():
    parameters = inspect.signature(train_sdt).parameters
    assert {name: parameters[name].default for name in train.AUTHORS} == train.AUTHORS
    for model, settings in (("tiny", train.QUICK), ("dit-xl", train.AUTHORS)):
        assert train.defaults(model) == {**settings, "activation_checkpointing": False}
    assert train.defaults("pixart-sigma-2k")["refine"] == 0  # no search fits into 80 GiB


def test_a_checkpoint_is_not_lost_nor_imagined_whatever_the_model(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(models, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    path = tmp_path / "router.safetensors"
    exists = "router.safetensors exists; continue it with --resume, or choose another --out"
    for options, message in (("--resume", f"there is no {path} to continue"), ("", exists)):
        code, _, err = said(train, f"--out {tmp_path} {options}", capsys)
        assert (code, len(err.splitlines()), message in err) == (2, 1, True)
        path.write_text("hours of work")
    assert path.read_text() == "hours of work"


def test_other_settings_are_not_resumed(tmp_path, capsys):
    trained(tmp_path, capsys)
    code, _, err = said(train, f"{SHORT} --lr 0.3 --out {tmp_path} --resume", capsys)
    assert code == 2
    assert "lr 0.1 -> 0.3" in err


def test_ctrl_c_is_130_and_one_line_that_says_how_to_go_on(tmp_path):
    script = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    script += "from harmonica.train import main; sys.exit(main())"
    options = "--steps 4 --batch-size 2 --iterations 1000000 --checkpoint-every 10 --out"
    command = [sys.executable, "-c", script, *options.split(), tmp_path]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment())
    deadline = time.monotonic() + 60
    while not (tmp_path / "router.safetensors").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    _, err = press_ctrl_c(child, timeout=20)
    assert (child.returncode, len(err.splitlines())) == (130, 1)
    assert "router.safetensors continues it with --resume" in err
    assert "resume=True" not in err


def test_it_runs_under_torchrun_as_it_is_and_rank_0_alone_prints(tmp_path, capsys):
    done = torchrun("-m", "harmonica.train", *SHORT.split(), "--out", tmp_path / "two")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("cache utilisation") == 1
    files = ["router.safetensors", "schedule.json"]
    assert sorted(p.name for p in (tmp_path / "two").iterdir()) == files
    one, two = trained(tmp_path / "one", capsys), Router.load(tmp_path / "two" / files[0]).logits
    torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)


def test_prompts_are_lines_but_for_blank_ones_and_comments_and_64_short_ones_are_bundled(tmp_path):
    prompts = read_prompts()
    assert len(set(prompts)) == len(prompts) == 64
    assert all(5 <= len(prompt.split()) <= 20 and prompt.isascii() for prompt in prompts)
    text = "\ufeff# colours\n\n  ein grüner Hügel  \r\nun café\n   # not this\n"
    (tmp_path / "p").write_bytes(text.encode())
    assert read_prompts(tmp_path / "p") == ("ein grüner Hügel", "un café")
    for content, message in {b"#\n\n": "has no prompt", b"caf\xe9": "is not text in UTF-8"}.items():
        (tmp_path / "p").write_bytes(content)
        with refused(message):
            read_prompts(tmp_path / "p")
    with pytest.raises(FileNotFoundError, match="q: no such file"):
        read_prompts(tmp_path / "q")
