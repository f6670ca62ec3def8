"""The commands: what all of them take, refuse and document, and what bad input costs."""

import re
from importlib import import_module

import pytest
import torch
from conftest import said

from harmonica import demo, image_sets, models, train
from harmonica import processes as distributed

tune = import_module("harmonica.tune")  # the module; harmonica.tune is a function too
COMMANDS = {"demo": demo, "image_sets": image_sets, "train": train, "tune": tune}
SMALLEST = {
    demo: "--steps 3 --weights random --iterations 2 --method sdt --images 2",
    train: "--iterations 2 --batch-size 2 --proxy none --activation-checkpointing",
    image_sets: "--count 1",
}
"""Options of the shortest run."""

FOR_ALL = [
    ("--model dalle", "model is 'dalle'"),
    ("--steps 0", "steps is 0"),
    ("--steps twenty", "argument --steps: found 'twenty'; expected a whole number"),
    ("--sampler guess", "sampler is 'guess'"),
    ("--guidance 0.5", "guidance is 0.5"),
    ("--dtype float8", "invalid choice: 'float8'"),
    ("--device teapot", "--device teapot: "),
    ("--device meta", "--device meta: "),
    ("--device cuda:99", "--device cuda:99: "),
    ("--weights no_such.pt", "no_such.pt: no such file"),
    ("--prompts no.txt --model pixart-alpha-256 --weights random", "no.txt: no such file"),
    ("--out /dev/null/here", "Not a directory"),
    ("--unknown", "unrecognized arguments: --unknown"),
]
REFUSED = {
    demo: [
        ("--model uvit-h", "pass weights=PATH of the original imagenet256_uvit_huge.pth"),
        ("--schedule no_such.json", "no_such.json: no such file"),
        ("--tau 1.5", "--tau: found '1.5'; expected a number, 0 or more and below 1"),
        ("--iterations 0", "--iterations: found '0'; expected"),
        ("--beta 1e-7", "--beta 1e-07: a price is for --method sdt"),
    ],
    train: [
        ("--steps 1", "1 step, which always computes"),
        ("--iterations 0", "--iterations: found '0'; expected a whole number, 1 or more"),
        ("--batch-size 0", "--batch-size: found '0'"),
        ("--refresh-every -1", "--refresh-every: found '-1'"),
        ("--checkpoint-every 0", "--checkpoint-every: found '0'"),
        ("--tau 1", "--tau: found '1'"),
        ("--beta nan", "--beta: found 'nan'"),
        ("--lr 0", "--lr: found '0'"),
        ("--proxy vibes", "invalid choice: 'vibes'"),
    ],
    image_sets: [
        ("--count 0", "--count: found '0'"),
        ("--batch-size 0", "--batch-size: found '0'"),
        ("--schedule no_such.json", "no_such.json: no such file"),
    ],
}
CASES = [(c, *case) for c, cases in REFUSED.items() for case in (*FOR_ALL, *cases)]


@pytest.mark.parametrize(("command", "options", "message"), CASES)
def test_bad_input_is_one_line_on_stderr_and_exit_code_2(
    command, options, message, tmp_path, capsys
):
    out = f"--out {tmp_path}/run {'' if command is train else '--steps 2'}"
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
