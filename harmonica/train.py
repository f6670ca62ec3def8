"""python -m harmonica.train: train a router for a model, from noise alone, and freeze it.

Writes router.safetensors (the scores, which --resume continues) and schedule.json (the table of
decisions) to --out. --dry-run only says what that will take. On several GPUs or machines, with the
same options:

    torchrun --nproc-per-node 4 -m harmonica.train --model dit-xl --device cuda --out out/dit-xl
"""

import argparse
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch

from harmonica import Denoiser, Router, macs, train_sdt
from harmonica import command_line as cli
from harmonica.iepo import Proxy
from harmonica.memory import free_bytes
from harmonica.models import BUNDLED
from harmonica.models.prompts import read_prompts
from harmonica.processes import batch_per_rank, processes, rank, started_as
from harmonica.search.target import check_target, target_of
from harmonica.storage.files import exclusive_lock
from harmonica.training.dry_run import DryRun, dry_run

AUTHORS = {"iterations": 20_000, "batch_size": 32, "beta": 7e-8, "lr": 0.01, "refresh_every": 25}
"""train_sdt's defaults, which follow the authors where they can. Their β is for T = 10, where
`refresh_every` should be 55, and they weigh by the telescoping λ."""

QUICK = {"iterations": 1500, "batch_size": 8, "beta": 1e-7, "lr": 0.1, "refresh_every": 10}
"""Settings for a bundled model, which has about a thousandth of the weights."""

_CHECKPOINTING = {"activation_checkpointing": True}
LARGE: dict[str, dict[str, Any]] = {
    "pixart-alpha-512": _CHECKPOINTING,
    "pixart-alpha-1024": {**_CHECKPOINTING, "batch_size": 8},
    "pixart-sigma-1024": {**_CHECKPOINTING, "batch_size": 8},
    "pixart-sigma-2k": {**_CHECKPOINTING, "batch_size": 2, "budget": 0},  # no search fits
}
"""Other settings for models that would not fit into 80 GiB."""


def defaults(model: str) -> dict[str, Any]:
    """Return the settings of training that are used for a model unless others are given."""
    usual = QUICK if model in BUNDLED else AUTHORS
    return {**usual, "activation_checkpointing": False, **LARGE.get(model, {})}


def parser() -> cli.Parser:
    """Return the command line of training; defaults that depend on the model are None."""
    p, proxies = cli.Parser("train", __doc__), (*get_args(Proxy), "none")
    cli.add_model_options(p)
    for name, kind, text in (
        ("iterations", cli.count, "updates of the router, in all"),
        ("batch-size", cli.count, "noises in a walk, of all GPUs together"),
        ("beta", cli.price, "price of computing a site; a higher price gives a faster table"),
        ("lr", cli.rate, "learning rate of the router"),
        ("refresh-every", cli.count, "walks between two measurements of lambda"),
    ):
        key = name.replace("-", "_")
        p.option(name, kind, f"{text} ({AUTHORS[key]:g}; bundled models: {QUICK[key]:g})")
    p.option("tau", cli.share, "a score above it computes", 0.1)
    p.option("target", float, "theoretical speedup, or just above it; no --beta", shown="SPEEDUP")
    budget = "of the search after training, with --target, in predictions of one noise (12 rounds)"
    p.option("budget", cli.whole, budget, shown="PREDICTIONS")
    p.option("proxy", proxies, "which lambda; none is 1", proxies[0])
    p.option("out", Path, "folder for results", Path("out/train"), "DIR")
    p.option("seed", cli.seed, "draws the first router and the noise", 0)
    p.add_argument("--resume", action="store_true", help="continue the router.safetensors in --out")
    p.add_argument("--dry-run", action="store_true", help="say what training will take, and stop")
    text = "run blocks again in backward: less memory, more time (where 80 GiB need it)"
    p.add_argument("--activation-checkpointing", action=argparse.BooleanOptionalAction, help=text)
    return p


def run(args: argparse.Namespace) -> None:
    """Check, join the other processes if any, load, train, freeze, save; rank 0 alone writes and
    prints.

    What can be checked without the model is checked first: a large one takes minutes to load.
    """
    complete(args)
    first, checkpointing = started_as()[0] == 0, args.activation_checkpointing
    if args.dry_run:
        print(f"{args.model}, T = {args.steps}, {args.iterations} updates\n{needs(args)}")
        return
    if first:
        _check_out(args)
    with exclusive_lock(args.out) if first else nullcontext(), processes(args.device) as device:
        batch_per_rank(args.batch_size)
        if device.type == "cuda":
            needs(args).check(free_bytes(device), checkpointing=checkpointing)
        denoiser = cli.load_model(args, device, checkpointing=checkpointing)
        router = _train(denoiser, args)
        if rank() == 0:
            schedule, file = router.schedule(args.tau), args.out / "schedule.json"
            schedule.save(file)
            made = f"{schedule.model}, {schedule.sampler}, T = {schedule.steps}"
            print(f"{made}, {args.iterations} updates")
            print(f"  cache utilisation (CUR)      {schedule.cur:.1%}")
            print(f"  theoretical speedup          {schedule.speedup(macs(denoiser)):.2f}x")
            print(f"{file} and {args.out / 'router.safetensors'} are written")


main = partial(cli.command, parser, run)


def needs(args: argparse.Namespace) -> DryRun:
    """Count what training will take, for this process."""
    dtype = str(cli.dtype_of(args, args.device)).removeprefix("torch.")
    args = argparse.Namespace(**{**vars(args), "weights": "random", "dtype": dtype})
    denoiser = cli.load_model(args, "meta", checkpointing=args.activation_checkpointing)
    settings = {name: getattr(args, name) for name in ("iterations", "refresh_every", "budget")}
    batch, target = -(-args.batch_size // started_as()[1]), args.target is not None and args.dry_run
    target_of(denoiser, args.target, None, None)  # out of reach?
    return dry_run(denoiser, **settings, batch_size=batch, proxy=args.proxy, target=target)


def complete(args: argparse.Namespace) -> None:
    """Fill in the settings that were not given, and refuse what no model could be trained with."""
    check_target(args.target, args.beta, budget=args.budget)
    for name, value in defaults(args.model).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if started_as()[1] == 1:
        cli.check_device(args.device, there=not args.dry_run)
    args.prompts = None if args.prompts is None else read_prompts(args.prompts)
    args.proxy = None if args.proxy == "none" else args.proxy


def _check_out(args: argparse.Namespace) -> None:
    file = args.out / "router.safetensors"
    if args.resume and not file.is_file():
        todo = "check --out, or train without it"
        raise FileNotFoundError(f"--resume: there is no {file} to continue; {todo}")
    if not args.resume and file.exists():
        raise FileExistsError(f"{file} exists; continue it with --resume, or choose another --out")
    cli.make_writable(args.out)


def _train(denoiser: Denoiser, args: argparse.Namespace) -> Router:
    names = (*AUTHORS, "tau", "budget", "proxy", "resume")
    settings = {name: getattr(args, name) for name in names} | {"target_speedup": args.target}
    if args.target is not None:
        del settings["beta"]
    generator, file = torch.Generator().manual_seed(args.seed), args.out / "router.safetensors"
    try:
        return train_sdt(denoiser, **settings, generator=generator, checkpoint=file)
    except KeyboardInterrupt as stop:  # the library says resume=True, this is a command line
        raise KeyboardInterrupt(str(stop).replace("resume=True", "--resume")) from None


if __name__ == "__main__":
    sys.exit(main())
