"""The demo and its plots: what a user meets first."""

import re
from pipes import pixart_pipe

import pytest
import torch
from conftest import raising, said

from harmonica import Router, Schedule, demo
from harmonica import pictures as plots

FILES = ["error.png", "images.png", "router.png", "schedule.json"]


def test_the_demo_makes_a_table_measures_and_saves(tmp_path, short_demo, capsys):
    out = tmp_path / "with space"
    code, text, _ = said(demo, ["--steps", 4, "--out", out], capsys)
    assert (code, "beyond the paper" in text) == (0, True)
    assert sorted(p.name for p in out.iterdir()) == FILES
    schedule = Schedule.load(out / "schedule.json")
    assert (schedule.steps, schedule.model, schedule.sampler) == (4, "tiny", "ddim")


def test_the_demos_table_shows_theory_and_clock_side_by_side(tmp_path, capsys, short_demo):
    names = [f"blocks.{i}.{kind}" for i in range(8) for kind in ("attn", "mlp")]
    schedule = Schedule([[k % 2 == 0] * 16 for k in range(4)], tuple(names))
    schedule.save(tmp_path / "s.json")
    code, text, _ = said(demo, f"--steps 4 --schedule {tmp_path}/s.json --out {tmp_path}", capsys)
    assert (code, Schedule.load(tmp_path / "schedule.json")) == (0, schedule)
    assert re.search(r"CUR\)\s+50.0%", text)
    assert re.search(r"distance to the reference\s+\S+  \(uncached \S+\)", text)
    rows = "theoretical speedup, measured speedup, measured / theoretical, distance to uncached"
    for row in (*rows.split(", "), str(tmp_path)):
        assert row in text


def test_a_schedule_is_refused_before_anything_runs_or_is_frozen(tmp_path, capsys, short_demo):
    Router(7, 16).schedule().save(tmp_path / "s.json")
    code, _, err = said(demo, f"--schedule {tmp_path}/s.json --out {tmp_path}/out", capsys)
    assert (code, len(err.splitlines()), "7 steps" in err) == (2, 1, True)
    assert not (tmp_path / "out").exists()
    Router(3, 16, logits=torch.full((2, 16), -4.0)).save(tmp_path / "r.safetensors")
    options = f"--steps 3 --schedule {tmp_path}/r.safetensors --out {tmp_path}"
    assert re.search(r"CUR\)\s+66.7%", said(demo, options, capsys)[1])


def test_what_was_made_is_saved_before_all_else(tmp_path, monkeypatch, short_demo, capsys):
    monkeypatch.setattr(demo, "sample", raising(torch.OutOfMemoryError("out of memory")))
    assert said(demo, f"--steps 3 --out {tmp_path}", capsys)[0] == 2
    assert Schedule.load(tmp_path / "schedule.json").steps == 3


@pytest.mark.parametrize("model", ["dit-xl", "pixart-alpha-256"])
def test_random_weights_are_said_to_be_so(model, tmp_path, capsys, small_models, short_demo):
    arguments = f"--model {model} --weights random --steps 4 --images 2 --out {tmp_path}"
    code, text, _ = said(demo, arguments, capsys)
    assert code == 0
    assert "the timing is real, the pictures are noise" in text
    assert re.search(r"CUR\)\s+50.0%", text)  # no training: every second step computes
    assert sorted(p.name for p in tmp_path.iterdir()) == FILES
    assert said(demo, f"{arguments} --schedule {tmp_path}/schedule.json", capsys)[0] == 0


def test_a_real_folder_is_learned_on_and_decoded(tmp_path, capsys, small_models, short_demo):
    pixart_pipe().save_pretrained(tmp_path / "pixart")
    (tmp_path / "prompts.txt").write_text("a blue boat\nthe cat in the house\n")
    options = "--model pixart-alpha-256 --steps 3 --iterations 2 "
    paths = f"--weights {tmp_path}/pixart --prompts {tmp_path}/prompts.txt --out {tmp_path}/out"
    assert said(demo, options + paths, capsys)[0] == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == FILES
    assert Schedule.load(tmp_path / "out" / "schedule.json").model == "pixart-alpha-256"


def test_every_plot_has_labelled_axes_and_says_the_cur(tmp_path):
    names = [f"blocks.{i}.{kind}" for i in range(3) for kind in ("attn", "mlp")]
    router, images = Router(5, names), torch.rand(4, 1, 8, 8) * 2 - 1
    walk = [images * k for k in range(5)]
    figures = {
        "heat": plots.router_heatmap(router.schedule(0.5)),
        "soft": plots.router_heatmap(router(), names),
        "images": plots.comparison(images, images + 0.1, labels=range(4)),
        "sheet": plots.sheet(images),
        "error": plots.error_along_walk(walk, {"a": [x + 0.1 for x in walk]}),
        "lambda": plots.per_step({"a": [0.0, 1e-3, 1e-5]}, ylabel="λ", log=True),
    }
    for name, figure in figures.items():
        figure.savefig(tmp_path / f"{name}.png")
    heat = figures["heat"]
    assert "CUR" in heat.get_suptitle()
    assert [ax.get_title() for ax in heat.axes[:2]] == ["attention", "feed-forward"]
    assert heat.axes[0].get_ylabel() == "block"
    for ax in (figures["error"].axes[0], figures["lambda"].axes[0]):
        assert ax.get_xlabel() == "executed step k"
        assert ax.get_ylabel()
