"""python -m harmonica.train: train a router for a model, from noise alone, and freeze it.

Writes router.safetensors (the table in training, which --resume continues) and schedule.json (the
decisions) to --out. On several GPUs or machines, with the same options:

    torchrun --nproc-per-node 4 -m harmonica.train --model dit-xl --device cuda --out out/dit-xl
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import torch

from harmonica import Router, macs, train_sdt
from harmonica.command_line import (
    Parser,
    add_model_options,
    check_device,
    command,
    load_model,
    make_writable,
    seed,
    whole,
)
from harmonica.iepo import Proxy
from harmonica.models import BUNDLED
from harmonica.models.prompts import read_prompts
from harmonica.processes import batch_per_rank, processes, rank, started_as
from harmonica.search.budget import check_target
from harmonica.storage.files import exclusive_lock

if TYPE_CHECKING:
    from harmonica.denoise import Denoiser

PROG = "python -m harmonica.train"
AUTHORS = {"iterations": 20_000, "batch_size": 32, "beta": 7e-8, "lr": 0.01, "refresh_every": 25}
"""The authors' settings for DiT-XL/2, which are train_sdt's defaults."""
QUICK = {"iterations": 1500, "batch_size": 8, "beta": 1e-7, "lr": 0.1, "refresh_every": 10}
"""The demo's settings for the bundled model: a tenth of the updates on a thousandth of the
model."""


TARGET = "theoretical speedup to land on, or just above"
ORDER = (
    "with --target: continue skipped outputs by so many differences instead of repeating them (0)"
)
"""What these options are, here and in the demo."""


def parser() -> Parser:
    """Return the command line of training."""
    p = Parser(prog=PROG, description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_model_options(p)
    _add_settings(p)
    p.add_argument(
        "--out",
        type=Path,
        default=Path("out/train"),
        metavar="DIR",
        help="folder for results (out/train)",
    )
    p.add_argument("--resume", action="store_true", help="continue the router.safetensors in --out")
    p.add_argument(
        "--checkpoint-every",
        type=whole,
        default=500,
        help="updates from one write to the next (500)",
    )
    p.add_argument("--seed", type=seed, default=0, help="draws the first router and the noise (0)")
    p.add_argument(
        "--activation-checkpointing",
        action="store_true",
        help="less memory: backward runs blocks again",
    )
    return p


def _add_settings(p: Parser) -> None:
    """Add what train_sdt takes, without defaults: they depend on the model."""

    def default(name: str) -> str:
        return f"({AUTHORS[name]:g}; bundled models: {QUICK[name]:g})"

    p.add_argument(
        "--iterations", type=whole, help=f"updates of the router, in all {default('iterations')}"
    )
    p.add_argument(
        "--batch-size",
        type=whole,
        help=f"noises in a trajectory, of all GPUs {default('batch_size')}",
    )
    p.add_argument(
        "--beta", type=float, help=f"price of computing a site; more is faster {default('beta')}"
    )
    p.add_argument("--lr", type=float, help=f"learning rate of the router {default('lr')}")
    p.add_argument(
        "--refresh-every",
        type=whole,
        help=f"trajectories between two lambdas {default('refresh_every')}",
    )
    p.add_argument("--tau", type=float, default=0.1, help="a score above it computes (0.1)")
    p.add_argument("--target", type=float, metavar="SPEEDUP", help=f"{TARGET}, instead of --beta")
    p.add_argument(
        "--refine",
        type=whole,
        metavar="PREDICTIONS",
        help="to spend on it after training (12 rounds)",
    )
    p.add_argument("--order", type=whole, default=0, help=ORDER)
    proxies = (*get_args(Proxy), "none")
    p.add_argument(
        "--proxy",
        choices=proxies,
        default=proxies[0],
        help=f"which lambda; none is 1 ({proxies[0]})",
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Train; return 0, 2 for bad input or 130 after Ctrl-C, with one line on stderr."""
    return command(parser(), run, arguments)


