"""The demo and its plots: what a user meets first."""

import re
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

from harmonica import Router, Schedule, demo
from harmonica.evaluation import pictures as plots


@pytest.fixture
def unpainted(monkeypatch):
    """Leave the drawing of pictures, the slowest part, to the tests that are about pictures."""
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: Path(path).touch())


@pytest.fixture
def small(monkeypatch):
    """Draw few noises, and learn for two updates."""
    few = {"HELD_OUT": 20, "TIMED": 2, "POOL": 4, "CHOOSING": 2, "UPDATES": 2}
    for name, value in few.items():
        monkeypatch.setattr(demo, name, value)


FILES = ["error.png", "images.png", "router.png", "schedule.json"]


@pytest.mark.parametrize("options", [(), ("--method", "sdt", "--iterations", "20")])
def test_the_demo_makes_a_table_measures_and_saves(options, tmp_path, small, unpainted, capsys):
    out = tmp_path / "with space"
    assert demo.main(["--steps", "4", *options, "--out", str(out)]) == 0
    assert sorted(p.name for p in out.iterdir()) == FILES
    schedule = Schedule.load(out / "schedule.json")
    assert (schedule.steps, schedule.model, schedule.sampler) == (4, "tiny", "ddim")
    assert ("beyond the paper" in capsys.readouterr().out) == (not options)
    # and again with the schedule it saved, on another number of steps and on the same
    again = ["--schedule", str(out / "schedule.json"), "--out", str(tmp_path / "again")]
    assert demo.main(["--steps", "4", *again]) == 0
    assert Schedule.load(tmp_path / "again" / "schedule.json") == schedule
    assert demo.main(["--steps", "5", *again]) == 2


def test_the_demos_table_shows_theory_and_clock_side_by_side(tmp_path, capsys, small, unpainted):
    names = [f"blocks.{i}.{kind}" for i in range(8) for kind in ("attn", "mlp")]
    Schedule([[1] * 16, [0] * 16, [1] * 16, [0] * 16], sites=tuple(names)).save(tmp_path / "s.json")
    options = ["--schedule", str(tmp_path / "s.json"), "--out", str(tmp_path)]
    assert demo.main(["--steps", "4", *options]) == 0
    said = capsys.readouterr().out
    assert re.search(r"CUR\)\s+50.0%", said)
    assert re.search(r"distance to the reference\s+\S+  \(uncached \S+\)", said)
    for row in (
        "theoretical speedup", "measured speedup", "measured / theoretical", "distance to uncached",
        "images that show their label",
    ):  # fmt: skip
        assert row in said
    assert str(tmp_path) in said


def test_a_schedule_for_another_number_of_steps_is_refused_before_anything_runs(tmp_path, capsys):
    Router(7, 16).schedule().save(tmp_path / "s.json")
    assert demo.main(["--schedule", str(tmp_path / "s.json"), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert "7 steps" in said
    assert not (tmp_path / "out").exists()


def test_the_threshold_of_the_command_freezes_a_router_given_as_schedule(
    tmp_path, capsys, small, unpainted
):
    logits = torch.zeros(2, 16)
    Router(3, 16, logits=logits).save(tmp_path / "router.safetensors")
    options = f"--steps 3 --schedule {tmp_path}/router.safetensors --out {tmp_path} --tau 0.6"
    assert demo.main(options.split()) == 0
    assert re.search(r"CUR\)\s+66.7%", capsys.readouterr().out)


def test_what_was_made_is_saved_before_anything_else_can_go_wrong(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(demo, "sample", full)
    options = f"--method sdt --steps 3 --iterations 2 --out {tmp_path}"
    assert demo.main(options.split()) == 2
    assert Schedule.load(tmp_path / "schedule.json").steps == 3


@pytest.fixture
def small_models(monkeypatch):
    """Shrink the real models; everything else is as it is."""
    from harmonica.models import DITS, PIXART, pixart
    from harmonica.models.pixart import Variant

    monkeypatch.setitem(
        DITS, "dit-xl", {"input_size": 4, "hidden_size": 8, "depth": 1, "num_heads": 2}
    )
    monkeypatch.setitem(PIXART, "pixart-alpha-256", Variant(8, 6, False, "a", "b"))
    small = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 1}
    monkeypatch.setattr(pixart, "XL", {**small, "cross_attention_dim": 24, "caption_channels": 12})


@pytest.mark.parametrize("model", ["dit-xl", "pixart-alpha-256"])
def test_random_weights_are_timed_and_said_to_be_noise(
    model, tmp_path, capsys, small_models, unpainted
):
    arguments = f"--model {model} --weights random --steps 4 --images 2 --out {tmp_path}".split()
    assert demo.main(arguments) == 0
    said = capsys.readouterr().out
    assert "the timing is real, the pictures are noise" in said
    assert re.search(r"CUR\)\s+50.0%", said)  # no training: every second step computes
    assert sorted(p.name for p in tmp_path.iterdir()) == FILES
    assert demo.main([*arguments, "--schedule", str(tmp_path / "schedule.json")]) == 0
    trained = ["--method", "sdt", "--iterations", "3"]
    assert demo.main([*arguments, *trained]) == 0


def test_a_real_folder_is_trained_decoded_and_pictured(tmp_path, small_models, unpainted):
    from pipes import pixart_pipe

    pixart_pipe().save_pretrained(tmp_path / "pixart")
    (tmp_path / "prompts.txt").write_text("a blue boat\nthe cat in the house\n")
    options = "--model pixart-alpha-256 --steps 3 --method sdt --iterations 2"
    paths = {"--weights": "pixart", "--prompts": "prompts.txt", "--out": "out"}
    arguments = [*options.split()]
    for option, name in paths.items():
        arguments += [option, str(tmp_path / name)]
    assert demo.main(arguments) == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == FILES
    assert Schedule.load(tmp_path / "out" / "schedule.json").model == "pixart-alpha-256"


def test_every_plot_has_labelled_axes_and_says_the_cur(tmp_path):
    names = [f"blocks.{i}.{kind}" for i in range(3) for kind in ("attn", "mlp")]
    router = Router(5, names)
    images = torch.rand(4, 1, 8, 8) * 2 - 1
    walk = [images * k for k in range(5)]
    figures = {
        "heat": plots.router_heatmap(router.schedule(0.5)),
        "soft": plots.router_heatmap(router(), names),
        "images": plots.comparison(images, images + 0.1, labels=range(4)),
        "sheet": plots.sheet(images),
        "error": plots.error_along_walk(walk, {"a": [x + 0.1 for x in walk]}),
        "lambda": plots.lambda_per_step({"a": torch.tensor([0.0, 1e-3, 1e-5])}),
    }
    for name, figure in figures.items():
        assert isinstance(figure, Figure)
        figure.savefig(tmp_path / f"{name}.png")
    heat = figures["heat"]
    assert "CUR" in heat.get_suptitle()
    assert [ax.get_title() for ax in heat.axes[:2]] == ["attention", "feed-forward"]
    assert heat.axes[0].get_ylabel() == "block"
    for name in ("error", "lambda"):
        ax = figures[name].axes[0]
        assert ax.get_xlabel() == "executed step k"
        assert ax.get_ylabel()
