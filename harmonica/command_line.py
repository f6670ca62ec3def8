"""What the commands share: the options of a model, errors that take one line, and the exit codes.

    0      done
    2      bad input, one line on stderr
    130    Ctrl-C
    141    nobody reads what is printed any more, as in `| head -1`; nothing on stderr

This file does not know what a command does.
"""

import argparse
import io
import math
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from harmonica import memory, models
from harmonica.denoise import check_fit
from harmonica.memory import is_out_of_memory
from harmonica.models.guided import Guided
from harmonica.processes import started_as
from harmonica.router import Schedule
from harmonica.site_names import fit
from harmonica.values import require

DTYPES = ("float32", "bfloat16", "float16")  # of the weights; a router is always float32


class Parser(argparse.ArgumentParser):
    """The parser of `python -m harmonica.NAME`; an error is one line on stderr, without usage."""

    def __init__(self, name: str, description: str | None) -> None:
        prog, form = f"python -m harmonica.{name}", argparse.RawTextHelpFormatter
        super().__init__(prog, description=description, formatter_class=form)

    def option(
        self, name: str, kind: Any, text: str, usual: Any = None, shown: str | None = None
    ) -> None:
        """Add --name: type or choices, what it is, its default, and what stands for its value."""
        how = {"choices": kind} if isinstance(kind, tuple) else {"type": kind, "metavar": shown}
        text = text if usual is None else f"{text} ({usual})"
        self.add_argument(f"--{name}", default=usual, help=text, **how)

    def error(self, message: str) -> NoReturn:
        """Say what is wrong in one line and exit with code 2."""
        self.exit(2, f"{self.prog}: {message} (--help shows the options)\n")


def _number(kind: type, expected: str, fits: Callable[[Any], bool]) -> Callable[[str], Any]:
    """Return a `type` of options: the number that a text says, if it fits."""

    def read(text: str) -> Any:
        with suppress(ValueError):
            if fits(number := kind(text)):
                return number
        raise argparse.ArgumentTypeError(f"found {text[:40]!r}; expected {expected}")

    return read


whole = _number(int, "a whole number of at most 31 bits", lambda n: abs(n) < 2**31)
count = _number(int, "a whole number, 1 or more, of at most 31 bits", lambda n: 1 <= n < 2**31)
seed = _number(int, "a whole number, 0 or more, of at most 63 bits", lambda n: 0 <= n < 2**63)
share = _number(float, "a number, 0 or more and below 1", lambda n: 0.0 <= n < 1.0)
price = _number(float, "a number, 0 or more", lambda n: 0.0 <= n < math.inf)
rate = _number(float, "a number above 0, 1000 at most", lambda n: 0.0 < n <= 1000.0)


def add_model_options(p: Parser) -> None:
    """Add the options that `load_model` reads: which model, how it samples, where it runs."""
    dtypes = "of the weights (float32; on cuda bfloat16, and float32 there is without TF32)"
    p.option("model", str, "what harmonica.models.load knows; garments is bundled too", "tiny")
    p.option("weights", str, 'of the model, or "random" (what it comes with)', shown="PATH")
    p.option("sampler", str, "ddim, dpm-solver++, iddpm or sa-solver (the model's own)")
    p.option("steps", whole, "T, sampler steps", 20)
    p.option("guidance", float, "classifier-free guidance scale (the model's own)")
    p.option("prompts", Path, "one to a line, for text-to-image (64 of our own)", shown="FILE")
    p.option("device", str, "cpu, cuda or cuda:N; under torchrun cuda is a GPU each", "cpu")
    p.option("dtype", DTYPES, dtypes)


def add_image_options(p: Parser) -> None:
    """Add the options of a model, and those that `load_for_images` reads besides."""
    add_model_options(p)
    p.option("vae", Path, "autoencoder saved by diffusers", shown="DIR")
    p.option("schedule", Path, "table to follow", shown="FILE")


def load_model(
    args: argparse.Namespace, device: str | torch.device, *, checkpointing: bool = False
) -> Guided:
    """Load the model of the options to a device, with activation checkpointing or without."""
    names = ("sampler", "steps", "guidance", "weights", "prompts")
    options = {name: getattr(args, name) for name in names} | {"dtype": dtype_of(args, device)}
    return models.load(args.model, **options, device=device, activation_checkpointing=checkpointing)


def load_for_images(
    args: argparse.Namespace, device: str | torch.device
) -> tuple[Guided, Schedule | None, Callable[[Tensor], Tensor]]:
    """Load a model, a schedule that fits it, if one is given, and what decodes its latents."""
    from harmonica.models.autoencoder import decoder

    schedule = Schedule.load(args.schedule) if args.schedule else None
    denoiser, dtype = load_model(args, device), dtype_of(args, device)
    if schedule is not None:
        schedule = fit(schedule, tuple(denoiser.sites))
        check_fit(schedule, denoiser)
    decode = decoder(args.model, args.weights, vae=args.vae, device=device, dtype=dtype)
    return denoiser, schedule, decode


def dtype_of(args: argparse.Namespace, device: str | torch.device) -> torch.dtype:
    """Return the dtype of the weights that the options name, or the usual one of this device."""
    usual = "bfloat16" if str(device).startswith("cuda") else "float32"
    return getattr(torch, args.dtype or usual)  # type: ignore[no-any-return]


def command(
    parser: Callable[[], Parser], run: Callable[[argparse.Namespace], None],
    arguments: Sequence[str] | None = None,
) -> int:  # fmt: skip
    """Parse and run a command, which says its rank if it is one of several; return `exit_code`."""
    p, (number, world) = parser(), started_as()
    p.prog += f" (rank {number} of {world})" if world > 1 else ""
    return exit_code(p.prog, lambda: run(p.parse_args(arguments)))


def exit_code(prog: str, work: Callable[[], None]) -> int:
    """Do the work of a command, parsing included; return the code of its end (see above)."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # an ASCII locale cannot show ×
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            work()
        finally:
            sys.stdout.flush()
        return 0
    except BrokenPipeError:
        with suppress(OSError, ValueError):  # a stream of a test or a notebook has no number
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the rest goes nowhere
        return 141
    except KeyboardInterrupt as stop:
        line, code = str(stop) or "stopped", 130
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        first = memory.first_line(error).rpartition("] ")[2]
        line, code = f"out of memory, {first} Take a smaller batch.", 2
    except (ValueError, OSError, ArithmeticError) as error:
        line, code = str(error), 2
    sys.stderr.write(" ".join(f"{prog}: {line}".split("\n")) + "\n")
    return code


def check_device(device: str, there: bool = True) -> None:
    """Raise ValueError, saying why, if torch knows no `device`, or it is not `there`."""
    known = device.split(":")[0] in ("cpu", "cuda", "mps")
    require(known, f"--device {device}: expected cpu, cuda, cuda:N or mps")
    if there:
        memory.check_device(device, "--device")


def make_writable(folder: Path) -> None:
    """Make a folder and write to it, so that a command fails before its work and not after it."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as probe:
        probe.write(b"x")
