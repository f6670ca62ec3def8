"""What the commands share: options whose errors take one line, and the exit codes.

    0      done
    2      bad input, one line on stderr
    130    Ctrl-C

This file does not know what a command does.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line on stderr, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong in one line and exit with code 2."""
        self.exit(2, f"{self.prog}: {message} (--help shows the options)\n")


def exit_code(prog: str, work: Callable[[], None]) -> int:
    """Do the work of a command; return 0, 2 for bad input or 130 after Ctrl-C, with one line on stderr."""
    try:
        work()
    except KeyboardInterrupt as stop:
        return _say(f"{prog}: {stop or 'stopped'}", 130)
    except torch.OutOfMemoryError as error:
        return _say(f"{prog}: {_first_line(error)} Take a smaller batch.", 2)
    except (ValueError, OSError, ArithmeticError) as error:
        return _say(f"{prog}: {error}", 2)
    return 0


def check_device(device: str) -> None:
    """Raise ValueError, saying why, if torch cannot put a tensor on `device`."""
    if device.split(":")[0] not in ("cpu", "cuda", "mps"):
        raise ValueError(f"--device {device}: expected cpu, cuda, cuda:N or mps")
    try:
        torch.empty(1, device=device)
    except (AssertionError, RuntimeError) as error:  # what torch raises for a device that is not there
        raise ValueError(f"--device {device}: {_first_line(error)}") from None


def make_writable(folder: Path) -> None:
    """Make a folder and write to it, so that a command fails before its work and not after it."""
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / ".writable"
    probe.touch()
    probe.unlink()


def _say(line: str, code: int) -> int:
    sys.stderr.write(" ".join(line.split("\n")) + "\n")
    return code


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
