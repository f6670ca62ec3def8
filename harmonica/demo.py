"""Run a model with and without a cache, and say how fast and how good the cached images are.

    python -m harmonica.demo                  beyond the paper: dynamic programming chooses the
                                              steps that compute, then the weights of past outputs
                                              are learned towards the reference
    python -m harmonica.demo --schedule FILE  any table, such as one of the paper's training, by
                                              python -m harmonica.train

The reference of a noise is the image that the same sampler makes of it with ten times the steps.
One table is printed; schedule.json and three pictures are written to --out. With the bundled model
that takes two minutes on two cores. Other models take their weights from the hub, a folder or a
file; with --weights random they are timed without any, and the pictures are noise.
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from harmonica import Denoiser, Schedule, denoise, macs, sample
from harmonica import command_line as cli
from harmonica.denoise import gates_of
from harmonica.inference.timing import measure
from harmonica.inference.walk import Walk
from harmonica.models import BUNDLED, PixArtDenoiser
from harmonica.models.guided import Guided
from harmonica.search.baselines import dynamic_programming, named
from harmonica.search.learn import learn_weights
from harmonica.search.paths import whole_steps
from harmonica.search.references import finer_walk, image_mse, references
from harmonica.search.target import check_target, target_of
from harmonica.storage.files import exclusive_lock

HELD_OUT, POOL, CHOOSING, UPDATES = 128, 384, 32, 192
"""Noises of the bundled model that judge, that weights are learned from, that choose the steps; and
updates of the weights, of eight noises each."""

TIMED, SHOWN = 64, 10  # images in a timed batch, and in the picture

GARMENTS = ["T-shirt", "trousers", "pullover", "dress", "coat"]
GARMENTS += ["sandal", "shirt", "trainer", "bag", "boot"]


def parser() -> cli.Parser:
    """Return the command line of the demo."""
    p = cli.Parser("demo", __doc__)
    cli.add_image_options(p)
    p.option("images", cli.count, f"held-out noises ({HELD_OUT} for a bundled model, else 4)")
    p.option("target", float, "theoretical speedup of the table that is made", 2.0, "SPEEDUP")
    p.option("iterations", cli.count, "updates of the weights", UPDATES)
    p.option("out", Path, "folder for results", Path("out/demo"), "DIR")
    return p


def run(args: argparse.Namespace) -> None:
    """Make or load a table, draw, measure, print, save."""
    check_target(args.target, None)
    cli.check_device(args.device)
    denoiser, schedule, decode = cli.load_for_images(args, args.device)
    if schedule is None and args.weights != "random":  # out of reach: said now, not after minutes
        target_of(denoiser, args.target, None, None)
    cli.make_writable(args.out)
    with exclusive_lock(args.out):
        schedule = schedule or _schedule(denoiser, args)
        schedule.save(args.out / "schedule.json")  # first of all: it may have taken hours
        count = args.images or (HELD_OUT if args.model in BUNDLED else 4)
        x, cond = denoiser.draw(count, torch.Generator().manual_seed(1_000_003))
        walks = {"uncached": sample(denoiser, x, cond), "cached": Walk(denoiser, schedule)(x, cond)}
        if args.weights != "random" and not denoiser.draws_noise:
            walks = {"reference": sample(finer_walk(denoiser), x, cond), **walks}
        images = {name: decode(end).cpu() for name, end in walks.items()}
        print("\n".join(_report(denoiser, schedule, x, cond, images)))
        if args.weights == "random":
            print("  weights are random: the timing is real, the pictures are noise")
        _draw(args.out, denoiser, schedule, x, cond, images)
        print(f"schedule.json and pictures are in {args.out}")


main = partial(cli.command, parser, run)


def _schedule(denoiser: Denoiser, args: argparse.Namespace) -> Schedule:
    """Make a table; with random weights every other step computes."""
    if args.weights == "random":
        rows = whole_steps(denoiser, range(0, denoiser.steps, 2))  # (T, N)
        return named(denoiser, rows, "every other step", {})
    # four times the steps come close to the reference at two fifths of its price
    noises, generator = POOL if args.model in BUNDLED else 16, torch.Generator().manual_seed(0)
    pool = references(denoiser, noises=noises, factor=4, generator=generator)
    few = pool[slice(CHOOSING)]
    table = dynamic_programming(denoiser, few.x, few.cond, speedup=args.target)
    return learn_weights(denoiser, table, pool, iterations=args.iterations, batch_size=8)


def _report(
    denoiser: Denoiser, schedule: Schedule, x: Tensor, cond: Tensor, images: dict[str, Tensor]
) -> list[str]:
    """Return the lines of the table that is printed."""
    theory, few = schedule.speedup(macs(denoiser)), (x[:TIMED], cond[:TIMED])
    clock = measure(denoiser, schedule, *few, repeats=3, walk=Walk(denoiser, schedule))
    seconds = f"{clock.plain:.3f} s -> {clock.cached:.3f} s, batch {len(few[0])}"
    plain, cached, origin = images["uncached"], images["cached"], schedule.provenance
    learned = ", then weights learned (beyond the paper)" * ("weights_history" in origin)
    rows = {
        "made by": f"{origin.get('method', 'an unnamed method')}{learned}",
        "cache utilisation (CUR)": f"{schedule.cur:.1%}",
        "theoretical speedup": f"{theory:.2f}x",
        "measured speedup": f"{clock.speedup:.2f}x  ({seconds})",
        "measured / theoretical": f"{clock.speedup / theory:.2f}",
        "distance to uncached": f"{image_mse(cached, plain):.2e}",
    }
    if "reference" in images:
        near, far = (image_mse(some, images["reference"]) for some in (cached, plain))
        rows["distance to the reference"] = f"{near:.2e}  (uncached {far:.2e})"
    model, sampler = (str(denoiser.about[name]) for name in ("model", "sampler"))
    about = f"{model}, {sampler}, T = {denoiser.steps}, {len(x)} noises that nothing was tuned on"
    lines = [f"  {name:29}{value}" for name, value in rows.items()]
    return [f"{about}; distances are mean squared", *lines]


def _draw(
    out: Path, denoiser: Guided, schedule: Schedule, x: Tensor, cond: Tensor,
    images: dict[str, Tensor],
) -> None:  # fmt: skip
    """Save the images in rows, the table, and the error along the walk."""
    from harmonica import pictures

    shown = torch.arange(min(SHOWN, len(cond)))
    if denoiser.about["model"] in BUNDLED:  # one of each class
        shown = torch.cat([(cond.cpu() == label).nonzero()[:1, 0] for label in range(10)])
    if isinstance(denoiser, PixArtDenoiser):
        names: Sequence[object] = denoiser.prompts.texts
    else:
        names = GARMENTS if denoiser.about["model"] == "garments" else range(denoiser.conditions)
    labels = [str(names[i])[:14] for i in cond[shown].tolist()]
    ways = None, gates_of(schedule, {})
    plain, cached = (list(denoise(denoiser, x[:8], cond[:8], gates)) for gates in ways)
    title = f"{schedule.model}, {schedule.sampler}, T = {schedule.steps}"
    rows = {name: some[shown] for name, some in images.items()}
    walks = {f"cached, CUR {schedule.cur:.0%}": cached}
    pictures.save(pictures.rows(rows, labels=labels, title="the same noises"), out / "images.png")
    pictures.save(pictures.router_heatmap(schedule, title=title), out / "router.png")
    pictures.save(pictures.error_along_walk(plain, walks), out / "error.png")


if __name__ == "__main__":
    sys.exit(main())
