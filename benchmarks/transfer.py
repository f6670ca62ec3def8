"""Run tables and weights on a model or a sampler that they were not made for.

    python benchmarks/quality.py --methods … --speedups 2      first: it makes the tables and the references
    python benchmarks/transfer.py --out out/quality            half an hour on one core

Each figure is the distance to the reference over that of the uncached walk: 1 is as far as no cache at all. The library
refuses a table under other timesteps than its own, so this script takes the timesteps off; a table with another number
of steps has other rows and stays refused. Writes results/transfer.json.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from quality import HELD_OUT, held_out, pool_file
from record import RESULTS, ended, record

from harmonica import Schedule
from harmonica.inference.walk import Walk
from harmonica.models import load
from harmonica.search.references import image_mse

METHODS = {
    "dynamic programming": 1,
    "weights on dynamic programming": 0,
}  # and the order of forecasts
PLACES = (
    ("tiny", "ddim"),
    ("tiny", "dpm-solver++"),
    ("garments", "ddim"),
    ("garments", "dpm-solver++"),
)


def rows_at(model: str, sampler: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Run every table that there is at one model and sampler, at the noises of its references."""
    denoiser, args.model = load(model, steps=20, sampler=sampler), model
    if not pool_file(denoiser, args.noises, HELD_OUT, args).exists():
        return []
    pool, plain = held_out(denoiser, args)
    rows = []
    for method, order in METHODS.items():
        for source, other in PLACES:
            file = args.out / "tables" / f"{source}-20-{other}-{method}-2-0-1500.json"
            if not file.exists():
                continue
            schedule = Schedule.load(file)
            schedule = replace(schedule, timesteps=tuple(denoiser.about["timesteps"]), order=order)
            images = Walk(denoiser, schedule)(pool.x, pool.cond)
            ratio = image_mse(images, pool.images) / image_mse(plain, pool.images)
            rows.append(
                {
                    "method": method,
                    "made_for": [source, other],
                    "run_on": [model, sampler],
                    "ratio": ratio,
                }
            )
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Run every table everywhere, and record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--noises", type=int, default=1000, help="as quality.py was asked for")
    parser.add_argument("--out", type=Path, default=Path("out/quality"), help="quality.py's")
    args = parser.parse_args()
    torch.set_num_threads(1)
    record(
        "transfer", {"rows": [row for place in PLACES for row in rows_at(*place, args)]}, RESULTS
    )


if __name__ == "__main__":
    ended(main)
