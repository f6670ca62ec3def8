"""What λ is worth: image error of SDT with λ = 1, with the paper's λ, with others, at equal CUR.

    python benchmarks/ablation.py                      all of it, an hour on two cores
    python benchmarks/ablation.py --updates 40 --seeds 1   to see it run

Bundled model, DDIM, T = 20. For each way and seed, one router for each β; image error is the mean squared difference
to the uncached image on 500 noises that no router was trained on. At a given CUR it is interpolated, log error against
CUR, between the routers on both sides of it. Finished routers are kept in --out, so an interrupted run continues.
"""

from __future__ import annotations

import argparse
import json
import math
from concurrent.futures import ProcessPoolExecutor
from itertools import count, islice, pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from record import RESULTS, ended, record

from harmonica import Denoiser, Router, image_error, sample, sdt, train_sdt
from harmonica.models import load
from harmonica.search.references import image_mse

WAYS: dict[str, tuple[Any, tuple[float, ...]]] = {
    "sdt, lambda = 1": (None, (1e-4, 2e-4, 4e-4, 1e-3, 2e-3)),
    "sdt + iepo (leave-one-out)": ("leave-one-out", (3e-8, 1e-7, 3e-7, 1e-6, 2e-6, 4e-6)),
    "sdt, lambda per mse": ("relative", (3e-5, 1e-4, 3e-4)),
    "sdt + iepo (telescoping)": ("telescoping", (3e-8, 1e-7, 3e-7, 1e-6, 2e-6)),
}
HELD_OUT = 500


def train(job: tuple[str, float, int, int, float, Path]) -> dict[str, Any]:
    """Train one router, or read it, and judge it."""
    way, beta, seed, updates, lr, out = job
    torch.set_num_threads(1)
    denoiser = load("tiny", steps=20)
    path = out / f"{way.replace(' ', '_')}-{beta:g}-{seed}-{updates}-{lr:g}.safetensors"
    if path.exists():
        router = Router.load(path)
    elif WAYS[way][0] == "relative":
        router = train_relative(denoiser, beta, seed, updates, lr)
        router.save(path)
    else:
        router = train_sdt(
            denoiser, iterations=updates, batch_size=8, beta=beta, lr=lr, refresh_every=10, proxy=WAYS[way][0],
            generator=torch.Generator().manual_seed(seed), progress=False,
        )  # fmt: skip
        router.save(path)
    schedule, r = router.schedule(0.1), router().detach()[1:]
    x, labels = denoiser.draw(HELD_OUT, torch.Generator().manual_seed(1_000_003))
    error = image_mse(sample(denoiser, x, labels, schedule), sample(denoiser, x, labels))
    undecided = float(((r > 0.05) & (r < 0.95)).float().mean())
    return {
        "way": way,
        "seed": seed,
        "beta": beta,
        "cur": schedule.cur,
        "error": error,
        "undecided": undecided,
    }


def train_relative(denoiser: Denoiser, beta: float, seed: int, updates: int, lr: float) -> Router:
    """Train with fixed weights λ / MSE, what a unit of error at step k does to the image, taken on the first noise."""
    generator = torch.Generator().manual_seed(seed)
    router = Router(denoiser.steps, denoiser.sites, generator=generator)
    x, labels = denoiser.draw(8, generator)
    lam = image_error(denoiser, router(), x, labels)
    still = Router(denoiser.steps, denoiser.sites, logits=router.logits)
    for update in sdt(denoiser, still, [(x, labels)], lr=0.0, proxy=None):
        lam[update.k] /= update.mse
    noise = (denoiser.draw(8, generator) for _ in count())
    for _ in islice(sdt(denoiser, router, noise, beta=beta, lr=lr, proxy=None, lam=lam), updates):
        pass
    return router


def at(cur: float, runs: list[dict[str, Any]]) -> float | None:
    """Interpolate log error at a CUR; None outside of what was trained."""
    runs = sorted(runs, key=lambda run: run["cur"])
    for low, high in pairwise(runs):
        if low["cur"] <= cur <= high["cur"] and low["error"] > 0:
            share = (cur - low["cur"]) / max(high["cur"] - low["cur"], 1e-9)
            return math.exp((1 - share) * math.log(low["error"]) + share * math.log(high["error"]))
    return None


def reach(cur: float, runs: list[dict[str, Any]]) -> float:
    """Rank a seed without a router on both sides: infinite where they stop short, zero where they start later."""
    return math.inf if max(run["cur"] for run in runs) < cur else 0.0


def main() -> None:
    """Train, judge, record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--updates", type=int, default=1900, help="of each router (1900: 100 trajectories)"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("out/ablation"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    jobs = [
        (way, beta, seed, args.updates, args.lr, args.out)
        for seed in range(args.seeds)
        for way in args.ways
        for beta in WAYS[way][1]
    ]
    runs = []
    with ProcessPoolExecutor(args.workers) as pool:
        for run in pool.map(train, jobs):
            runs.append(run)
            print(json.dumps(run), flush=True)
    table: dict[str, Any] = {}
    for way in args.ways:
        for cur in (0.3, 0.5):
            seeds = [
                [r for r in runs if (r["way"], r["seed"]) == (way, seed)]
                for seed in range(args.seeds)
            ]
            errors = [at(cur, seed) for seed in seeds]
            # A median needs every seed; of three, one whose routers do not reach the CUR still leaves a middle one.
            middle = median(
                reach(cur, seed) if e is None else e for e, seed in zip(errors, seeds, strict=True)
            )
            table[f"{way}, CUR {cur:.0%}"] = {
                "median": middle if math.isfinite(middle) and middle else None,
                "seeds": errors,
            }
    record(
        "ablation",
        {"updates": args.updates, "lr": args.lr, "image_error": table, "runs": runs},
        RESULTS,
    )


if __name__ == "__main__":
    ended(main)
