"""A full disk, another run, Ctrl-C, a closed pipe, a read-only home: what a command does. docs/faults.md lists all.

Where a fault can be made for real (the system's own refusal to write, a signal, a pipe nobody reads) it is.
"""

import ast
import fcntl
import os
import subprocess
import sys
from contextlib import contextmanager

import conftest
import pytest
from conftest import ROOT, raising, single, started

from harmonica import Router, Schedule, demo, image_sets, train, train_sdt
from harmonica import pictures as plots
from harmonica.storage.files import exclusive_lock
from harmonica.storage.foreign import write_smoothcache
from harmonica.storage.hub import write_folder

QUIET = {"batch_size": 2, "progress": False}
SHORT = "--steps 4 --iterations 4"
COMMANDS = {
    "demo": (demo, f"{SHORT} --images 2 --weights random"),
    "train": (train, f"{SHORT} --batch-size 2"),
    "image sets": (image_sets, "--steps 2 --count 4"),
}


def said(name, out, capsys):
    """Return exit code, stdout and stderr of a command that writes to `out`."""
    module, options = COMMANDS[name]
    return conftest.said(module, [*options.split(), "--out", out], capsys)


def where(name, folder):
    """Return the --out of a command: a folder, or a file in it."""
    return folder / "images.npz" if name == "image sets" else folder / "run"


@contextmanager
def room_for(size):
    """Let no file grow beyond `size` bytes: the system refuses the rest of a write, as a full disk does."""
    resource = pytest.importorskip("resource", reason="Windows has no such limit")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def router():
    return Router(4, ["blocks.0.attn", "blocks.0.mlp"])


SAVES = {
    "schedule.json": lambda path: router().schedule().save(path),
    "router.safetensors": lambda path: router().save(path),
    "a folder": lambda path: write_folder(path, router().schedule(), router()),
    "smoothcache.json": lambda path: write_smoothcache(path, router().schedule()),
    "checkpoint": lambda path: train_sdt(single(), iterations=2, checkpoint=path, **QUIET),
    "picture.png": lambda path: plots.save(plots.router_heatmap(router().schedule()), path),
}


def contents(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder): path.read_bytes() for path in files}


@pytest.mark.parametrize("name", SAVES)
def test_a_full_disk_names_the_file_and_leaves_the_old_one_and_no_half(name, tmp_path):
    save = SAVES[name]
    if name != "checkpoint":  # one that exists is refused, not overwritten
        save(tmp_path / name)
    before = contents(tmp_path)
    with room_for(16), pytest.raises(OSError, match=name):
        save(tmp_path / name)
    assert contents(tmp_path) == before
    save(tmp_path / name)  # with room again


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_on_a_full_disk_says_so_in_one_line_and_leaves_no_half(name, tmp_path, capsys):
    out = where(name, tmp_path)
    with room_for(100):
        code, _, err = said(name, out, capsys)
    complaint = err.splitlines()[-1]  # above it a progress bar may stand
    assert (code, str(tmp_path) in complaint, "Traceback" in err) == (2, True, False)
    assert "could not be written" in complaint or "it was not written" in complaint
    assert not list(tmp_path.rglob("*.part"))
    assert all(path.stat().st_size < 100 for path in tmp_path.rglob("*") if path.is_file())


@pytest.mark.parametrize("name", COMMANDS)
def test_a_second_run_to_one_output_is_refused_and_the_first_goes_on(name, tmp_path, capsys):
    out = where(name, tmp_path)
    folder = out.with_name("images.npz.parts") if name == "image sets" else out
    folder.mkdir()
    with exclusive_lock(folder):
        code, _, err = said(name, out, capsys)
        assert (code, len(err.splitlines())) == (2, 1)
        assert f"{folder} is being written to by another run" in err
        assert not list(folder.iterdir())
    assert said(name, out, capsys)[0] == 0  # the lock went with its holder


