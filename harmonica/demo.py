"""python -m harmonica.demo: train a router, draw the same noises with and without it, say what it
was worth.

Prints one table, writes the schedule and four pictures to --out. Two minutes on two cores with the
bundled model. Every other model takes its weights from the hub, a folder or a file, and hours of a
GPU to train on: train with python -m harmonica.train, which can be resumed, and give its
schedule.json as --schedule here. --weights random times
a model without any weights: the pictures are noise then.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from harmonica import Denoiser, Router, Schedule, denoise, image_error, macs, sample, train_sdt
from harmonica.command_line import (
    Parser,
    add_model_options,
    check_device,
    command,
    dtype_of,
    load_model,
    make_writable,
    seed,
    whole,
)
from harmonica.denoise import gates_of
from harmonica.inference.timing import measure
from harmonica.inference.walk import Walk
from harmonica.search.budget import check_target
from harmonica.search.paths import whole_steps
from harmonica.storage.files import exclusive_lock
from harmonica.train import AUTHORS, ORDER, QUICK, TARGET

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HELD_OUT = 500  # noises that the router was not trained on, of the bundled model
TIMED = 64  # of them in a timed batch
SHOWN = 10  # in the picture


def parser() -> Parser:
    """Return the command line of the demo."""
    p = Parser(
        prog="python -m harmonica.demo",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    add_model_options(p)
    p.add_argument(
        "--vae", type=Path, metavar="DIR", help="autoencoder saved by diffusers (the model's own)"
    )
    p.add_argument("--images", type=whole, help="held-out noises (500 for tiny, else 4)")
    p.add_argument(
        "--schedule", type=Path, metavar="FILE", help="use this schedule instead of training"
    )
    p.add_argument(
        "--iterations", type=whole, help="updates of the router (1500 for tiny, else 20000)"
    )
    p.add_argument(
        "--beta",
        type=float,
        help="price of computing a site; more is faster (1e-7 for tiny, else 7e-8)",
    )
    p.add_argument("--target", type=float, metavar="SPEEDUP", help=f"{TARGET}, instead of --beta")
    p.add_argument("--order", type=whole, default=0, help=ORDER)
    p.add_argument("--tau", type=float, default=0.1, help="a score above it computes (0.1)")
    p.add_argument(
        "--seed",
        type=seed,
        default=0,
        help="of training; the held-out noises are always the same (0)",
    )
    p.add_argument(
        "--out",
        type=Path,
        default=Path("out/demo"),
        metavar="DIR",
        help="folder for results (out/demo)",
    )
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; return 0, 2 for bad input or 130 after Ctrl-C, with one line on stderr."""
    return command(parser(), run, arguments)


