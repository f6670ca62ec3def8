"""Drive examples/server.py: requests, errors, wrong images, and memory after 100 and 500 images.

    python benchmarks/server.py

Fifty requests run at once, and every fifth of them is cancelled. An image is wrong if a bit of it
differs from the one that a pipeline of its own draws with the same table. Memory is the resident
set of the process.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import io
import runpy
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from record import ended, memory_mib, record

from harmonica import cached

ROOT = Path(__file__).parents[1]
SERVER: dict[str, Any] = runpy.run_path(str(ROOT / "examples" / "server.py"))
TOGETHER, SEEDS = 50, 20


def request(i: int) -> dict[str, int]:
    """Return what the i-th request asks for; they repeat after SEEDS."""
    return {"label": i % 10, "seed": i % SEEDS, "steps": (10, 20)[i % 2]}


@cache
def drawn_alone(label: int, seed: int, steps: int) -> np.ndarray:
    """Return the image of a request as a pipeline of its own draws it under the table."""
    pipe, noise = SERVER["model"](), torch.Generator().manual_seed(seed)
    with cached(pipe, SERVER["tables"](pipe)):
        return pipe([label], generator=noise, num_inference_steps=steps, output_type="np").images


async def fifty(client: httpx.AsyncClient, first: int) -> list[tuple[int, httpx.Response]]:
    """Send TOGETHER requests at once and cancel every fifth; return their answers."""
    numbers = range(first, first + TOGETHER)
    asked = {
        i: asyncio.create_task(client.post(f"/images/{i}", params=request(i))) for i in numbers
    }

    async def cancel(i: int) -> None:
        while not asked[i].done() and not (await client.delete(f"/images/{i}")).json():
            await asyncio.sleep(0.02)

    await asyncio.gather(*map(cancel, numbers[3::5]))
    return [(i, await answer) for i, answer in asked.items()]


async def serve(images: int) -> dict[str, float]:
    """Send requests until so many images were drawn; return the figures."""
    counts, memory = Counter[str](), dict[int, float]()
    for i in range(SEEDS):
        drawn_alone(**request(i))  # now, so that their memory is there from the beginning
    transport = httpx.ASGITransport(SERVER["app"](), raise_app_exceptions=False)
    async with httpx.AsyncClient(
        transport=transport, base_url="http://server", timeout=None
    ) as client:
        while counts["images"] < images:
            for i, answer in await fifty(client, counts["requests"]):
                counts["requests"] += 1
                counts[{200: "images", 409: "cancelled"}.get(answer.status_code, "errors")] += 1
                if answer.status_code == 200:
                    image = np.load(io.BytesIO(answer.content))
                    counts["wrong"] += not np.array_equal(image, drawn_alone(**request(i)))
                    if counts["images"] in (100, images):
                        gc.collect()
                        memory[counts["images"]] = round(memory_mib("VmRSS"), 1)
    names = ("requests", "images", "cancelled", "errors", "wrong")
    return {name: counts[name] for name in names} | {
        f"resident_mib_after_{count}_images": held for count, held in memory.items()
    }


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=500)
    args = parser.parse_args()
    torch.set_num_threads(1)
    record("server", asyncio.run(serve(args.images)))


if __name__ == "__main__":
    ended(main)
