"""A speedup is asked for: where the table lands, and what training for it takes.

    python benchmarks/targets.py

Trains the bundled model's router (T = 20, DDIM) towards 1.2x, 1.5x, 2x, 2.5x and 3x, refining nothing, and
Learning-to-Cache's beside each as far as it reaches. Writes results/targets.json.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from judges import digits
from record import RESULTS, ended, record
from rivals import learning_to_cache

from harmonica import macs, train_sdt
from harmonica.models import load

TARGETS = (1.2, 1.5, 2.0, 2.5, 3.0)


def main() -> None:
    """Train, land, record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--updates", type=int, default=1500)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    denoiser = load("tiny", steps=20)
    cost, rows = macs(denoiser), []
    for target in TARGETS:
        began = time.perf_counter()
        router = train_sdt(
            denoiser, iterations=args.updates, batch_size=8, lr=0.1, refresh_every=10, budget=0, target_speedup=target,
            progress=False,
        )  # fmt: skip
        row: dict[str, Any] = {"target": target, "updates": args.updates}
        row["seconds"] = round(time.perf_counter() - began, 1)
        row["speedup"] = router.schedule(0.1).speedup(cost)
        row["percent_of_target"] = round(100 * row["speedup"] / target, 2)
        began = time.perf_counter()
        try:
            other = learning_to_cache(
                denoiser, *digits(), speedup=target, updates=args.updates, batch_size=8, lr=0.1
            )
            row["learning_to_cache"] = {
                "seconds": round(time.perf_counter() - began, 1),
                "speedup": other.speedup(cost),
            }
        except ValueError as out_of_reach:
            row["learning_to_cache"] = str(out_of_reach)
        rows.append(row)
        print(row, flush=True)
    record("targets", {"rows": rows}, args.results)


if __name__ == "__main__":
    ended(main)