def run(args: argparse.Namespace) -> None:
    """Train or load, draw, measure, print, save."""
    from harmonica.evaluation import pictures as plots
    from harmonica.models.autoencoder import decoder

    settings = _settings(args)
    schedule = Schedule.load(args.schedule, args.tau) if args.schedule else None
    denoiser = load_model(args)
    if schedule is not None:
        schedule = schedule.fit(tuple(denoiser.sites))
        schedule.check(denoiser.steps, tuple(denoiser.sites), denoiser.about["timesteps"])
    dtype = dtype_of(args, args.device)
    decode = decoder(args.model, args.weights, vae=args.vae, device=args.device, dtype=dtype)
    make_writable(args.out)
    with exclusive_lock(args.out):
        router = None
        if schedule is None and args.weights == "random" and args.iterations is None:
            schedule = _every_other_step(denoiser)
        elif schedule is None:
            router = _train(denoiser, args, settings)
            schedule = router.schedule(args.tau)
        schedule.save(
            args.out / "schedule.json"
        )  # before anything else can go wrong: it may have taken hours
        # The held-out seed is far from training's: the same noises judge every router.
        held_out = (
            args.images if args.images is not None else (HELD_OUT if args.model == "tiny" else 4)
        )
        x, cond = denoiser.draw(held_out, torch.Generator().manual_seed(1_000_003))
        plain = decode(sample(denoiser, x, cond)).cpu()
        cached = decode(Walk(denoiser, schedule)(x, cond)).cpu()
        print(_table(denoiser, schedule, x, cond, plain, cached))
        if args.weights == "random":
            print("  weights are random: the timing is real, the pictures are noise")
        shown = _shown(denoiser, cond)
        title = (
            "same noise, same conditions"
            if args.weights != "random"
            else "latents under random weights"
        )
        images = plots.comparison(
            plain[shown], cached[shown], labels=_captions(denoiser, cond[shown]), title=title
        )
        pictures = {"images": images, **_pictures(denoiser, schedule, x[:8], cond[:8])}
        if args.weights != "random":  # λ takes T(T+1)/2 predictions, and of noise it says nothing
            pictures["lambda"] = _lambda(denoiser, schedule, router, x[:8], cond[:8])
        for name, figure in pictures.items():
            plots.save(figure, args.out / f"{name}.png")
        print(f"schedule.json and pictures are in {args.out}")


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return how to train: quickly for the bundled model, as the authors did for the others; raise
    on bad numbers.
    """
    given = {
        name: getattr(args, name)
        for name in ("iterations", "beta")
        if getattr(args, name) is not None
    }
    settings = {**(QUICK if args.model == "tiny" else AUTHORS), **given}
    if (
        not 0.0 <= args.tau < 1.0
        or not 0.0 <= settings["beta"] < float("inf")
        or settings["iterations"] < 1
        or (args.images is not None and args.images < 1)
    ):
        found = f"--tau {args.tau} --beta {settings['beta']} --iterations {settings['iterations']} --images {args.images}"
        raise ValueError(
            f"found {found}; expected 0 <= tau < 1, beta >= 0, iterations and images >= 1"
        )
    check_target(args.target, args.beta, args.order)
    if args.target is not None:
        settings = {name: value for name, value in settings.items() if name != "beta"}
        settings |= {"target_speedup": args.target, "order": args.order}
    check_device(args.device)
    return settings


def _every_other_step(denoiser: Denoiser) -> Schedule:
    """Return a table for timing alone: everything at even steps, nothing at odd ones."""
    rows = whole_steps(denoiser, range(0, denoiser.steps, 2))  # (T, N)
    return Schedule(
        rows,
        sites=tuple(denoiser.sites),
        **denoiser.about,
        provenance={"method": "every other step"},
    )


def _train(denoiser: Denoiser, args: argparse.Namespace, settings: dict[str, Any]) -> Router:
    generator = torch.Generator().manual_seed(args.seed)
    return train_sdt(denoiser, **settings, tau=args.tau, generator=generator)


def _table(
    denoiser: Denoiser, schedule: Schedule, x: Tensor, cond: Tensor, plain: Tensor, cached: Tensor
) -> str:
    from harmonica.evaluation.distances import image_mse

    theory = schedule.speedup(macs(denoiser))
    timed = len(x[:TIMED])
    repeats, walk = 5 if _bundled(denoiser) else 3, Walk(denoiser, schedule)
    clock = measure(denoiser, schedule, x[:TIMED], cond[:TIMED], repeats=repeats, walk=walk)
    rows = (
        ("cache utilisation (CUR)", f"{schedule.cur:.1%}"),
        ("theoretical speedup", f"{theory:.2f}x"),
        (
            "measured speedup",
            f"{clock.speedup:.2f}x  ({clock.plain:.3f} s -> {clock.cached:.3f} s, batch {timed})",
        ),
        ("measured / theoretical", f"{clock.speedup / theory:.2f}"),
        ("image error (mean squared)", f"{image_mse(cached, plain):.2e}  of a pixel range of 2"),
        *_labels_kept(denoiser, cond, plain, cached),
    )
    head = f"{denoiser.about['model']}, {denoiser.about['sampler']}, T = {denoiser.steps}"
    return "\n".join(
        [f"{head}, {len(x)} held-out noises", *(f"  {name:29}{value}" for name, value in rows)]
    )


def _bundled(denoiser: Denoiser) -> bool:
    return bool(denoiser.about["model"] == "tiny")


def _labels_kept(
    denoiser: Denoiser, cond: Tensor, plain: Tensor, cached: Tensor
) -> list[tuple[str, str]]:
    """Return the row that only digits can have: we know what they should look like."""
    if not _bundled(denoiser):
        return []
    from harmonica.evaluation.judge import judge_of

    judge = judge_of(str(denoiser.about["model"]))
    before, after = (judge.agreement(images, cond) for images in (plain, cached))
    return [("samples keeping their label", f"{after:.1%}  (without cache {before:.1%})")]


def _shown(denoiser: Denoiser, cond: Tensor) -> Tensor:
    """Return which samples to show: of the digits one of each, else the first few."""
    if not _bundled(denoiser):
        return torch.arange(min(SHOWN, len(cond)))
    return torch.cat([(cond.cpu() == digit).nonzero()[:1, 0] for digit in range(10)])


def _captions(denoiser: Denoiser, cond: Tensor) -> list[str]:
    """Return what each image is of: the class, or the beginning of the prompt."""
    from harmonica.models import PixArtDenoiser

    if isinstance(denoiser, PixArtDenoiser):
        return [denoiser.prompts.texts[i][:14] for i in cond.tolist()]
    return [str(label) for label in cond.tolist()]


def _pictures(denoiser: Denoiser, schedule: Schedule, x: Tensor, cond: Tensor) -> dict[str, Figure]:
    from harmonica.evaluation import pictures as plots

    plain = list(denoise(denoiser, x, cond))
    cached = list(denoise(denoiser, x, cond, gates_of(schedule, {})))
    about = denoiser.about
    return {
        "router": plots.router_heatmap(
            schedule, title=f"{about['model']}, {about['sampler']}, T = {schedule.steps}"
        ),
        "error": plots.error_along_walk(plain, {f"HarmoniCa, CUR {schedule.cur:.0%}": cached}),
    }


def _lambda(
    denoiser: Denoiser, schedule: Schedule, router: Router | None, x: Tensor, cond: Tensor
) -> Figure:
    from harmonica.evaluation import pictures as plots

    tables = {"leave-one-out": schedule.compute.float()}
    if router is not None:
        tables = {"soft, as trained": router().detach(), "hard, as run": schedule.compute.float()}
    tau = 0.1 if schedule.threshold is None else schedule.threshold
    lams = {
        name: image_error(denoiser, r.to(x.device), x, cond, tau=tau) for name, r in tables.items()
    }
    return plots.lambda_per_step(lams)


if __name__ == "__main__":
    sys.exit(main())
