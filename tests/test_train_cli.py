"""`python -m harmonica.train`: what it writes, what it says, what it refuses."""

from __future__ import annotations

import inspect
import subprocess
import sys
import time

import pytest
import torch
from conftest import press_ctrl_c
from test_processes import environment, torchrun

from harmonica import Router, Schedule, models, train, train_sdt
from harmonica import processes as distributed
from harmonica.models.prompts import read_prompts
from harmonica.storage.files import read_tensors

SHORT = ["--steps", "4", "--iterations", "6", "--batch-size", "2", "--refresh-every", "2"]


def said(arguments, capsys):
    """Return the exit code, stdout and stderr of the command."""
    try:
        code = train.main([str(argument) for argument in arguments])
    except SystemExit as exit:  # argparse's way
        code = exit.code
    out = capsys.readouterr()
    return code, out.out, out.err


def test_it_trains_freezes_and_says_what_it_wrote(tmp_path, capsys):
    code, out, _ = said([*SHORT, "--out", tmp_path / "a b"], capsys)
    assert code == 0
    schedule, router = (
        Schedule.load(tmp_path / "a b/schedule.json"),
        Router.load(tmp_path / "a b/router.safetensors"),
    )
    assert schedule == router.schedule(0.1)
    assert (schedule.model, schedule.steps, schedule.threshold) == ("tiny", 4, 0.1)
    assert f"{schedule.cur:.1%}" in out
    assert "theoretical speedup          1." in out
    for name in ("schedule.json", "router.safetensors"):
        assert str(tmp_path / "a b" / name) in out


def test_the_command_is_the_library(tmp_path, capsys):
    options = [
        "--proxy",
        "telescoping",
        "--beta",
        "1e-5",
        "--lr",
        "0.2",
        "--tau",
        "0.3",
        "--seed",
        "3",
    ]
    assert said([*SHORT, *options, "--out", tmp_path], capsys)[0] == 0
    router = train_sdt(
        models.load("tiny", steps=4), iterations=6, batch_size=2, refresh_every=2, proxy="telescoping",
        beta=1e-5, lr=0.2, tau=0.3, generator=torch.Generator().manual_seed(3), progress=False,
    )  # fmt: skip
    assert torch.equal(Router.load(tmp_path / "router.safetensors").logits, router.logits)


# ------------------------------------------------------------ what the released code did: ours must not


def test_iterations_do_stop_the_command_in_the_middle_of_a_trajectory(tmp_path, capsys):
    assert said([*SHORT, "--iterations", "4", "--out", tmp_path], capsys)[0] == 0
    assert (
        read_tensors(tmp_path / "router.safetensors")[1]["about"]["provenance"]["iterations"] == 4
    )
    assert (
        said([*SHORT, "--iterations", "5", "--proxy", "none", "--out", tmp_path / "b"], capsys)[0]
        == 0
    )
    fresh = Router(4, 16, generator=torch.Generator().manual_seed(0)).logits
    stopped = train_sdt(
        models.load("tiny", steps=4),
        iterations=5,
        batch_size=2,
        beta=1e-7,
        lr=0.1,
        proxy=None,
        progress=False,
    )
    assert torch.equal(Router.load(tmp_path / "b/router.safetensors").logits, stopped.logits)
    assert not torch.equal(stopped.logits, fresh)


def test_there_is_a_final_checkpoint_however_rarely_they_are_written(tmp_path, capsys):
    assert said([*SHORT, "--checkpoint-every", "1000000", "--out", tmp_path], capsys)[0] == 0
    trained = train_sdt(
        models.load("tiny", steps=4),
        iterations=6,
        batch_size=2,
        beta=1e-7,
        lr=0.1,
        refresh_every=2,
        progress=False,
    )
    assert torch.equal(Router.load(tmp_path / "router.safetensors").logits, trained.logits)


