"""Every method on one bench: three distances at equal theoretical speedup, on a bundled model.

    python benchmarks/quality.py                       T = 20, DDIM, 1.4x, 2x, 2.5x, 3x, three seeds of what is trained
    python benchmarks/quality.py --steps 10 50 --speedups 2 --samplers ddim dpm-solver++
    python benchmarks/quality.py --updates 20000 --batch-size 32 --lr 0.01 --refresh-every 26     the authors' settings
    python benchmarks/quality.py --noises 64 --updates 40 --seeds 1     to see it run

    image_error     to the uncached image of the same noise
    to_reference    to the image of the same sampler with ten times the steps
    frechet         Fréchet distance to real pictures

Each is [value, low, high] of a bootstrap. "…_difference" is the method's value minus the uncached walk's, resampled
over the same noises, so an interval below zero means that the method is better than not caching at all.
All methods return a schedule; one engine runs it on the same held-out noises. Methods that measure see 96 noises that
are not among those (greedy search 8, for its price; refined tables are judged on 128, weights are learned on --pool).
Each finished row, pool and trained table is a file in --out: the same command continues. Use a folder of its own for
other settings of training.
"order 1" and "order 2" are TaylorSeer's forecasts. Writes results/NAME.json and, for each model, T and
sampler with several speeds, results/NAME-MODEL-T-SAMPLER.png: the distance to the reference against speedup, first seeds.
"""

from __future__ import annotations

import argparse
import json
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing import Pool as Workers
from pathlib import Path
from typing import Any

import rivals
import torch
from bootstrap import bootstrap
from bundled_models import real_images
from judges import judge_of
from record import RESULTS, ended, record
from smoothcache import smoothcache
from torch import Tensor

from harmonica import Denoiser, Router, Schedule, macs, references, sample, train_sdt
from harmonica.inference.walk import Walk
from harmonica.models import load
from harmonica.pictures import save, tradeoff
from harmonica.search import baselines
from harmonica.search.learn import learn_in_turn, learn_weights
from harmonica.search.references import Pool, finer_walk, image_mse
from harmonica.search.refine_router import refine_router
from harmonica.search.target import Target
from harmonica.storage.files import read_json, read_tensors, write_json, write_tensors

ORDERS = {", order 1": 1, ", order 2": 2}
TRAINED = (
    "HarmoniCa, lambda = 1",
    "HarmoniCa",
    "Learning-to-Cache",
    "HarmoniCa, refined, order 1",
    "refined towards the reference, order 1",
    "weights on dynamic programming",
    "weights on the refined table",
    "weights on FORA",
    "weights, everything computed",
    "table and weights in turn",
    "table and weights in turn, from the refined table",
)
MEASURED = (
    *("FORA", "FORA, order 1", "FORA, order 2", "SmoothCache", "Delta-DiT", "random", "greedy"),
    *("dynamic programming", "dynamic programming, order 1", "dynamic programming, order 2"),
    *("L2P", "L2P on dynamic programming", "InvarDiff"),
)
METHODS = ("uncached", "fewer steps", "fewer steps of dpm-solver++", *MEASURED, *TRAINED)
DRAWN = (
    *("weights on dynamic programming", "refined towards the reference, order 1", "uncached"),
    *("dynamic programming, order 2", "FORA", "fewer steps"),
)
SEEN = 96
HELD_OUT = 1_000_003  # seed of the noises that judge

Job = tuple[int, str, str, float, int, argparse.Namespace]
"""T, sampler, method, speedup, seed, options."""


def jobs(args: argparse.Namespace) -> Iterator[Job]:
    """Yield what is to be measured, cheap methods and first seeds first."""
    for seed in range(args.seeds):
        for method in METHODS if seed == 0 else TRAINED:
            if method not in args.methods:
                continue
            for steps in args.steps:
                for sampler in args.samplers:
                    alone = method == "uncached" or method.endswith("everything computed")
                    for speedup in (1.0,) if alone else args.speedups:
                        yield steps, sampler, method, speedup, seed, args