def test_a_lock_of_a_killed_run_holds_nobody(tmp_path):
    script = "import sys, time; from harmonica.storage.files import exclusive_lock\n"
    script += "with exclusive_lock(sys.argv[1]): print('held', flush=True); time.sleep(60)"
    child = started("-c", script, str(tmp_path), stdout=subprocess.PIPE)
    assert child.stdout.readline() == "held\n"
    with pytest.raises(BlockingIOError, match="another run"), exclusive_lock(tmp_path):
        pass
    child.kill()
    child.communicate()
    with exclusive_lock(tmp_path):
        assert not list(tmp_path.iterdir())


def test_a_lock_whose_file_was_removed_before_it_was_held_is_no_lock(tmp_path, monkeypatch):
    """Another run ends between this one's opening of the file and its locking of it."""
    flock = fcntl.flock

    def late(handle, how):
        (tmp_path / "c.lock").unlink()
        flock(handle, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(BlockingIOError, match="another run"), exclusive_lock(tmp_path / "c"):
        pass


@pytest.mark.parametrize("name", ["demo", "image sets"])
def test_ctrl_c_while_a_command_works_is_130_and_one_line(name, tmp_path, capsys, monkeypatch):
    where_it_works = {"demo": (demo, "sample"), "image sets": (image_sets, "draw_images")}
    monkeypatch.setattr(*where_it_works[name], raising(KeyboardInterrupt))
    code, out, err = said(name, where(name, tmp_path), capsys)
    assert (code, out, "Traceback" in err) == (130, "", False)
    assert "stopped" in err.splitlines()[-1]


@pytest.mark.parametrize("what", ["-m harmonica.train", "benchmarks/gate.py"])
def test_a_pipe_that_nobody_reads_is_141_and_silence(what):
    reader, writer = os.pipe()
    os.close(reader)
    child = started(*what.split(), "--help", stdout=writer)
    os.close(writer)
    _, err = child.communicate(timeout=60)
    assert (child.returncode, err) == (141, "")


def test_a_read_only_home_another_language_and_a_plain_terminal_will_do(tmp_path):
    """No home to write to, no UTF-8, no colours, no network, spaces and accents in the path, output to a file."""
    out = tmp_path / "two words, één"
    Schedule([[1] * 16, [1] * 3 + [0] * 13]).save(schedule := tmp_path / "ein Plan.json")
    environment = {
        **{key: os.environ[key] for key in ("PATH", "SYSTEMROOT", "VIRTUAL_ENV") if key in os.environ},
        "HOME": "/proc/no-such-home", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0",
        "TERM": "dumb", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
        **dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9"),
    }  # fmt: skip
    script = "import sys; from harmonica import demo; demo.HELD_OUT, demo.TIMED = 20, 2; "
    script += "sys.exit(demo.main())"
    options = ["--schedule", schedule, "--steps", "2", "--images", "2", "--out", out]
    how = {"env": environment, "cwd": ROOT, "capture_output": True}
    done = subprocess.run([sys.executable, "-c", script, *options], check=False, **how)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    assert b"\x1b" not in done.stdout + done.stderr
    assert b"Traceback" not in done.stderr
    assert (out / "images.png").stat().st_size > 1000
    assert Schedule.load(out / "schedule.json").steps == 2


def test_every_text_file_is_opened_with_its_encoding_named():
    """Otherwise a file means something else on a machine of another language."""
    for path in [*(ROOT / "harmonica").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            call = getattr(node.func, "attr", "") if isinstance(node, ast.Call) else ""
            if call in ("read_text", "write_text"):
                named = any(word.arg == "encoding" for word in node.keywords)
                assert named, f"{path.name}:{node.lineno}"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_stop_training_and_leave_no_router(value, tmp_path):
    d = single()
    next(d.sites["blocks.1.mlp"].parameters()).data.fill_(value)
    message = "the loss of step 1 is .*; look for NaN in the weights"
    with pytest.raises(FloatingPointError, match=message):
        train_sdt(d, iterations=3, checkpoint=tmp_path / "c", proxy=None, **QUIET)
    assert not list(tmp_path.iterdir())
