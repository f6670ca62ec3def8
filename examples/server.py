"""A server that draws digits under a schedule: one model, several tables, many requests at once.

    pip install "harmonica-dit[server]"
    SCHEDULES=out/tune/schedule.json uvicorn --app-dir examples --factory server:app

    curl -X POST "localhost:8000/images/mine?label=3&steps=10" -o image.npy   draws request `mine`
    curl -X DELETE localhost:8000/images/mine                                 cancels it
    curl localhost:8000/metrics                                               counts what was reused

SCHEDULES names the files of the tables, which `python -m harmonica.tune` writes. Without it,
every second of 10 steps is computed, or every third of 20.

diffusers' schedulers remember where a walk is, so pipelines that run at once need one each, and
share everything else. For your own, change `model()`, the scheduler's class and the pipeline's call.
"""

import io
import os
from collections import Counter
from concurrent.futures import CancelledError
from copy import copy
from queue import Queue
from threading import Event
from typing import Any

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler
from fastapi import FastAPI, HTTPException, Response

from harmonica import Schedule, enable_cache
from harmonica.models import digits, load
from harmonica.models.sites import sites

PIPELINES = 4  # images that are drawn at once


class StoppableScheduler(DPMSolverMultistepScheduler):
    """Raises CancelledError at the next step once `stop` is set."""

    stop = Event()

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Take a step, or raise CancelledError."""
        if self.stop.is_set():
            raise CancelledError
        return super().step(*args, **kwargs)


def model() -> Any:
    """Return the pipeline to serve."""
    return digits.pipeline(load("tiny"))


def tables(pipe: Any) -> list[Schedule]:
    """Load the tables that SCHEDULES names; without it, return two that need no tuning."""
    if files := os.environ.get("SCHEDULES", "").split():
        return [Schedule.load(file) for file in files]
    names = tuple(sites(pipe.transformer))
    tables = [[[k % n == 0] * len(names) for k in range(T)] for n, T in ((2, 10), (3, 20))]
    return [Schedule(table, names) for table in tables]


def light_pipelines(pipe: Any) -> list[Any]:
    """Return pipelines of the same parts, each with a scheduler of its own."""
    pipes = [copy(pipe) for _ in range(PIPELINES)]  # settings too, which `components` leaves out
    for each in pipes:
        each.scheduler = StoppableScheduler.from_config(pipe.scheduler.config)
        each.set_progress_bar_config(disable=True)
    return pipes


def app() -> FastAPI:
    """Return the server."""
    pipes, schedules = light_pipelines(pipe := model()), tables(pipe)
    sessions = [enable_cache(each, schedules) for each in pipes]
    offered, free = [schedule.steps for schedule in schedules], Queue[Any]()
    for each in pipes:
        free.put(each)
    stops, counts, server = dict[str, Event](), Counter[str](), FastAPI(title="HarmoniCa")

    @server.post("/images/{name}")
    def draw(name: str, label: int = 0, seed: int = 0, steps: int = 10) -> Response:
        if steps not in offered:
            raise HTTPException(422, f"steps is {steps}; there are tables for {offered}")
        stop = Event()
        if stops.setdefault(name, stop) is not stop:
            raise HTTPException(409, f"{name} is being drawn; choose another name")
        pipe = free.get()  # waits in one of FastAPI's 40 threads
        options = {"num_inference_steps": steps, "generator": torch.Generator().manual_seed(seed)}
        try:
            pipe.scheduler.stop = stop
            images = pipe([label], output_type="np", **options).images
        except CancelledError:
            counts["cancelled"] += 1
            raise HTTPException(409, f"{name} was cancelled") from None
        finally:
            free.put(pipe)
            del stops[name]
        counts["images"] += 1
        np.save(file := io.BytesIO(), images)
        return Response(file.getvalue(), media_type="application/octet-stream")

    @server.delete("/images/{name}")
    async def cancel(name: str) -> bool:
        stops.get(name, Event()).set()
        return name in stops

    @server.get("/metrics")
    async def metrics() -> Response:
        numbers = Counter(images_total=counts["images"], cancelled_total=counts["cancelled"])
        for report in (session.report() for session in sessions):
            numbers.update({key: report[key] for key in ("walks", "asked", "skipped", "in_flight")})
            for reason, count in report["beyond"].items():  # computed although the table reuses
                numbers[f'beyond{{reason="{reason}"}}'] += count
        lines = (f"harmonica_{name} {number}\n" for name, number in numbers.items())
        return Response("".join(lines), media_type="text/plain")

    return server
