"""python -m harmonica.demo: train a router, draw the same noises with and without it, say what it was worth.

Prints one table, writes the schedule and four pictures to --out. Two minutes on two cores with the bundled model.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor

from harmonica import Router, Schedule, denoise, image_error, macs, reuse, sample, train_sdt
from harmonica.cache import Cache
from harmonica.cost import measure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from harmonica.models import DiTDenoiser

HELD_OUT = 500  # noises that the router was not trained on
TIMED = 64  # of them in a timed batch


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Say what is wrong in one line."""
        self.exit(2, f"{self.prog}: {message} (--help shows the options)\n")


def parser() -> argparse.ArgumentParser:
    """Return the command line of the demo."""
    p = _Parser(prog="python -m harmonica.demo", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--model", default="tiny", help="tiny (bundled)")
    p.add_argument("--steps", type=int, default=20, help="T, sampler steps (20)")
    p.add_argument("--iterations", type=int, default=1500, help="updates of the router (1500)")
    p.add_argument(
        "--beta", type=float, default=1e-7, help="price of computing a site; more is faster and worse (1e-7)"
    )
    p.add_argument("--tau", type=float, default=0.1, help="a score above it computes (0.1)")
    p.add_argument("--seed", type=int, default=0, help="of training; the held-out noises are always the same (0)")
    p.add_argument("--schedule", type=Path, metavar="FILE", help="use this schedule instead of training")
    p.add_argument("--out", type=Path, default=Path("out/demo"), metavar="DIR", help="folder for results (out/demo)")
    p.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (cpu)")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; return 0, 2 for bad input or 130 after Ctrl-C, with one line on stderr."""
    args = parser().parse_args(arguments)
    try:
        run(args)
    except KeyboardInterrupt as stop:
        print(f"python -m harmonica.demo: {stop or 'stopped'}", file=sys.stderr)
        return 130
    except (ValueError, OSError, ArithmeticError) as error:
        print(f"python -m harmonica.demo: {error}", file=sys.stderr)
        return 2
    return 0


def run(args: argparse.Namespace) -> None:
    """Train or load, draw, measure, print, save."""
    from harmonica import plots

    denoiser = _denoiser(args)
    schedule = Schedule.load(args.schedule) if args.schedule else None
    if schedule is not None:
        schedule.check(denoiser.steps, tuple(denoiser.sites), denoiser.about["timesteps"])
    _make_writable(args.out)
    router = None
    if schedule is None:
        router = _train(denoiser, args)
        schedule = router.schedule(args.tau)
    # The held-out seed is far from training's: the same noises judge every router.
    x, labels = denoiser.draw(HELD_OUT, torch.Generator().manual_seed(1_000_003))
    plain, cached = sample(denoiser, x, labels), sample(denoiser, x, labels, schedule)
    print(_table(denoiser, schedule, x, labels, plain, cached))
    schedule.save(args.out / "schedule.json")
    shown = torch.cat([(labels == digit).nonzero()[:1, 0] for digit in range(10)])
    images = plots.comparison(
        plain[shown], cached[shown], labels=labels[shown].tolist(), title="same noise, same labels"
    )
    for name, figure in {"images": images, **_pictures(denoiser, schedule, router, x[:8], labels[:8])}.items():
        figure.savefig(args.out / f"{name}.png", dpi=120)
    print(f"schedule.json and pictures are in {args.out}")


def _denoiser(args: argparse.Namespace) -> DiTDenoiser:
    from harmonica.models import MODELS, load

    if args.model in MODELS and args.model != "tiny":
        raise ValueError(f"--model {args.model} needs weights and an autoencoder, which come next; today: --model tiny")
    if not 0.0 <= args.tau < 1.0 or args.beta < 0.0 or args.iterations < 1:
        found = f"--tau {args.tau} --beta {args.beta} --iterations {args.iterations}"
        raise ValueError(f"found {found}; expected 0 <= tau < 1, beta >= 0, iterations >= 1")
    if args.device.split(":")[0] not in ("cpu", "cuda", "mps"):
        raise ValueError(f"--device {args.device}: expected cpu, cuda, cuda:N or mps")
    try:
        return load(args.model, steps=args.steps, device=args.device)
    except (AssertionError, RuntimeError) as error:  # what torch raises for a device that is not there
        raise ValueError(f"--device {args.device}: {str(error).splitlines()[0]}") from None


def _make_writable(folder: Path) -> None:
    """Fail before the training, not after it."""
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / ".writable"
    probe.touch()
    probe.unlink()


def _train(denoiser: DiTDenoiser, args: argparse.Namespace) -> Router:
    # A tenth of the authors' updates on a thousandth of their model: ten times their learning rate, a small batch.
    return train_sdt(
        denoiser,
        iterations=args.iterations,
        batch_size=8,
        beta=args.beta,
        tau=args.tau,
        lr=0.1,
        refresh_every=10,
        generator=torch.Generator().manual_seed(args.seed),
    )


def _table(denoiser: DiTDenoiser, schedule: Schedule, x: Tensor, labels: Tensor, plain: Tensor, cached: Tensor) -> str:
    from harmonica.metrics import image_mse, label_agreement
    from harmonica.models.tiny import digits

    real = digits()
    theory = schedule.speedup(macs(denoiser))
    clock = measure(denoiser, schedule, x[:TIMED], labels[:TIMED], repeats=5)
    keep = [label_agreement(images, labels, *real) for images in (plain, cached)]
    rows = (
        ("cache utilisation (CUR)", f"{schedule.cur:.1%}"),
        ("theoretical speedup", f"{theory:.2f}x"),
        ("measured speedup", f"{clock.speedup:.2f}x  ({clock.plain:.3f} s -> {clock.cached:.3f} s, batch {TIMED})"),
        ("measured / theoretical", f"{clock.speedup / theory:.2f}"),
        ("image error (mean squared)", f"{image_mse(cached, plain):.2e}  of a pixel range of 2"),
        ("samples keeping their label", f"{keep[1]:.1%}  (without cache {keep[0]:.1%})"),
    )
    head = f"{denoiser.name}, {denoiser.sampler.name}, T = {denoiser.steps}, {len(x)} held-out noises"
    return "\n".join([head, *(f"  {name:29}{value}" for name, value in rows)])


def _pictures(
    denoiser: DiTDenoiser, schedule: Schedule, router: Router | None, x: Tensor, labels: Tensor
) -> dict[str, Figure]:
    from harmonica import plots

    cache: Cache = {}
    plain = list(denoise(denoiser, x, labels))
    cached = list(denoise(denoiser, x, labels, lambda k: reuse(schedule.compute[k], cache)))
    lams = {"leave-one-out": schedule.compute.float()}
    if router is not None:
        lams = {"soft, as trained": router().detach(), "hard, as run": schedule.compute.float()}
    tau = 0.1 if schedule.threshold is None else schedule.threshold
    lams = {name: image_error(denoiser, r.to(x.device), x, labels, tau=tau) for name, r in lams.items()}
    return {
        "router": plots.router_heatmap(
            schedule, title=f"{denoiser.name}, {denoiser.sampler.name}, T = {schedule.steps}"
        ),
        "error": plots.error_along_walk(plain, {f"HarmoniCa, CUR {schedule.cur:.0%}": cached}),
        "lambda": plots.lambda_per_step(lams),
    }


if __name__ == "__main__":
    sys.exit(main())
