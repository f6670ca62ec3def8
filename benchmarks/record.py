"""record: one result file for each benchmark, with the machine and the command beside the figures."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch

from harmonica.command_line import exit_code
from harmonica.storage.files import write_whole

RESULTS = Path(__file__).parent / "results"


def ended(main: Callable[[], None]) -> NoReturn:
    """Run a benchmark to its end; Ctrl-C, bad input and a closed pipe end it as they end a command of the library."""
    sys.exit(exit_code(f"python benchmarks/{Path(sys.argv[0]).name}", main))


def machine() -> dict[str, Any]:
    """Say what the figures were measured on."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
            if "model name" in line
        ]
        cpu = names[0] if names else cpu
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        **versions,
    }


def memory_mib(field: str) -> float:
    """Return what Linux counts of this process's memory: VmRSS is now, VmHWM the most so far."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split(f"{field}:")[1].split()[0]) / 1024


def record(name: str, figures: dict[str, Any], to: Path = RESULTS) -> None:
    """Print the figures and write them to results/NAME.json."""
    command = shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    result = {
        "command": command,
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "figures": figures,
    }
    to.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=1) + "\n"
    write_whole(to / f"{name}.json", lambda beside: beside.write_text(text, encoding="ascii"))
    print(json.dumps(figures, indent=1))