def test_a_resumed_command_ends_where_an_uninterrupted_one_does(tmp_path, capsys):
    assert said([*SHORT, "--iterations", "13", "--out", tmp_path / "whole"], capsys)[0] == 0
    assert said([*SHORT, "--iterations", "4", "--out", tmp_path / "parts"], capsys)[0] == 0
    assert (
        said([*SHORT, "--iterations", "13", "--out", tmp_path / "parts", "--resume"], capsys)[0]
        == 0
    )
    whole, parts = (
        Router.load(tmp_path / name / "router.safetensors") for name in ("whole", "parts")
    )
    assert torch.equal(whole.logits, parts.logits)
    assert (tmp_path / "whole/schedule.json").read_text() == (
        tmp_path / "parts/schedule.json"
    ).read_text()


def test_its_own_parser_takes_the_commands_it_documents():
    lines = (train.__doc__ + distributed.__doc__).splitlines()
    commands = [line for line in lines if line.startswith("    torchrun")]
    assert len(commands) == 2
    for command in commands:
        assert (
            train.parser().parse_args(command.split("harmonica.train")[1].split()).model == "dit-xl"
        )


# ------------------------------------------------------------ defaults and options


def test_the_defaults_are_the_authors_but_for_the_bundled_model():
    parameters = inspect.signature(train_sdt).parameters
    assert {name: parameters[name].default for name in train.AUTHORS} == train.AUTHORS
    for model, settings in (("tiny", train.QUICK), ("dit-xl", train.AUTHORS)):
        assert train.defaults(model) == settings


def test_help_says_every_option_and_both_defaults():
    text = train.parser().format_help()
    options = "model weights sampler steps guidance prompts iterations batch-size beta lr refresh-every tau proxy out"
    for option in (*options.split(), "resume", "checkpoint-every", "seed", "dry-run", "dtype"):
        assert f"--{option}" in text
    assert "--activation-checkpointing" in text
    assert "(20000; bundled models: 1500)" in text
    assert "(7e-08; bundled models: 1e-07)" in text


def test_every_option_of_the_model_reaches_load(tmp_path, monkeypatch, capsys):
    asked, tiny = {}, models.load

    def load(name, **options):
        asked.update(options, name=name)
        return tiny("tiny", steps=3)

    monkeypatch.setattr(models, "load", load)
    (tmp_path / "p.txt").write_text("a red kite\n")
    options = "--model pixart-sigma-1024 --sampler iddpm --steps 3 --guidance 2.5 --weights random --dtype bfloat16"
    arguments = [
        *options.split(),
        "--prompts",
        tmp_path / "p.txt",
        "--activation-checkpointing",
        "--out",
        tmp_path,
    ]
    assert (
        said([*arguments, "--iterations", "2", "--batch-size", "2", "--proxy", "none"], capsys)[0]
        == 0
    )
    assert asked == {
        "name": "pixart-sigma-1024", "sampler": "iddpm", "steps": 3, "guidance": 2.5, "weights": "random",
        "prompts": ("a red kite",), "dtype": torch.bfloat16, "device": torch.device("cpu"),
        "activation_checkpointing": True,
    }  # fmt: skip


# ------------------------------------------------------------ bad input, Ctrl-C


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "dalle"], "model is 'dalle'"),
        (["--steps", "0"], "steps is 0"),
        (["--steps", "1"], "1 step, which always computes"),
        (["--sampler", "guess"], "sampler is 'guess'"),
        (["--guidance", "0.5"], "guidance is 0.5"),
        (["--iterations", "0"], "--iterations is 0; it must be 1 or more"),
        (["--batch-size", "0"], "--batch-size is 0"),
        (["--refresh-every", "-1"], "--refresh-every is -1"),
        (["--checkpoint-every", "0"], "--checkpoint-every is 0"),
        (["--iterations", "many"], "invalid int value: 'many'"),
        (["--tau", "1"], "--tau 1.0"),
        (["--beta", "nan"], "--beta nan"),
        (["--lr", "0"], "--lr 0.0"),
        (["--proxy", "vibes"], "invalid choice: 'vibes'"),
        (["--dtype", "float8"], "invalid choice: 'float8'"),
        (["--device", "teapot"], "--device teapot"),
        (["--device", "cuda:99"], "--device cuda:99"),
        (["--prompts", "no such file.txt"], "no such file.txt: no such file"),
        (["--weights", "no such.pt"], "no such.pt: no such file"),
        (["--out", "/dev/null/here"], "Not a directory"),
        (["--unknown"], "unrecognized arguments: --unknown"),
    ],
)
def test_bad_input_is_one_line_on_stderr_and_exit_code_2(arguments, message, tmp_path, capsys):
    code, out, err = said(["--out", tmp_path / "out", *arguments], capsys)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert message in err
    assert not (tmp_path / "out/router.safetensors").exists()


