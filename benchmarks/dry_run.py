"""What training a router takes on one 80 GiB card, at the defaults: memory and time, for every model that `load` knows.

    python benchmarks/dry_run.py

Counted on the meta device, as by `python -m harmonica.train --dry-run --target 1.5`, in bfloat16 at T = 20; nothing is
computed. Writes results/dry_run.json and the table between the two marks in docs/scale.md.

Two updates of DiT-B/2 at batch 2 are then run on this CPU, and the most that Linux counts for them is held against the
count: with the C library's allocator as it is, and with MALLOC_MMAP_THRESHOLD_=65536. As it is, that allocator keeps
freed memory in its heap, in pieces that no later tensor fits into. CUDA's allocator has no such heap.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from record import ended, memory_mib, record
from update import build

from harmonica import Router, sdt
from harmonica.models import MODELS, load
from harmonica.train import complete, needs, parser
from harmonica.training.dry_run import dry_run

GIB = 2**30
PAGE = Path(__file__).parents[1] / "docs" / "scale.md"
MARKS = "<!-- begin dry run -->", "<!-- end dry run -->"
COLUMNS = ("weights", "update", "lambda", "search")


def counted(model: str) -> dict[str, Any]:
    """Count one model at its defaults."""
    start = time.monotonic()
    args = parser().parse_args(
        ["--model", model, "--device", "cuda", "--dry-run", "--target", "1.5"]
    )
    complete(args)
    plan = needs(args)
    memory = {f"{name}_gib": round(size / GIB, 2) for name, size in plan.memory.items()}
    return {
        "batch_size": args.batch_size, "activation_checkpointing": args.activation_checkpointing,
        "updates": args.iterations, "predictions": plan.predictions, "weights_gib": round(plan.weights / GIB, 2),
        **memory, "gpu_minutes": round(60 * plan.hours(), 1), "fits_80_gib": max(plan.memory.values()) < 80 * GIB,
        "counting_took_s": round(time.monotonic() - start, 1),
    }  # fmt: skip


def updates() -> float:
    """Return the MiB that DiT-B/2 and two updates take here, beside Python, torch and what they load when first used."""
    two_updates(load("tiny"))
    before = memory_mib("VmRSS")
    two_updates(build("DiT-B/2"))
    return memory_mib("VmHWM") - before


def two_updates(d: Any) -> None:
    """Run the first two updates of a trajectory of two noises."""
    noise = d.draw(2, torch.Generator().manual_seed(0))
    for _ in islice(sdt(d, Router(d.steps, d.sites), [noise], proxy=None), 2):
        pass


def against_this_cpu() -> dict[str, Any]:
    """Hold the count of an update against what one takes, in a process of its own each."""
    d = build("DiT-B/2")
    d.model.to("meta")
    counted_mib = dry_run(d, batch_size=2, proxy=None).memory["update"] / 2**20
    figures: dict[str, Any] = {"counted_mib": round(counted_mib)}
    for name, more in {
        "taken_mib": {},
        "taken_without_heap_mib": {"MALLOC_MMAP_THRESHOLD_": "65536"},
    }.items():
        command = [sys.executable, __file__, "--updates"]
        said = subprocess.run(
            command, capture_output=True, text=True, check=True, env=os.environ | more
        ).stdout
        figures[name] = round(float(said))
    return figures


def table(figures: dict[str, Any]) -> str:
    """Return the rows of the page."""
    rows = [
        "| model | noises | checkpointing | weights | update | λ | search, one noise | GPU-minutes |",
        "|" + "---|" * 8,
    ]
    for model, f in figures.items():
        sizes = [f"{f[key]:.1f}" if (key := f"{name}_gib") in f else "none" for name in COLUMNS]
        again = "yes" if f["activation_checkpointing"] else "no"
        rows.append(
            f"| {model} | {f['batch_size']} | {again} | {' | '.join(sizes)} | {f['gpu_minutes']:.0f} |"
        )
    return "\n".join(rows)


def main() -> None:
    """Count all, record after each, and bring the page up to date."""
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument(
        "models", nargs="*", default=[m for m in MODELS if m != "dit-xl"], metavar="MODEL"
    )
    arguments.add_argument(
        "--updates",
        action="store_true",
        help="only run two updates of DiT-B/2, and print their MiB",
    )
    args = arguments.parse_args()
    if args.updates:
        print(updates())
        return
    figures: dict[str, Any] = {}
    for model in args.models:
        figures[model] = counted(model)
        print(f"{model:18}{figures[model]}", flush=True)
    record("dry_run", {"models": figures, "DiT-B/2 on this CPU": against_this_cpu()})
    page = PAGE.read_text(encoding="utf-8")
    between = re.compile(f"(?<={MARKS[0]}\n).*(?={MARKS[1]})", re.DOTALL)
    PAGE.write_text(between.sub(f"\n{table(figures)}\n\n", page), encoding="utf-8")


if __name__ == "__main__":
    ended(main)
