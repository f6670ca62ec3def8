"""Two processes against one with the joint batch: how far apart the routers end.

    python benchmarks/two_processes.py

Trains the bundled model's router alone and under torchrun (gloo), the same settings and noise, for each λ.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from record import ended, record

from harmonica import Router

SETTINGS = [
    "--steps",
    "20",
    "--iterations",
    "60",
    "--batch-size",
    "8",
    "--lr",
    "0.1",
    "--refresh-every",
    "2",
]


def trained(proxy: str, processes: int) -> Router:
    """Return the router of a run of `processes` processes."""
    start = [sys.executable, "-m"]
    if processes > 1:
        start += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    with tempfile.TemporaryDirectory() as folder:
        command = [*start, "harmonica.train", *SETTINGS, "--proxy", proxy, "--out", folder]
        subprocess.run(
            command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        return Router.load(Path(folder) / "router.safetensors")


def main() -> None:
    """Measure and record."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    ).parse_args()
    figures = {}
    for proxy in ("none", "leave-one-out", "telescoping"):
        one, two = trained(proxy, 1), trained(proxy, 2)
        r, other = one().detach(), two().detach()
        figures[proxy] = {
            "largest_relative_difference_of_r": float(((r - other).abs() / r).max()),
            "largest_difference_of_logits": float((one.logits - two.logits).abs().max()),
            "decisions_that_differ": int(((r > 0.1) != (other > 0.1)).sum()),
        }
    record("two_processes", {"settings": " ".join(SETTINGS), **figures})


if __name__ == "__main__":
    torch.set_num_threads(1)
    ended(main)
