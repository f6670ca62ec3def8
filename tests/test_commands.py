"""The commands: what they take, refuse, document and write, and what bad input costs."""

import inspect
import re
from importlib import import_module

import pytest
import torch
from conftest import raising, refused, said, seeded, torchrun

from harmonica import Router, Schedule, demo, image_sets, models, train, train_sdt
from harmonica import processes as distributed
from harmonica.models.prompts import read_prompts

tune = import_module("harmonica.tune")  # the module; harmonica.tune is a function too
COMMANDS = {"demo": demo, "image_sets": image_sets, "train": train, "tune": tune}
SHORT = "--steps 4 --iterations 6 --batch-size 2 --refresh-every 2"
SMALLEST = {
    demo: "--steps 3 --weights random --images 2",
    train: "--iterations 2 --batch-size 2 --proxy none --activation-checkpointing",
    image_sets: "--count 1",
}
"""Options of the shortest run."""

FOR_ALL = [
    ("--model dalle", "model is 'dalle'"), ("--steps 0", "steps is 0"),
    ("--steps twenty", "argument --steps: found 'twenty'; expected a whole number"),
    ("--sampler guess", "sampler is 'guess'"), ("--guidance 0.5", "guidance is 0.5"),
    ("--dtype float8", "invalid choice: 'float8'"), ("--device teapot", "device teapot: "),
    ("--device meta", "device meta: "), ("--device cuda:99", "--device cuda:99: "),
    ("--weights no_such.pt", "no_such.pt: no such file"),
    ("--prompts no.txt --model pixart-alpha-256 --weights random", "no.txt: no such file"),
    ("--out /dev/null/here", "Not a directory"), ("--unknown", "unrecognized arguments: --unknown"),
]  # fmt: skip
REFUSED = {
    demo: [
        ("--model uvit-h", "pass weights=PATH of the original imagenet256_uvit_huge.pth"),
        ("--schedule no_such.json", "no_such.json: no such file"),
        ("--vae no_such", "leave it out, tiny makes pixels"),
        ("--iterations 0", "--iterations: found '0'; expected"),
        ("--target 50", "the target speedup is 50 and the maximum here is"),
    ],
    train: [
        ("--steps 1", "1 step, which always computes"),
        ("--dry-run --steps 1", "1 step, which always computes"),
        ("--dry-run --device teapot", "device teapot: "),
        ("--iterations 0", "--iterations: found '0'; expected a whole number, 1 or more"),
        ("--batch-size 0", "--batch-size: found '0'"),
        ("--refresh-every -1", "--refresh-every: found '-1'"),
        ("--tau 1", "--tau: found '1'; expected a number, 0 or more and below 1"),
        ("--beta nan", "--beta: found 'nan'"), ("--lr 0", "--lr: found '0'"),
        ("--proxy vibes", "invalid choice: 'vibes'"),
    ],
    image_sets: [
        ("--count 0", "--count: found '0'"), ("--batch-size 0", "--batch-size: found '0'"),
        ("--schedule no_such.json", "no_such.json: no such file"),
    ],
}  # fmt: skip
CASES = [(c, *case) for c, cases in REFUSED.items() for case in (*FOR_ALL, *cases)]


@pytest.mark.parametrize(("command", "options", "message"), CASES)
def test_bad_input_is_one_line_and_exit_code_2(command, options, message, tmp_path, capsys):
    out = f"--out {tmp_path}/run {'' if command is train else '--steps 3'}"
    code, printed, err = said(command, f"{out} {options}", capsys)
    assert (code, printed, len(err.splitlines())) == (2, "", 1)
    assert message in err
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("command", SMALLEST)
def test_every_option_of_the_model_reaches_load(command, tmp_path, monkeypatch, capsys):
    options, tiny = {}, models.load

    def load(name, **given):
        options.update(given, name=name)
        return tiny("tiny", steps=3)

    monkeypatch.setattr(models, "load", load)
    prompts = tmp_path / "p.txt"
    prompts.write_text("a red kite\n")
    asked = "--model pixart-sigma-1024 --sampler iddpm --guidance 2.5 --dtype bfloat16 --steps 3"
    asked += f" --weights random --prompts {prompts} --out {tmp_path}/run "
    assert said(command, asked + SMALLEST[command], capsys)[0] == 0
    assert options == {
        "name": "pixart-sigma-1024", "sampler": "iddpm", "steps": 3, "guidance": 2.5,
        "weights": "random", "prompts": ("a red kite",) if command is train else prompts,
        "dtype": torch.bfloat16, "device": "cpu" if command is demo else torch.device("cpu"),
        "activation_checkpointing": command is train,
    }  # fmt: skip


