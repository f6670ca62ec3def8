"""tune: a table for any pipeline, on target, that `cached` takes."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch

import harmonica
from harmonica import macs
from harmonica.models.pipelines import cached, from_pipeline, tune
from harmonica.models.sites import sites
from tests.pipes import walked, walks

WALKS = walks()


def tuned(name, **more):
    make, arguments = WALKS[name]
    pipe = make()
    pipe.set_progress_bar_config(disable=True)
    arguments = {**arguments, "num_inference_steps": 4}
    return pipe, tune(pipe, speedup=1.3, progress=False, **arguments, **more)


@pytest.mark.parametrize("name", ["flux", "wan"])
def test_a_tuned_schedule_is_on_target_and_runs(name):
    pipe, schedule = tuned(name, budget=600)
    d = from_pipeline(pipe, steps=4, **WALKS[name][1])
    assert schedule.speedup(macs(d)) >= 1.3
    assert (schedule.model, schedule.timesteps) == (d.about["model"], d.about["timesteps"])
    with cached(pipe, schedule) as session:
        walked(pipe, d.inputs.of([(0, 7)]))
        assert session.skipped > 0


def test_a_pipeline_that_cannot_be_followed_gets_whole_steps_and_is_told_so(monkeypatch):
    from harmonica.models.pipelines import probe
    from harmonica.models.pipelines.recorded import NotFollowedError

    def refuse(*_):
        raise NotFollowedError("a guider has a memory")

    monkeypatch.setattr(probe, "_verify", refuse)
    with pytest.warns(UserWarning, match="a guider has a memory.*Whole steps are chosen from runs"):
        pipe, schedule = tuned("flux")
    assert schedule.speedup(sites(pipe.transformer).macs) >= 1.3
    assert {tuple(row) for row in schedule.compute.tolist()} <= {(True,) * 9, (False,) * 9}


def test_arguments_that_the_pipeline_does_not_take_are_named_before_anything_runs():
    make, arguments = WALKS["flux"]
    with pytest.raises(
        TypeError, match="FluxPipeline does not take guidence_scale; did you mean guidance_scale"
    ):
        tune(make(), speedup=1.3, guidence_scale=2.0, **arguments)
    with pytest.raises(ValueError, match="maximum here"):
        tuned_too_fast = {**arguments, "num_inference_steps": 2}
        tune(make(), speedup=50.0, **tuned_too_fast)
    with pytest.raises(ValueError, match="lengths of prompts and each differ"):
        from_pipeline(make(), steps=2, each={"prompt_embeds": torch.zeros(2, 5, 12),
                                             "pooled_prompt_embeds": torch.zeros(3, 8)})  # fmt: skip


def test_importing_the_command_leaves_the_function_of_its_name_callable():
    import_module("harmonica.tune")
    with pytest.raises((TypeError, ValueError), match="NoneType"):
        harmonica.tune(None, speedup=1.5)
