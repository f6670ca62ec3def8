"""Every method on one bench: image error and Fréchet distance at equal theoretical speedup, bundled model.

    python benchmarks/quality.py                       T = 20, DDIM, 1.4x, 2x, 2.5x, three seeds of what is trained
    python benchmarks/quality.py --steps 10 20 50 --samplers ddim dpm-solver++ --speedups 1.1 1.2 1.4 1.6 2 2.5 3
    python benchmarks/quality.py --noises 64 --updates 40 --seeds 1     to see it run

All methods return a schedule; one engine runs it on the same held-out noises. Methods that measure see 96 noises that
are not among those (greedy search 8, for its price; refined tables are judged on 128). Each finished row is a file in
--out: the same command continues.
"forecasts" continue skipped outputs by one difference (FORA with forecasts is TaylorSeer), the others repeat them.
Writes results/quality.json and, for each T and sampler, results/quality-T-SAMPLER.png: error against speedup.
"""

from __future__ import annotations

import argparse
import json
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing import Pool
from pathlib import Path
from typing import Any

import torch
from bootstrap import bootstrap
from record import RESULTS, ended, record

from harmonica import Denoiser, Router, Schedule, macs, sample, train_sdt
from harmonica.evaluation.distances import frechet_distance, image_mse
from harmonica.evaluation.judge import digits
from harmonica.evaluation.pictures import save, tradeoff
from harmonica.inference.walk import Walk
from harmonica.models import load
from harmonica.search import baselines
from harmonica.search.budget import Target
from harmonica.search.refine import reach
from harmonica.storage.files import read_json, write_json

FORECASTS = ", forecasts"
LEARNED = (
    "HarmoniCa, lambda = 1",
    "HarmoniCa",
    "Learning-to-Cache",
    "HarmoniCa, refined",
    "HarmoniCa, refined, forecasts",
)
TABLES = ("FORA", "SmoothCache", "Delta-DiT", "dynamic programming", "random", "greedy")
METHODS = (
    "uncached",
    "fewer steps",
    *TABLES,
    "FORA" + FORECASTS,
    "dynamic programming" + FORECASTS,
    *LEARNED,
)
SEEN = 96

Job = tuple[int, str, str, float, int, argparse.Namespace]
"""T, sampler, method, speedup, seed, options."""


def jobs(args: argparse.Namespace) -> Iterator[Job]:
    """Yield what is to be measured, cheap methods and first seeds first."""
    for seed in range(args.seeds):
        for method in METHODS if seed == 0 else LEARNED:
            if method not in args.methods:
                continue
            for steps in args.steps:
                for sampler in args.samplers:
                    for speedup in (1.0,) if method == "uncached" else args.speedups:
                        yield steps, sampler, method, speedup, seed, args


def made(
    denoiser: Denoiser, method: str, speedup: float, seed: int, args: argparse.Namespace
) -> Schedule:
    """Return the schedule of a method at a speedup; raises ValueError where that is out of its reach."""
    few, cond = denoiser.draw(SEEN, torch.Generator().manual_seed(20_000_003))
    generator = torch.Generator().manual_seed(seed)
    ways: dict[str, Callable[[], Schedule]] = {
        "FORA": lambda: baselines.every(denoiser, speedup=speedup),
        "SmoothCache": lambda: baselines.smoothcache(denoiser, few, cond, speedup=speedup),
        "Delta-DiT": lambda: baselines.delta_dit(denoiser, speedup=speedup),
        "dynamic programming": lambda: baselines.dynamic_programming(
            denoiser, few, cond, speedup=speedup
        ),
        "greedy": lambda: baselines.greedy(denoiser, few[:8], cond[:8], speedup=speedup),
        "random": lambda: baselines.random_table(denoiser, generator, speedup=speedup),
        "Learning-to-Cache": lambda: baselines.learning_to_cache(
            denoiser,
            *digits(),
            speedup=speedup,
            updates=args.updates,
            batch_size=8,
            lr=0.1,
            generator=generator,
        ),
    }
    table = method.removesuffix(FORECASTS)
    if table in ways:
        return replace(ways[table](), order=int(table != method))
    return _harmonica(denoiser, method, speedup, seed, args)


def _harmonica(
    denoiser: Denoiser, method: str, speedup: float, seed: int, args: argparse.Namespace
) -> Schedule:
    """Train, or read what was trained for the same table unrefined, and refine if the method does."""
    proxy = None if method.endswith("1") else "leave-one-out"
    name = f"{denoiser.steps}-{denoiser.about['sampler']}-{speedup:g}-{seed}-{args.updates}-{proxy}.safetensors"
    path = args.out / name
    if not path.exists():
        began = time.perf_counter()
        router = train_sdt(
            denoiser, iterations=args.updates, batch_size=8, lr=0.1, refresh_every=10, proxy=proxy, refine=0,
            target_speedup=speedup, generator=torch.Generator().manual_seed(seed), progress=False,
        )  # fmt: skip
        router.about["provenance"]["seconds"] = round(time.perf_counter() - began, 1)
        router.save(path)
    router = Router.load(path)
    if "refined" in method:
        target = Target(speedup, macs(denoiser), denoiser.steps)
        reach(denoiser, router, target, batch_size=64, order=int(method.endswith(FORECASTS)))
    return router.schedule(0.1)


