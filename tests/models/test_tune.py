"""tune: a table for any pipeline, on target, that `cached` takes."""

from functools import wraps
from importlib import import_module
from pipes import WALKS, pixart_pipe, walked

import pytest
import torch
from conftest import refused
from PIL import Image

import harmonica
from harmonica import Schedule, macs
from harmonica.models.pipelines import cached, from_pipeline, tune
from harmonica.models.sites import sites


def tuned(name, **more):
    make, arguments = WALKS[name]
    arguments = {**arguments, "num_inference_steps": 4, "progress": False}
    return (pipe := make()), tune(pipe, speedup=1.3, **arguments, **more)


@pytest.mark.parametrize("name", ["flux", "wan"])
def test_a_tuned_schedule_is_on_target_and_runs(name):
    pipe, schedule = tuned(name, budget=600)
    d = from_pipeline(pipe, steps=4, **WALKS[name][1])
    assert schedule.speedup(macs(d)) >= 1.3
    assert (schedule.model, schedule.timesteps) == (d.about["model"], d.about["timesteps"])
    with cached(pipe, schedule) as session:
        walked(pipe, d.inputs.of([(0, 7)]))
        assert session.skipped > 0


def test_a_pipeline_that_cannot_be_followed_gets_whole_steps_and_is_told_so():
    make, arguments = WALKS["flux"]
    pipe = make()
    step = pipe.scheduler.step
    pipe.scheduler.step = wraps(step)(lambda *args, **kwargs: step(*args, **kwargs))
    options = {"num_inference_steps": 4, "progress": False, **arguments}
    with pytest.warns(UserWarning, match="wrapped.*Whole steps are chosen from runs"):
        schedule = tune(pipe, speedup=1.3, **options)
    assert schedule.speedup(sites(pipe.transformer).macs) >= 1.3
    assert {tuple(row) for row in schedule.compute.tolist()} <= {(True,) * 9, (False,) * 9}


def test_arguments_that_the_pipeline_does_not_take_are_named_before_anything_runs():
    make, arguments = WALKS["flux"]
    message = "FluxPipeline does not take guidence_scale; did you mean guidance_scale"
    with pytest.raises(TypeError, match=message):
        tune(make(), speedup=1.3, guidence_scale=2.0, **arguments)
    with refused("maximum here"):
        tune(make(), speedup=50.0, num_inference_steps=2, **arguments)
    each = {"prompt_embeds": torch.zeros(2, 5, 12), "pooled_prompt_embeds": torch.zeros(3, 8)}
    with refused("lengths of prompts and each differ"):
        from_pipeline(make(), steps=2, each=each)


def test_the_command_tunes_a_saved_pipeline_and_shows_an_image(tmp_path, capsys):
    main = import_module("harmonica.tune").main
    pixart_pipe().save_pretrained(folder := tmp_path / "pipe")
    out = tmp_path / "out"
    command = ["--pipeline", str(folder), "--out", str(out), "--speedup", "1.4", "--steps", "3"]
    call = "use_resolution_binning=false clean_caption=false height=64 negative_prompt=red"
    assert main([*command, "--budget", "80", "--guidance", "2", "--call", *call.split()]) == 0
    schedule = Schedule.load(out / "schedule.json")
    assert (schedule.steps, schedule.guidance) == (3, 2)
    with Image.open(out / "comparison.png") as picture:
        assert picture.size == (3 * 64, 64)
        pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).float()
    without, _, difference = pixels.view(64, 3, 64, 3).unbind(1)
    assert min(without.std(), difference.std()) > 1
    printed = capsys.readouterr().out
    assert "theoretical speedup" in printed
    assert "comparison.png" in printed
    assert main([*command, "--call", "guidence=2"]) == 2
    assert "PixArtAlphaPipeline does not take guidence" in capsys.readouterr().err
    # Importing the command leaves the function of its name callable.
    import_module("harmonica.tune")
    with pytest.raises((TypeError, ValueError), match="NoneType"):
        harmonica.tune(None, speedup=1.5)