def test_a_checkpoint_is_not_lost_nor_imagined_and_the_model_is_not_loaded_to_find_out(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(models, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    code, _, err = said(["--out", tmp_path, "--resume"], capsys)
    assert (code, len(err.splitlines())) == (2, 1)
    assert f"there is no {tmp_path / 'router.safetensors'} to continue" in err
    (tmp_path / "router.safetensors").write_text("hours of work")
    code, _, err = said(["--out", tmp_path], capsys)
    assert (code, len(err.splitlines())) == (2, 1)
    assert "router.safetensors exists; continue it with --resume, or choose another --out" in err
    assert (tmp_path / "router.safetensors").read_text() == "hours of work"


def test_other_settings_are_not_resumed(tmp_path, capsys):
    assert said([*SHORT, "--out", tmp_path], capsys)[0] == 0
    code, _, err = said([*SHORT, "--lr", "0.3", "--out", tmp_path, "--resume"], capsys)
    assert code == 2
    assert "lr 0.1 -> 0.3" in err


def test_ctrl_c_is_130_and_one_line_that_says_how_to_go_on(tmp_path):
    script = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from harmonica.train import main; sys.exit(main())"
    )
    options = [
        "--steps",
        "4",
        "--batch-size",
        "2",
        "--iterations",
        "1000000",
        "--checkpoint-every",
        "10",
    ]
    child = subprocess.Popen(
        [sys.executable, "-c", script, *options, "--out", str(tmp_path)], stderr=subprocess.PIPE, text=True,
        env=environment(),
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not (tmp_path / "router.safetensors").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    _, err = press_ctrl_c(child, timeout=20)
    assert (child.returncode, len(err.splitlines())) == (130, 1)
    assert "router.safetensors continues it with --resume" in err
    assert "resume=True" not in err


# ------------------------------------------------------------ several processes


def test_it_runs_under_torchrun_as_it_is_and_rank_0_alone_prints(tmp_path, capsys):
    done = torchrun("-m", "harmonica.train", *SHORT, "--out", tmp_path / "two")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("cache utilisation") == 1
    assert sorted(p.name for p in (tmp_path / "two").iterdir()) == [
        "router.safetensors",
        "schedule.json",
    ]
    assert said([*SHORT, "--out", tmp_path / "one"], capsys)[0] == 0
    one, two = (
        Router.load(tmp_path / name / "router.safetensors").logits for name in ("one", "two")
    )
    torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)


# ------------------------------------------------------------ prompts


def test_the_bundled_prompts_are_64_different_short_ones():
    prompts = read_prompts()
    assert len(set(prompts)) == len(prompts) == 64
    assert all(5 <= len(prompt.split()) <= 20 and prompt.isascii() for prompt in prompts)


def test_blank_lines_and_comments_are_not_prompts(tmp_path):
    (tmp_path / "p").write_bytes(
        "\ufeff# colours\n\n  ein grüner Hügel  \r\nun café\n   # not this\n".encode()
    )
    assert read_prompts(tmp_path / "p") == ("ein grüner Hügel", "un café")


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"# nothing\n\n", "has no prompt"), (b"caf\xe9\n", "is not text in UTF-8")],
)
def test_a_file_without_prompts_is_named(tmp_path, content, message):
    (tmp_path / "p").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / "p")
    with pytest.raises(FileNotFoundError, match="q: no such file"):
        read_prompts(tmp_path / "q")