def measured(job: Job) -> dict[str, Any]:
    """Measure one row, or read it."""
    steps, sampler, method, speedup, seed, args = job
    path = (
        args.out
        / f"{steps}-{sampler}-{method}-{speedup:g}-{seed}-{args.updates}-{args.noises}.json"
    )
    if path.exists():
        return read_json(path)
    torch.set_num_threads(1)
    denoiser, real, began = (
        load("tiny", steps=steps, sampler=sampler),
        digits()[0],
        time.perf_counter(),
    )
    x, cond = denoiser.draw(args.noises, torch.Generator().manual_seed(1_000_003))
    plain = _plain(denoiser, x, cond, args.out / f"plain-{steps}-{sampler}-{args.noises}.pt")
    row: dict[str, Any] = {
        "T": steps,
        "sampler": sampler,
        "method": method,
        "asked": speedup,
        "seed": seed,
    }
    try:
        if method == "uncached":
            row["speedup"], images = 1.0, plain
        elif method == "fewer steps":
            fewer = baselines.fewer_steps(steps, speedup)
            row["speedup"], images = (
                steps / fewer,
                sample(load("tiny", steps=fewer, sampler=sampler), x, cond),
            )
        else:
            schedule = made(denoiser, method, speedup, seed, args)
            row |= {"speedup": schedule.speedup(macs(denoiser)), "made": dict(schedule.provenance)}
            row["seconds_to_make"] = round(time.perf_counter() - began, 1)
            images = Walk(denoiser, schedule)(x, cond)
    except ValueError as out_of_reach:
        row["refused"] = str(out_of_reach)
        write_json(path, row)
        return row
    again = torch.Generator().manual_seed(0)
    row["image_error"] = bootstrap(image_mse, images, plain, generator=again)
    row["frechet"] = bootstrap(
        lambda some: frechet_distance(some, real), images, resamples=100, generator=again
    )
    write_json(path, row)
    return row


def _plain(denoiser: Denoiser, x: torch.Tensor, cond: torch.Tensor, path: Path) -> torch.Tensor:
    if path.exists():
        return torch.load(path)  # type: ignore[no-any-return]
    images = sample(denoiser, x, cond)
    torch.save(images, path)
    return images


def main() -> None:
    """Measure, record, draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, nargs="+", default=[20])
    parser.add_argument("--samplers", nargs="+", default=["ddim"])
    parser.add_argument("--speedups", type=float, nargs="+", default=[1.4, 2.0, 2.5])
    parser.add_argument(
        "--methods",
        nargs="+",
        default=METHODS,
        choices=METHODS,
        metavar="M",
        help=", ".join(METHODS),
    )
    parser.add_argument("--noises", type=int, default=1000, help="held-out ones")
    parser.add_argument("--updates", type=int, default=1500, help="of what is trained")
    parser.add_argument("--seeds", type=int, default=3, help="of what is trained")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--finished", action="store_true", help="record what is finished in --out, measure nothing"
    )
    parser.add_argument("--out", type=Path, default=Path("out/quality"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.finished:
        rows = [read_json(path) for path in sorted(args.out.glob("*.json"))]
    else:
        # workers leave Ctrl-C to this process, which ends them
        with Pool(args.workers, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
            rows = []
            for row in pool.imap(measured, jobs(args)):
                rows.append(row)
                print(
                    json.dumps({key: value for key, value in row.items() if key != "made"}),
                    flush=True,
                )
    args.results.mkdir(parents=True, exist_ok=True)
    for steps, sampler in sorted({(row["T"], row["sampler"]) for row in rows}):
        _draw(
            [row for row in rows if (row["T"], row["sampler"]) == (steps, sampler)],
            steps,
            sampler,
            args.results,
        )
    record("quality", {"noises": args.noises, "updates": args.updates, "rows": rows}, args.results)


def _draw(rows: list[dict[str, Any]], steps: int, sampler: str, folder: Path) -> None:
    """Draw error against speedup, first seeds; chance and lambda = 1 are left to the table."""
    shown = [row for row in rows if "image_error" in row and row["seed"] == 0]
    points = {
        method: [
            (row["speedup"], row["image_error"][0]) for row in shown if row["method"] == method
        ]
        for method in reversed(METHODS)
        if method not in ("uncached", "random", "HarmoniCa, lambda = 1")
    }
    figure = tradeoff({name: points[name] for name in list(points)[:6]})
    figure.axes[0].set_title(f"tiny, {sampler}, T = {steps}")
    save(figure, folder / f"quality-{steps}-{sampler.replace('+', 'p')}.png")


if __name__ == "__main__":
    ended(main)
