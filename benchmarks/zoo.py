"""Every transformer that diffusers exports, under the general rule: whether it is exact, and how much is covered.

    python benchmarks/zoo.py

The models are the tiny random ones of tests/zoo.py. `forward` is the covered share of one counted forward: there,
embedders of fixed width outweigh blocks 16 wide. `blocks` is the share of the blocks' weights, as at any width.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from record import ended, record

from harmonica.cost import cost_of_call
from harmonica.models.sites import macs_per_token, sites

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from zoo import LEFT_OUT, UNCOUNTED, ZOO, called, examine

Row = dict[str, Any]


def examined(name: str) -> Row:
    """Return what the rule makes of one class."""
    model, inputs = ZOO[name]()
    try:
        every = sites(model)
        found, counted = called(model, inputs), None
        with contextlib.suppress(RuntimeError):  # a mask of zeros is no input for some
            counted = cost_of_call(model, every, ((), inputs))
    except (AssertionError, ValueError) as error:
        return {"sites": 0, "verdict": f"refused: {error}", "forward": None, "blocks": None}
    broken = examine(model, inputs, found)
    return {
        "sites": len(found),
        "verdict": f"wrong: {'; '.join(broken)}" if broken else "exact",
        "forward": round(counted.covered, 3) if counted else None,
        "blocks": round(macs_per_token(model, every).covered, 3),
    }


def main() -> None:
    """Examine, print the table, record."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    ).parse_args()
    warnings.simplefilter("ignore")
    logging.disable()
    torch.set_num_threads(1)
    rows = {name: examined(name) for name in sorted(ZOO)}
    print(f"{'class':40}  sites  forward  blocks  verdict")
    for name, row in rows.items():
        shares = [
            f"{100 * row[key]:.1f} %" if row[key] is not None else "–"
            for key in ("forward", "blocks")
        ]
        print(f"{name:40}  {row['sites']:5}  {shares[0]:>7}  {shares[1]:>7}  {row['verdict']}")
    exact = sum(row["verdict"] == "exact" for row in rows.values())
    print(f"{exact} of {len(rows)} exact; left out: {LEFT_OUT}")
    record(
        "zoo",
        {
            "exact": exact,
            "of": len(rows),
            "left_out": LEFT_OUT,
            "uncounted": UNCOUNTED,
            "classes": rows,
        },
    )


if __name__ == "__main__":
    ended(main)
