"""The example server: many requests at once, some of them cancelled, each image the one made alone."""

import asyncio
import gc
import importlib.util
import io
import pipes
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import seeded

from harmonica import Schedule, cached
from harmonica.models.sites import sites

pytest.importorskip("fastapi")
httpx = pytest.importorskip("httpx")


def server():
    file = Path(__file__).parent.parent / "examples/server.py"
    spec = importlib.util.spec_from_file_location("example_server", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_each_pipeline_of_the_server_has_all_settings_and_a_scheduler_of_its_own():
    module = server()
    (pipe := module.model()).register_to_config(boundary_ratio=0.5)
    own = module.light_pipelines(pipe)
    assert {each.config.boundary_ratio for each in own} == {0.5}
    assert len({id(each.scheduler) for each in (pipe, *own)}) == 1 + module.PIPELINES


def request(i):
    return {"label": i % 10, "seed": i, "steps": (10, 20)[i % 2]}


def expected(module, i):
    pipe, steps = module.model(), request(i)["steps"]
    with cached(pipe, module.tables(pipe)):
        options = {"generator": seeded(i), "num_inference_steps": steps, "output_type": "np"}
        return pipe([i % 10], **options).images


async def serve(app, requests, cancelled=()):
    """Post pairs of a name and parameters at once, and cancel some; return answers and metrics."""
    how = {"transport": httpx.ASGITransport(app), "base_url": "http://server"}
    async with httpx.AsyncClient(**how) as client:

        async def cancel(name):
            while not (await client.delete(f"/images/{name}")).json():
                await asyncio.sleep(0)

        posts = [client.post(f"/images/{name}", params=params) for name, params in requests]
        answers = asyncio.gather(*posts)
        await asyncio.gather(*map(cancel, cancelled))
        return await answers, (await client.get("/metrics")).text


def post(app, *names, **params):
    return asyncio.run(serve(app, [(name, params) for name in names]))


def numbered(count):
    return [(i, request(i)) for i in range(count)]


def test_fifty_requests_at_once_ten_of_them_cancelled_give_the_images_made_alone():
    module, cancelled = server(), range(3, 50, 5)
    answers, metrics = asyncio.run(serve(module.app(), numbered(50), cancelled))
    assert {answer.status_code for answer in answers} == {200, 409}
    drawn = [i for i, answer in enumerate(answers) if answer.status_code == 200]
    assert set(range(50)) - set(cancelled) <= set(drawn)
    for i in drawn[::4]:
        assert np.array_equal(np.load(io.BytesIO(answers[i].content)), expected(module, i)), i
    assert f"harmonica_images_total {len(drawn)}\n" in metrics
    assert f"harmonica_cancelled_total {50 - len(drawn)}\n" in metrics
    assert "harmonica_in_flight 0\n" in metrics


def test_memory_is_flat():
    app, counts = server().app(), []
    for _ in range(3):
        asyncio.run(serve(app, numbered(12), [5]))
        gc.collect()
        counts.append(sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects()))
    assert counts[2] < counts[1] + 6  # a leak would be one tensor or more for each of 12 requests


def test_steps_without_a_table_are_refused_with_what_there_is():
    (answer,), _ = post(server().app(), "mine", steps=7)
    assert answer.status_code == 422
    assert "there are tables for [10, 20]" in answer.text


def test_a_name_that_is_in_use_is_refused_and_the_first_of_that_name_is_drawn():
    answers, _ = post(server().app(), "mine", "mine")
    assert sorted(answer.status_code for answer in answers) == [200, 409]
    refused = next(answer for answer in answers if answer.status_code == 409)
    assert "mine is being drawn; choose another name" in refused.text


def test_tables_that_were_tuned_are_read_from_files(monkeypatch, tmp_path):
    module, path = server(), tmp_path / "schedule.json"
    Schedule([[k % 2 == 0] * 16 for k in range(5)]).save(path)
    monkeypatch.setenv("SCHEDULES", str(path))
    (answer,), metrics = post(module.app(), "mine", steps=5)
    assert answer.status_code == 200
    assert "harmonica_skipped 32\n" in metrics  # 16 sites at two of 5 steps


def test_metrics_say_how_often_and_why_a_site_was_not_reused():
    module = server()
    pipe = module.model()
    for site in sites(pipe.transformer).values():
        site.register_forward_hook(lambda _, __, out: out.mul_(0.5))
    module.model = lambda: pipe
    _, metrics = post(module.app(), "mine")
    assert 'harmonica_beyond{reason="changed in place"} 80\n' in metrics


def test_light_pipelines_are_made_of_any_pipeline():
    module = server()
    served = module.light_pipelines(pipes.pixart_pipe())
    assert len({id(pipe.scheduler) for pipe in served}) == module.PIPELINES
    assert {id(pipe.text_encoder) for pipe in served} == {id(served[0].text_encoder)}
