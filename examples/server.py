"""A server that draws digits under a schedule: one model, two tables, many requests at once.

    pip install "harmonica-dit[server]"
    SCHEDULES=out/tune/schedule.json uvicorn --app-dir examples --factory server:app

    curl -X POST "localhost:8000/images/mine?label=3&steps=10" -o image.npy   draws request `mine`
    curl -X DELETE localhost:8000/images/mine                                 cancels it
    curl localhost:8000/metrics                                               counts what was reused

SCHEDULES names the files of the tables, which `python -m harmonica.tune` writes. Without it, the
server computes every second of 10 steps, or every third of 20, to be tried at once.

diffusers' schedulers remember where a walk is, so pipelines that run at once need one each. They
share everything else: the server holds one transformer and a few light pipelines around it, and a
request waits for a free one. Each is cached once, when the server starts. A cancelled walk leaves
nothing behind, so its pipeline serves the next request. For your own, change `model()`, the
scheduler's class and the call of the pipeline.
"""

from __future__ import annotations

import io
import os
import threading
from collections import Counter
from queue import Queue
from typing import Any

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler
from fastapi import FastAPI, HTTPException, Response

from harmonica import Schedule, enable_cache
from harmonica.models import digits, load
from harmonica.models.sites import sites

PIPELINES = 4
"""Images that are drawn at once."""


class CancelError(Exception):
    """Somebody asked for a walk to end."""


class StoppableScheduler(DPMSolverMultistepScheduler):
    """Raises CancelError at the next step once `stop` is set."""

    stop = threading.Event()

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Take a step, or raise CancelError."""
        if self.stop.is_set():
            raise CancelError
        return super().step(*args, **kwargs)


def model() -> Any:
    """Return the pipeline to serve."""
    return digits.pipeline(load("tiny"))


def tables(pipe: Any) -> list[Schedule]:
    """Load the tables that SCHEDULES names; without it, return two that need no tuning."""
    files = os.environ.get("SCHEDULES", "").split()
    return [Schedule.load(file) for file in files] or [every(2, pipe, 10), every(3, pipe, 20)]


def every(n: int, pipe: Any, steps: int) -> Schedule:
    """Return the table that computes every n-th step, and reuses all sites in between."""
    names = tuple(sites(pipe.transformer))
    return Schedule([[k % n == 0] * len(names) for k in range(steps)], names)


def pipelines() -> tuple[list[Any], list[Schedule]]:
    """Return light pipelines around the parts of one, each with its own scheduler, and the tables."""
    first = model()
    pipes = []
    for _ in range(PIPELINES):
        scheduler = StoppableScheduler.from_config(first.scheduler.config)
        pipes.append(type(first)(**first.components | {"scheduler": scheduler}))
        pipes[-1].set_progress_bar_config(disable=True)
    return pipes, tables(first)


def app() -> FastAPI:
    """Return the server."""
    pipes, schedules = pipelines()
    offered = [schedule.steps for schedule in schedules]
    sessions = [enable_cache(pipe, schedules) for pipe in pipes]
    stops, counts = dict[str, threading.Event](), {"images": 0, "cancelled": 0}
    free: Queue[Any] = Queue()
    for pipe in pipes:
        free.put(pipe)
    server = FastAPI(title="HarmoniCa")

    @server.post("/images/{name}")
    def draw(name: str, label: int = 0, seed: int = 0, steps: int = 10) -> Response:
        if steps not in offered:
            raise HTTPException(422, f"steps is {steps}; there are tables for {offered}")
        stop = threading.Event()
        if stops.setdefault(name, stop) is not stop:
            raise HTTPException(409, f"{name} is being drawn; choose another name")
        pipe = free.get()  # in a thread of FastAPI's, so waiting here keeps nobody else waiting
        try:
            pipe.scheduler.stop = stop
            noise = torch.Generator().manual_seed(seed)
            options = {"num_inference_steps": steps, "output_type": "np"}
            images = pipe([label], generator=noise, **options).images
        except CancelError:
            counts["cancelled"] += 1
            raise HTTPException(409, f"{name} was cancelled") from None
        finally:
            free.put(pipe)
            stops.pop(name, None)
        counts["images"] += 1
        np.save(file := io.BytesIO(), images)
        return Response(file.getvalue(), media_type="application/octet-stream")

    @server.delete("/images/{name}")
    async def cancel(name: str) -> bool:
        if name in stops:
            stops[name].set()
        return name in stops

    @server.get("/metrics")
    async def metrics() -> Response:
        reports = [session.report() for session in sessions]
        numbers = {f"harmonica_{name}_total": count for name, count in counts.items()}
        for key in ("walks", "asked", "skipped", "in_flight"):
            numbers[f"harmonica_{key}"] = sum(report[key] for report in reports)
        for why, count in sum((Counter(report["beyond"]) for report in reports), Counter()).items():
            numbers[f'harmonica_beyond{{reason="{why}"}}'] = count  # reuse that did not happen
        lines = [f"{name} {number}" for name, number in numbers.items()]
        return Response("\n".join(lines) + "\n", media_type="text/plain")

    return server
