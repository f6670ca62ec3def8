"""What the gate itself costs: nanoseconds for a computed and for a skipped site, over a plain call.

    python benchmarks/gate.py

The site does nothing, so what is timed is asking. Turns are interleaved; figures are medians over the turns.
"""

from __future__ import annotations

import argparse
import time
from statistics import median

import torch
from record import ended, record
from torch import Tensor, nn

from harmonica import gated, reuse


class Nothing(nn.Module):
    """A site whose forward costs nothing."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x."""
        return x


def nanoseconds(site: nn.Module, x: Tensor, calls: int) -> float:
    """Time one call of a site."""
    start = time.perf_counter_ns()
    for _ in range(calls):
        site(x)
    return (time.perf_counter_ns() - start) / calls


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=31)
    parser.add_argument("--calls", type=int, default=20_000)
    args = parser.parse_args()
    site, x, cache = Nothing(), torch.zeros(1), {}
    turns = []
    for _ in range(args.turns + 1):
        plain = nanoseconds(site, x, args.calls)
        with gated([site], reuse([True], cache)):
            computed = nanoseconds(site, x, args.calls)
        with gated([site], reuse([False], cache)):
            skipped = nanoseconds(site, x, args.calls)
        sites = [Nothing() for _ in range(56)]
        start = time.perf_counter_ns()
        for _ in range(100):
            with gated(sites, reuse([True] * 56, cache)):
                pass
        turns.append(
            (plain, computed - plain, skipped - plain, (time.perf_counter_ns() - start) / 100 / 56)
        )
    names = (
        "plain_call_ns",
        "computed_site_over_plain_ns",
        "skipped_site_over_plain_ns",
        "gating_per_site_and_step_ns",
    )
    figures = {
        name: round(median(column), 1)
        for name, column in zip(names, zip(*turns[1:], strict=True), strict=True)
    }
    record("gate", figures)


if __name__ == "__main__":
    ended(main)
