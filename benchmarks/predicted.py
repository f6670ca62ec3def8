"""How fast a table will be: what its MACs say, what milliseconds say, and the clock; with reuse and with forecasts.

    python benchmarks/predicted.py                              two CPU cores: half an hour
    python benchmarks/predicted.py --only tiny --repeats 3      a minute
    python benchmarks/predicted.py --device cuda --dtype float16

MACs are counted; milliseconds are measured once, site by site, on walks without reuse (`milliseconds`), before any
of the tables runs. The tables: every second step, every third, attention alone at every second step. Walks of all of
them and the walk without reuse are timed by turns. `order` is the schedule's: 0 reuses, 1 and 2 forecast.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from record import ended, record
from speed import Case, denoiser_of

from harmonica import Denoiser, Schedule, macs
from harmonica.inference.timing import by_turns, milliseconds
from harmonica.inference.walk import Walk
from harmonica.search.paths import whole_steps

CASES = (
    Case("tiny", 1, 0, 20),
    Case("tiny", 8, 0, 20),
    Case("tiny", 64, 0, 20),
    Case("DiT-S/2", 8, 0, 10),
    Case("dit-xl-256", 1, 0, 10),
)
ORDERS = (0, 1, 2)


def tables(d: Denoiser) -> dict[str, Schedule]:
    """Return what is timed."""
    whole = {f"every {n}": whole_steps(d, range(0, d.steps, n)) for n in (2, 3)}
    attention = whole["every 2"] | ~torch.tensor(["attn" in site for site in d.sites])
    rows = {**whole, "attention every 2": attention}
    return {name: Schedule(table, sites=tuple(d.sites)) for name, table in rows.items()}


def of(case: Case, device: str, dtype: torch.dtype, repeats: int) -> list[dict[str, Any]]:
    """Measure a case."""
    d = denoiser_of(case, device, dtype)
    counted, took = macs(d), milliseconds(d, case.batch, repeats=repeats)
    x, cond = d.draw(case.batch, torch.Generator().manual_seed(0))
    asked = {
        (name, order): replace(table, order=order)
        for name, table in tables(d).items()
        for order in ORDERS
    }
    walks = {"plain": Walk(d), **{str(key): Walk(d, table) for key, table in asked.items()}}
    seconds = by_turns(walks, x, cond, repeats=repeats)
    rows = []
    for (name, order), table in asked.items():
        turns = zip(seconds["plain"], seconds[str((name, order))], strict=True)
        row: dict[str, Any] = {
            "model": case.model,
            "batch": case.batch,
            "T": case.steps,
            "table": name,
            "order": order,
        }
        row |= {"macs": table.speedup(counted), "milliseconds": table.speedup(took)}
        rows.append({**row, "clock": median(plain / cached for plain, cached in turns)})
        print(
            {
                key: round(value, 3) if isinstance(value, float) else value
                for key, value in rows[-1].items()
            }
        )
    return rows


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only",
        nargs="+",
        default=[""],
        metavar="TEXT",
        help="cases whose name contains one of these",
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    args = parser.parse_args()
    cases = [case for case in CASES if any(text in case.name for text in args.only)]
    if not cases:
        raise ValueError(
            f"--only is {args.only}; the cases are {', '.join(case.name for case in CASES)}"
        )
    found = [
        row
        for case in cases
        for row in of(case, args.device, getattr(torch, args.dtype), args.repeats)
    ]
    record("predicted", {"repeats": args.repeats, "rows": found})


if __name__ == "__main__":
    ended(main)