def run(args: argparse.Namespace) -> None:
    """Check, join the other processes if any, load, train, freeze, save; rank 0 alone writes and
    prints.

    What can be checked without the model is checked first: a large one takes minutes to load.
    """
    _fill_in_and_check(args)
    checkpoint = args.out / "router.safetensors"
    first = started_as()[0] == 0
    if first:
        _check_out(checkpoint, args.resume)
    with exclusive_lock(args.out) if first else nullcontext(), processes(args.device) as device:
        batch_per_rank(args.batch_size)
        denoiser = load_model(args, device, activation_checkpointing=args.activation_checkpointing)
        router = _train(denoiser, args, checkpoint)
        if rank() == 0:
            schedule = router.schedule(args.tau)
            schedule.save(args.out / "schedule.json")
            print(
                f"{schedule.model}, {schedule.sampler}, T = {schedule.steps}, {args.iterations} updates"
            )
            print(f"  cache utilisation (CUR)      {schedule.cur:.1%}")
            print(f"  theoretical speedup          {schedule.speedup(macs(denoiser)):.2f}x")
            print(f"{args.out / 'schedule.json'} and {checkpoint} are written")


def _fill_in_and_check(args: argparse.Namespace) -> None:
    """Fill in the settings that were not given, and refuse what no model could be trained with."""
    check_target(args.target, args.beta, args.order)
    if args.refine is not None and (args.target is None or args.refine < 0):
        raise ValueError(
            f"--refine is {args.refine} and --target {args.target}; expected 0 or more, and a target"
        )
    for name, value in (QUICK if args.model in BUNDLED else AUTHORS).items():
        if getattr(args, name) is None and not (name == "beta" and args.target is not None):
            setattr(args, name, value)
    if (
        not 0.0 <= args.tau < 1.0
        or not 0.0 <= (args.beta or 0.0) < math.inf
        or not 0.0 < args.lr <= 1000.0
    ):
        found = f"--tau {args.tau} --beta {args.beta} --lr {args.lr}"
        raise ValueError(f"found {found}; expected 0 <= tau < 1, beta >= 0, 0 < lr <= 1000")
    for name in ("iterations", "batch_size", "refresh_every", "checkpoint_every"):
        if getattr(args, name) < 1:
            raise ValueError(
                f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be 1 or more"
            )
    if started_as()[1] == 1:
        check_device(args.device)
    args.prompts = None if args.prompts is None else read_prompts(args.prompts)


def _check_out(checkpoint: Path, resume: bool) -> None:
    if resume and not checkpoint.is_file():
        raise FileNotFoundError(
            f"--resume: there is no {checkpoint} to continue; check --out, or train without it"
        )
    if not resume and checkpoint.exists():
        raise FileExistsError(
            f"{checkpoint} exists; continue it with --resume, or choose another --out"
        )
    make_writable(checkpoint.parent)


def _train(denoiser: Denoiser, args: argparse.Namespace, checkpoint: Path) -> Router:
    try:
        return train_sdt(
            denoiser,
            iterations=args.iterations,
            batch_size=args.batch_size,
            tau=args.tau,
            beta=AUTHORS["beta"] if args.beta is None else args.beta,  # None: a target steers it
            lr=args.lr,
            refresh_every=args.refresh_every,
            proxy=None if args.proxy == "none" else args.proxy,
            target_speedup=args.target,
            refine=args.refine,
            order=args.order,
            generator=torch.Generator().manual_seed(args.seed),
            checkpoint=checkpoint,
            checkpoint_every=args.checkpoint_every,
            resume=args.resume,
        )
    except KeyboardInterrupt as stop:  # the library says resume=True, this is a command line
        raise KeyboardInterrupt(str(stop).replace("resume=True", "--resume")) from None


if __name__ == "__main__":
    sys.exit(main())