def table_of(denoiser: Denoiser, method: str, speedup: float, job: Job) -> Schedule:
    """Make the schedule of a method at a speedup, or read it; ValueError where that is out of its reach."""
    *_, seed, args = job
    name = f"{run_of(denoiser, args)}-{method}-{speedup:g}-{seed}-{args.updates}.json"
    path = args.out / "tables" / name
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        began = time.perf_counter()
        schedule = new_table(denoiser, method, speedup, job)
        facts = {**schedule.provenance, "seconds": round(time.perf_counter() - began, 1)}
        replace(schedule, provenance=facts).save(path)
    return Schedule.load(path)


def new_table(denoiser: Denoiser, method: str, speedup: float, job: Job) -> Schedule:
    """Make the schedule of a method."""
    few, cond = denoiser.draw(SEEN, torch.Generator().manual_seed(20_000_003))
    *_, seed, args = job
    generator = torch.Generator().manual_seed(seed)

    def of(name: str) -> Schedule:
        return table_of(denoiser, name, speedup, job)

    def everything() -> Schedule:
        compute = torch.ones(denoiser.steps, len(denoiser.sites))
        return Schedule(compute, sites=tuple(denoiser.sites), **denoiser.about)

    ways: dict[str, Callable[[], Schedule]] = {
        "FORA": lambda: baselines.every(denoiser, speedup=speedup),
        "SmoothCache": lambda: smoothcache(denoiser, few, cond, speedup=speedup),
        "Delta-DiT": lambda: rivals.delta_dit(denoiser, speedup=speedup),
        "dynamic programming": lambda: baselines.dynamic_programming(
            denoiser, few, cond, speedup=speedup
        ),
        "greedy": lambda: rivals.greedy(denoiser, few[:8], cond[:8], speedup=speedup),
        "random": lambda: rivals.random_table(denoiser, generator, speedup=speedup),
        "L2P": lambda: rivals.l2p(denoiser, few, cond, speedup=speedup),
        "L2P on dynamic programming": lambda: rivals.l2p(
            denoiser, few, cond, schedule=of("dynamic programming")
        ),
        "InvarDiff": lambda: rivals.invardiff(denoiser, few, cond, speedup=speedup),
        "Learning-to-Cache": lambda: rivals.learning_to_cache(
            denoiser, *real_images(args.model), speedup=speedup, updates=args.updates, batch_size=8, lr=0.1, generator=generator
        ),
        "weights on dynamic programming": lambda: weighted(of("dynamic programming"), denoiser, job),
        "weights on FORA": lambda: weighted(of("FORA"), denoiser, job),
        "weights on the refined table": lambda: weighted(
            of("refined towards the reference, order 1"), denoiser, job
        ),
        "weights, everything computed": lambda: weighted(everything(), denoiser, job),
        "table and weights in turn": lambda: in_turn(of("dynamic programming"), denoiser, speedup, job),
        "table and weights in turn, from the refined table": lambda: in_turn(
            of("refined towards the reference, order 1"), denoiser, speedup, job
        ),
    }  # fmt: skip
    if method in ways:
        return ways[method]()
    for suffix, order in ORDERS.items():
        name = method.removesuffix(suffix)
        if name != method and name in ways:
            return replace(of(name), order=order)
    return harmonica(denoiser, method, speedup, job)


def weighted(schedule: Schedule, denoiser: Denoiser, job: Job) -> Schedule:
    """Learn weights towards the reference, on a pool that all methods share."""
    *_, seed, args = job
    pool, generator = pool_of(denoiser, args.pool, None, args), torch.Generator().manual_seed(seed)
    how = {"iterations": args.weight_updates, "batch_size": args.weight_batch_size}
    return learn_weights(denoiser, schedule, pool, **how, generator=generator)


def in_turn(schedule: Schedule, denoiser: Denoiser, speedup: float, job: Job) -> Schedule:
    """Learn table and weights in turn, on the same pool."""
    *_, seed, args = job
    pool = pool_of(denoiser, args.pool, None, args)
    target = Target(speedup, macs(denoiser), denoiser.steps)
    generator = torch.Generator().manual_seed(seed)
    return learn_in_turn(
        denoiser, schedule, pool, target, turns=2, iterations=384, generator=generator
    )


