"""What learned weights cost: seconds to make them, and the share of a walk that goes into the weighted sums.

    python benchmarks/weights.py make            pool, table and weights at 2x, bundled digits, DDIM, T = 20
    python benchmarks/weights.py clock [NAMES]   walks of 10 steps, half of them skipped: tiny, dit-s, dit-xl-256

In `clock` every output, computed ones too, is a sum of the fresh one and three past ones, as after `learn_weights`.
The same walk without its sums is that of the same table under reuse, so weights_over_reuse = all / (all − sums).
`_s` are seconds of the processor, of one thread unless --threads says otherwise, so that other work on the machine does
not count; `_wall_s` is what passed on the clock. Writes results/weights_make.json and results/weights_clock.json.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from record import ended, record
from torch import Tensor

from harmonica import Denoiser, Schedule, learn_weights, macs, references
from harmonica.cache import Feature
from harmonica.forecast import History, weighted_sum
from harmonica.inference.lifetimes import planned
from harmonica.inference.walk import Walk
from harmonica.models import load
from harmonica.models.dit import DiT, DiTDenoiser
from harmonica.samplers import DDIM
from harmonica.search.baselines import dynamic_programming
from harmonica.search.paths import whole_steps
from harmonica.table import outputs_before

BATCH = {"tiny": 64, "dit-s": 8, "dit-xl-256": 1}


def make() -> None:
    """Time the three parts of the way to a cached walk that is near the reference."""
    denoiser = load("tiny", steps=20)
    few = denoiser.draw(96, torch.Generator().manual_seed(20_000_003))
    figures: dict[str, Any] = {}

    def timed(name: str, part: Callable[[], Any]) -> Any:
        wall, own = time.perf_counter(), time.process_time()
        result = part()
        figures[f"{name}_s"] = round(time.process_time() - own, 1)
        figures[f"{name}_wall_s"] = round(time.perf_counter() - wall, 1)
        return result

    pool = timed("pool", lambda: references(denoiser))
    table = timed("table", lambda: dynamic_programming(denoiser, *few, speedup=2.0))
    timed("weights", lambda: learn_weights(denoiser, table, pool))
    names = ("pool", "table", "weights")
    figures["all_s"] = round(sum(figures[f"{name}_s"] for name in names), 1)
    record(
        "weights_make", {"noises": len(pool), "speedup": table.speedup(macs(denoiser)), **figures}
    )


def model(name: str) -> Denoiser:
    """Return a denoiser of 10 steps, with random weights but for tiny."""
    if name != "dit-s":
        how = {} if name == "tiny" else {"weights": "random"}
        return load(name, steps=10, **how)
    sizes = {"input_size": 32, "patch_size": 2, "in_channels": 4, "num_classes": 1000}
    dit = DiT(**sizes, hidden_size=384, depth=12, num_heads=6)
    return DiTDenoiser(dit.eval().requires_grad_(False), DDIM(10), guidance=1.5, guided_channels=3)


def clock(names: list[str], repeats: int) -> None:
    """Time a walk of each model, and its sums."""
    figures = {}
    for name in names:
        denoiser = model(name)
        x, cond = denoiser.draw(BATCH[name], torch.Generator().manual_seed(0))
        compute = whole_steps(denoiser, range(0, 10, 2))
        weights = small_weights(compute)
        walk = Walk(denoiser, Schedule(compute, tuple(denoiser.sites), weights=weights))
        turns = [timed_walk(walk, x, cond) for _ in range(repeats)]
        whole, sums = (median(column) for column in zip(*turns, strict=True))
        figures[name] = {
            "batch": BATCH[name],
            "walk_s": round(whole, 4),
            "sums_s": round(sums, 4),
            "weights_over_reuse": round(whole / (whole - sums), 4),
        }
    record("weights_clock", figures)


def small_weights(compute: Tensor) -> Tensor:
    """Return weights (T, N, 4) by which each entry of a table (T, N) reads all past outputs there are, three at most."""
    weights = 0.01 * (torch.arange(4) <= outputs_before(compute)[:, :, None])
    weights[:, :, 0] = compute.float()
    weights[:, :, 1] += (~compute).float()
    return weights


def timed_walk(walk: Walk, x: Tensor, cond: Any) -> tuple[float, float]:
    """Return the seconds of a walk, and of its sums."""
    spent = 0.0

    def add(weights: Sequence[float], features: History) -> Feature:
        nonlocal spent
        began = time.process_time()
        total = weighted_sum(weights, features, fused=True)
        spent += time.process_time() - began
        return total

    began = time.process_time()
    walk.run(x, cond, lambda k, cache: planned(walk.plan[k], cache, add))
    return time.process_time() - began, spent


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", choices=("make", "clock", "both"), default="both")
    parser.add_argument("names", nargs="*", default=list(BATCH))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.what != "clock":
        make()
    if args.what != "make":
        with torch.inference_mode():
            clock(args.names, args.repeats)


if __name__ == "__main__":
    ended(main)
