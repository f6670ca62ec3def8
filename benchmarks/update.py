"""One SDT update, as here and as the released code runs it: time, router gradient, peak memory.

    python benchmarks/update.py

here        weights frozen, teacher without gradients, gradient of one row of the router
checkpointed    the same, and blocks run again in backward instead of keeping what they computed
released    weights unfrozen, teacher with gradients, gradients of every weight, computed and thrown away

on DiT-B/2 at 256×256 with random weights, by turns; peak memory of each in a process of its own.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from statistics import median

import torch
from record import ended, memory_mib, record
from speed import SIZES
from torch import Tensor

from harmonica import Router, blend, gated, objective
from harmonica.cache import Cache
from harmonica.models.dit import DiT, DiTDenoiser
from harmonica.samplers import DDIM


def build(size: str) -> DiTDenoiser:
    """Return a denoiser of an original size; no weight is zero, so that gradients are not."""
    torch.manual_seed(0)
    model = DiT(**SIZES[size])
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return DiTDenoiser(model, DDIM(10), guided_channels=3, name=size)


def update(
    d: DiTDenoiser, router: Router, x: Tensor, y: Tensor, cache: Cache, *, way: str
) -> float:
    """Run step k = 1 of a trajectory to the gradient of its row; return seconds."""
    released = way == "released"
    d.model.activation_checkpointing = way == "checkpointed"
    d.model.requires_grad_(released)
    d.model.zero_grad(set_to_none=True)
    router.zero_grad(set_to_none=True)
    cache = cache.copy()
    start = time.perf_counter()
    with torch.set_grad_enabled(released):
        target = d.predict(x, 1, y)
    r = router.row(1)
    with gated(d.sites, blend(r, cache, 0.1)):
        loss = objective(d.predict(x, 1, y), target, r, 1.0, 7e-8)
        loss.backward(inputs=None if released else [router.rows[0]])
    return time.perf_counter() - start


def main() -> None:
    """Measure and record; with --only, run one way once and print its peak memory."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="DiT-B/2", choices=SIZES)
    parser.add_argument("--batch", type=int, default=2, help="noises; guidance doubles them")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--only", choices=("here", "checkpointed", "released"))
    args = parser.parse_args()
    d = build(args.size)
    router = Router(d.steps, d.sites, generator=torch.Generator().manual_seed(0))
    x, y = d.draw(args.batch, torch.Generator().manual_seed(0))
    cache: Cache = {}
    with torch.no_grad(), gated(d.sites, blend(router.row(0), cache, 0.1)):
        x = d.step(x, d.predict(x, 0, y), 0, {})
    if args.only:
        update(d, router, x, y, cache, way=args.only)
        print(int(memory_mib("VmHWM")))  # a child's ru_maxrss would start at its parent's
        return
    times, gradients = {"here": [], "checkpointed": [], "released": []}, {}
    for turn in range(args.turns + 1):
        for way in times:
            seconds = update(d, router, x, y, cache, way=way)
            gradients[way] = router.rows[0].grad
            if turn:
                times[way].append(seconds)
    figures = {f"seconds_{way}": round(median(column), 3) for way, column in times.items()}
    figures["ratio"] = round(
        median(b / a for a, b in zip(times["here"], times["released"], strict=True)), 3
    )
    figures["router_gradients_equal_bit_for_bit"] = all(
        torch.equal(gradients["here"], gradients[way]) for way in ("checkpointed", "released")
    )
    for way in times:
        command = [
            sys.executable,
            __file__,
            "--size",
            args.size,
            "--batch",
            str(args.batch),
            "--only",
            way,
        ]
        figures[f"peak_mib_{way}"] = int(
            subprocess.run(command, capture_output=True, text=True, check=True).stdout
        )
    record("update", {"size": args.size, "batch": args.batch, **figures})


if __name__ == "__main__":
    ended(main)
