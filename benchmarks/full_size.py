"""Full-size models with random weights: one walk with and without a cache, theory beside the clock.

    python benchmarks/full_size.py [--device cuda --dtype float16]

The table computes everything at even steps and nothing at odd ones, so that the figure is about the machinery and not
about a router. One image, with the model's own guidance, so two samples go through the model. Turns are interleaved;
seconds are medians.
"""

from __future__ import annotations

import argparse

import torch
from record import ended, record

from harmonica import Schedule, macs
from harmonica.inference.timing import measure
from harmonica.models import load


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["dit-xl-256", "pixart-alpha-256"])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    figures = {}
    for name in args.models:
        dtype = getattr(torch, args.dtype)
        denoiser = load(name, steps=args.steps, weights="random", dtype=dtype, device=args.device)
        rows = torch.tensor([[k % 2 == 0] * len(denoiser.sites) for k in range(args.steps)])
        schedule = Schedule(rows, sites=tuple(denoiser.sites))
        count = macs(denoiser)
        theory = schedule.speedup(count)
        x, cond = denoiser.draw(args.batch, torch.Generator().manual_seed(0))
        clock = measure(denoiser, schedule, x, cond, repeats=args.repeats)
        figures[name] = {
            "steps": args.steps,
            "sampler": denoiser.about["sampler"],
            "sites": len(denoiser.sites),
            "gmacs_per_prediction": round(count.total / 1e9, 2),
            "covered": round(count.covered, 4),
            "cur": schedule.cur,
            "plain_s": round(clock.plain, 3),
            "cached_s": round(clock.cached, 3),
            "theoretical_speedup": round(theory, 3),
            "measured_speedup": round(clock.speedup, 3),
            "measured_over_theoretical": round(clock.speedup / theory, 3),
        }
        del denoiser
    record("full_size" if args.device == "cpu" else f"full_size_{args.device}", figures)


if __name__ == "__main__":
    ended(main)