def test_the_commands_that_the_library_documents_are_parsed():
    pages = "\n".join(module.__doc__ for module in (*COMMANDS.values(), distributed))
    pages = re.sub(r"\\\n *", "", pages)
    lines = re.findall(r"^    .*-m harmonica\.(\w+)(.*)$", pages, re.MULTILINE)
    assert {name for name, _ in lines} == set(COMMANDS)
    for name, options in lines:
        COMMANDS[name].parser().parse_args(options.split("  ")[0].split())  # then a comment


@pytest.mark.parametrize("command", COMMANDS.values())
def test_help_explains_every_option(command):
    text = command.parser().format_help()
    for option, explained in re.findall(r"^  --([\w-]+)(.*\n(?:    .*\n)*)", text, re.MULTILINE):
        assert re.search(r"[a-z]{2,}", re.sub(r"^ [A-Z_{].*?( |\n)", "", explained)), option
    if command is train:  # both defaults
        assert "(20000; bundled models: 1500)" in text
        assert "(7e-08; bundled models: 1e-07)" in text


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


def test_the_command_is_the_library_stopped_and_resumed_or_not(tmp_path, capsys):
    options = "--proxy telescoping --beta 1e-5 --lr 0.2 --tau 0.3 --seed 3"
    settings = {"batch_size": 2, "proxy": "telescoping", "beta": 1e-5, "lr": 0.2, "tau": 0.3}
    how = {"iterations": 6, "refresh_every": 2, "generator": seeded(3), "progress": False}
    router = train_sdt(models.load("tiny", steps=4), **settings, **how)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert torch.equal(trained(whole, capsys, options), router.logits)
    trained(parts, capsys, f"{options} --iterations 4")
    assert torch.equal(trained(parts, capsys, f"{options} --resume"), router.logits)
    assert (whole / "schedule.json").read_text() == (parts / "schedule.json").read_text()
    code, _, err = said(train, f"{SHORT} {options} --lr 0.3 --out {parts} --resume", capsys)
    assert (code, "lr 0.2 -> 0.3" in err) == (2, True)


def test_the_defaults_are_the_authors_but_for_the_bundled_model():
    parameters = inspect.signature(train_sdt).parameters
    assert {name: parameters[name].default for name in train.AUTHORS} == train.AUTHORS
    for model, settings in (("tiny", train.QUICK), ("dit-xl", train.AUTHORS)):
        assert train.defaults(model) == {**settings, "activation_checkpointing": False}
    assert train.defaults("pixart-sigma-2k")["budget"] == 0  # no search fits into 80 GiB


def test_a_checkpoint_is_not_lost_nor_imagined_whatever_the_model(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(models, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    path = tmp_path / "router.safetensors"
    exists = "router.safetensors exists; continue it with --resume, or choose another --out"
    for options, message in (("--resume", f"there is no {path} to continue"), ("", exists)):
        code, _, err = said(train, f"--out {tmp_path} {options}", capsys)
        assert (code, len(err.splitlines()), message in err) == (2, 1, True)
        path.write_text("hours of work")
    assert path.read_text() == "hours of work"


def test_ctrl_c_is_130_and_one_line_that_says_how_to_go_on(tmp_path, capsys, monkeypatch):
    stop = KeyboardInterrupt("stopped; router.safetensors continues it with resume=True")
    monkeypatch.setattr(train, "train_sdt", raising(stop))
    code, _, err = said(train, f"{SHORT} --out {tmp_path}", capsys)
    assert (code, len(err.splitlines())) == (130, 1)
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