def pool_of(denoiser: Denoiser, noises: int, seed: int | None, args: argparse.Namespace) -> Pool:
    """Return references, from their file as far as it goes."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    path = pool_file(denoiser, noises, seed, args)
    return references(denoiser, noises=noises, generator=generator, path=path)


def pool_file(denoiser: Denoiser, noises: int, seed: int | None, args: argparse.Namespace) -> Path:
    """Return where references are kept."""
    path: Path = args.out / f"references-{run_of(denoiser, args)}-{noises}-{seed}.safetensors"
    return path


def run_of(denoiser: Denoiser, args: argparse.Namespace) -> str:
    """Name model, T and sampler, for files that belong to them."""
    return f"{args.model}-{denoiser.steps}-{denoiser.about['sampler']}"


def harmonica(denoiser: Denoiser, method: str, speedup: float, job: Job) -> Schedule:
    """Train, or read what was trained for the same table unrefined, and refine if the method does."""
    *_, seed, args = job
    proxy = None if method.endswith("lambda = 1") else "leave-one-out"
    name = f"{run_of(denoiser, args)}-{speedup:g}-{seed}-{args.updates}-{proxy}"
    path = args.out / f"{name}.safetensors"
    if not path.exists():
        began = time.perf_counter()
        router = train_sdt(
            denoiser, iterations=args.updates, batch_size=args.batch_size, lr=args.lr, proxy=proxy, budget=0,
            refresh_every=args.refresh_every, target_speedup=speedup, progress=False,
            generator=torch.Generator().manual_seed(seed),
        )  # fmt: skip
        router.about["provenance"]["training_seconds"] = round(time.perf_counter() - began, 1)
        router.save(path)
    router = Router.load(path)
    if "refined" in method:
        target = Target(speedup, macs(denoiser), denoiser.steps)
        finer = finer_walk(denoiser) if "reference" in method else denoiser
        refine_router(denoiser, router, target, order=1, finer=finer)
    return router.schedule(0.1)


def row_of(job: Job) -> dict[str, Any]:
    """Measure one row, or read it."""
    steps, sampler, method, speedup, seed, args = job
    path = args.out / (
        f"{args.model}-{steps}-{sampler}-{method}-{speedup:g}-{seed}-{args.updates}-{args.noises}.json"
    )
    if path.exists():
        return read_json(path)
    torch.set_num_threads(1)
    denoiser = load(args.model, steps=steps, sampler=sampler, device=args.device)
    pool, plain = held_out(denoiser, args)
    row: dict[str, Any] = {
        "model": args.model, "T": steps, "sampler": sampler, "method": method, "asked": speedup, "seed": seed,
        "noises": args.noises, "device": args.device,
    }  # fmt: skip
    if method in TRAINED and "weights" not in method:  # those say themselves how they were learned
        row["updates"] = args.updates
    try:
        if method == "uncached":
            row["speedup"], images = 1.0, plain
        elif method.startswith("fewer steps"):
            fewer = rivals.fewer_steps(steps, speedup)
            solver = method.partition(" of ")[2] or sampler
            row["speedup"] = steps / fewer
            few = load(args.model, steps=fewer, sampler=solver, device=args.device)
            images = sample(few, pool.x, pool.cond)
        else:
            schedule = table_of(denoiser, method, speedup, job)
            row |= {"speedup": schedule.speedup(macs(denoiser)), "made": dict(schedule.provenance)}
            images = Walk(denoiser, schedule)(pool.x, pool.cond)
    except ValueError as out_of_reach:
        row["refused"] = str(out_of_reach)
        write_json(path, row)
        return row
    row |= judged(images.cpu(), plain.cpu(), pool.images.cpu(), args.model)
    write_json(path, row)
    return row


def judged(images: Tensor, plain: Tensor, finer: Tensor, model: str) -> dict[str, Any]:
    """Return three distances of a set of images, and two differences to the uncached one, paired."""
    judge, again = judge_of(model), torch.Generator().manual_seed(0)
    mine, theirs = judge.features(images), judge.features(plain)

    def farther(a: Tensor, b: Tensor, c: Tensor) -> float:
        return image_mse(a, c) - image_mse(b, c)

    def less_real(a: Tensor, b: Tensor) -> float:
        return judge.frechet_of_features(a) - judge.frechet_of_features(b)

    return {
        "image_error": bootstrap(image_mse, images, plain, generator=again),
        "to_reference": bootstrap(image_mse, images, finer, generator=again),
        "to_reference_over_uncached": image_mse(images, finer) / image_mse(plain, finer),
        "to_reference_difference": bootstrap(farther, images, plain, finer, generator=again),
        "frechet": bootstrap(judge.frechet_of_features, mine, resamples=100, generator=again),
        "frechet_difference": bootstrap(less_real, mine, theirs, resamples=200, generator=again),
    }


def held_out(denoiser: Denoiser, args: argparse.Namespace) -> tuple[Pool, Tensor]:
    """Return the noises that judge, with their references, and their uncached images, from files where they are."""
    pool = pool_of(denoiser, args.noises, HELD_OUT, args)
    path = args.out / f"plain-{run_of(denoiser, args)}-{args.noises}.safetensors"
    if path.exists():
        return pool, read_tensors(path)[0]["images"]
    images = sample(denoiser, pool.x, pool.cond)
    write_tensors(path, {"images": images}, {})
    return pool, images


def main() -> None:
    """Measure, record, draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny", help="a bundled one")
    parser.add_argument("--steps", type=int, nargs="+", default=[20])
    parser.add_argument("--samplers", nargs="+", default=["ddim"])
    parser.add_argument("--speedups", type=float, nargs="+", default=[1.4, 2.0, 2.5, 3.0])
    parser.add_argument(
        "--methods",
        nargs="+",
        default=METHODS,
        choices=METHODS,
        metavar="M",
        help=", ".join(METHODS),
    )
    parser.add_argument("--noises", type=int, default=1000, help="held-out ones")
    parser.add_argument(
        "--updates", type=int, default=1500, help="of what the paper's method trains"
    )
    parser.add_argument("--batch-size", type=int, default=8, help="of an update")
    parser.add_argument("--lr", type=float, default=0.1, help="of an update")
    parser.add_argument("--refresh-every", type=int, default=10, help="walks between two λ")
    parser.add_argument("--pool", type=int, default=1536, help="noises that weights are learned on")
    parser.add_argument("--weight-updates", type=int, default=576, help="of learning weights")
    parser.add_argument(
        "--weight-batch-size", type=int, default=16, help="noises of such an update"
    )
    parser.add_argument("--seeds", type=int, default=3, help="of what is trained")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--finished", action="store_true", help="record what is finished in --out, measure nothing"
    )
    parser.add_argument("--out", type=Path, default=Path("out/quality"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--name", default="reference", help="of the file in --results")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.finished:
        rows = [read_json(path) for path in sorted(args.out.glob("*.json"))]
    else:
        # workers leave Ctrl-C to this process, which ends them
        with Workers(args.workers, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as workers:
            rows = []
            for row in workers.imap(row_of, jobs(args)):
                rows.append(row)
                short = {key: value for key, value in row.items() if key != "made"}
                print(json.dumps(short), flush=True)
    args.results.mkdir(parents=True, exist_ok=True)
    for run in sorted({run_of_row(row) for row in rows}):
        these = [row for row in rows if run_of_row(row) == run]
        if len({row["asked"] for row in these}) > 2:  # a picture of one speed is a table
            draw(these, args.results / f"{args.name}-{run}.png")
    record(args.name, {"rows": rows}, args.results)


def run_of_row(row: dict[str, Any]) -> str:
    """Name model, T and sampler of a row."""
    return f"{row['model']}-{row['T']}-{row['sampler'].replace('+', 'p')}"


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the distance to the reference against speedup, first seeds; chance is left to the table."""
    shown = [row for row in rows if "to_reference" in row and row["seed"] == 0]
    points = {
        method: sorted(  # of two rows at one speedup, such as with larger pools, the later one
            {r["speedup"]: r["to_reference"][0] for r in shown if r["method"] == method}.items()
        )
        for method in DRAWN
    }
    model, steps, sampler = (rows[0][key] for key in ("model", "T", "sampler"))
    points = {name: each for name, each in points.items() if each}
    figure = tradeoff(points, ylabel="distance to the reference")
    figure.axes[0].set_title(f"{model}, {sampler}, T = {steps}")
    save(figure, path)


if __name__ == "__main__":
    ended(main)
