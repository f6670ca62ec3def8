"""The scripts: how each ends, and the speed benchmarks' laws: tables of a given share, ratios within a turn, a run that
continues or is cut short.
"""

import ast
import json
import os
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest
from conftest import ROOT, press_ctrl_c, started

BENCHMARKS = Path(__file__).parents[1]
sys.path.insert(0, str(BENCHMARKS))
speed = pytest.importorskip("speed")


def test_a_drawn_table_has_its_share_and_ratios_are_taken_within_a_turn():
    for cur in (0, 25, 37.5, 50):
        schedule = speed.schedule_of(10, tuple("abcdefgh"), cur)
        assert abs(100 * schedule.cur - cur) < 1
    assert speed.schedule_of(10, ("a",), 50) == speed.schedule_of(10, ("a",), 50)
    rows = speed.summary({"plain": [2.0, 4.0, 8.0], "fast": [1.0, 2.0, 4.0]}, {"fast": 2.5})
    assert rows["fast"]["measured_speedup"] == [2.0, 2.0, 2.0]
    assert rows["fast"]["efficiency"] == 0.8
    assert "efficiency" not in rows["plain"]


def test_a_run_writes_every_case_and_continues_where_it_was_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "ON_CPU", (speed.Case("tiny", 1, 50, 4),))
    arguments = ["--out", str(tmp_path), "--only", "tiny", "--turns"]
    speed.main([*arguments, "1"])
    speed.main([*arguments, "2"])
    (case,) = json.loads((tmp_path / "speed.json").read_text())["figures"].values()
    assert {way: len(column) for way, column in case["turns"].items()} == dict.fromkeys(
        ("plain", "sites", "exact", "fast"), 2
    )
    assert case["features_alive_mib"] <= case["features_mib"]
    assert set(case["waterfall"]) == {"plain", "sites", "fast"}
    assert (tmp_path / "speed_waterfall.png").stat().st_size > 1000


def test_every_item_for_a_card_runs_on_the_cpu_or_says_why_not(tmp_path, monkeypatch):
    options = ["--device", "cpu", "--quick", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *options])
    import_module("gpu").main()
    figures = json.loads((tmp_path / "gpu-quick.json").read_text(encoding="ascii"))["figures"]
    assert not [name for name, item in figures.items() if "failed" in str(item)]
    assert {"target", "dit", "update", "refinement", "milliseconds", "training"} <= figures.keys()


def test_ctrl_c_ends_a_benchmark_with_workers_at_once_in_one_line(tmp_path):
    options = f"--noises 64 --steps 4 --out {tmp_path}/o --results {tmp_path}/r".split()
    how = {"stdout": subprocess.DEVNULL, "start_new_session": True}
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731 (a background job's is not)
    child = started("benchmarks/quality.py", *options, preexec_fn=heard, **how)
    deadline = time.monotonic() + 90
    while not list(tmp_path.glob("o/*.json")) and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(0.5)
    interrupt = lambda number: os.killpg(child.pid, number)  # noqa: E731 (a terminal tells all)
    _, err = press_ctrl_c(child, interrupt, timeout=20)
    assert child.returncode == 130
    assert err.splitlines() == ["python benchmarks/quality.py: stopped"]
    assert not list(tmp_path.rglob("*.part"))
    assert not (tmp_path / "r").exists()


SHARED = ("record", "bootstrap", "scores", "rivals", "smoothcache", "fuzzing", "judges")
"""Files of benchmarks/ that are not run by themselves."""


def test_every_benchmark_ends_as_a_command_of_the_library_does():
    """Ctrl-C, bad input and a closed pipe take one line because `record.ended` runs it."""
    scripts = [path for path in (ROOT / "benchmarks").glob("*.py") if path.stem not in SHARED]
    assert len(scripts) > 10
    for path in scripts:
        text = path.read_text(encoding="utf-8")
        assert ast.unparse(ast.parse(text).body[-1]).endswith("ended(main)"), path.name
        assert "parse_args(" in text, f"{path.name} would run for minutes when asked for --help"
