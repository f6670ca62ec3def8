"""Other methods beside the demo's router on the bundled model: image error at about the same theoretical speedup.

    python benchmarks/others.py

T = 20, DDIM, 500 held-out noises, calibration on 8 others. Methods that choose whole steps land where a step ends, so
each row says the speedup that it has. Learning-to-Cache and greedy search take minutes and are left to a larger bench.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import rivals
import torch
from record import ended, record

from harmonica import Schedule, macs, sample
from harmonica.evaluation.distances import image_mse
from harmonica.models import load
from harmonica.search import baselines

DEMO = Path(__file__).parent.parent / "docs" / "pictures" / "schedule.json"


def main() -> None:
    """Measure and record."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    ).parse_args()
    denoiser = load("tiny", steps=20)
    cost = macs(denoiser)
    few, labels = denoiser.draw(8, torch.Generator().manual_seed(0))
    x, y = denoiser.draw(500, torch.Generator().manual_seed(1_000_003))
    plain = sample(denoiser, x, y)

    def figure(schedule: Schedule) -> dict[str, float]:
        error = image_mse(sample(denoiser, x, y, schedule), plain)
        return {"speedup": round(schedule.speedup(cost), 3), "image_error": float(f"{error:.2e}")}

    figures = {"HarmoniCa, the demo's router": figure(Schedule.load(DEMO))}
    for speedup in (1.4, 2.0):
        generator = torch.Generator().manual_seed(0)
        fewer = rivals.fewer_steps(20, speedup)
        methods = {
            "every n-th step (FORA)": figure(baselines.every(denoiser, speedup=speedup)),
            "SmoothCache": figure(baselines.smoothcache(denoiser, few, labels, speedup=speedup)),
            "front and back blocks (Δ-DiT)": figure(rivals.delta_dit(denoiser, speedup=speedup)),
            "dynamic programming": figure(
                baselines.dynamic_programming(denoiser, few, labels, speedup=speedup)
            ),
            "random": figure(rivals.random_table(denoiser, generator, speedup=speedup)),
            f"fewer steps ({fewer})": {
                "speedup": round(20 / fewer, 3),
                "image_error": float(
                    f"{image_mse(sample(load('tiny', steps=fewer), x, y), plain):.2e}"
                ),
            },
        }
        figures |= {f"{speedup:g}x: {name}": value for name, value in methods.items()}
    record("others", figures)


if __name__ == "__main__":
    ended(main)
