"""Tables that others published, read and counted.

    python benchmarks/imports.py FOLDER

FOLDER holds l2c/DDIM20_router.pt and l2c/DDIM50_router.pt of Learning-to-Cache (github.com/horseee/learning-to-cache)
and smoothcache/50-N-2-l2c.json of SmoothCache (github.com/Roblox/SmoothCache), the second of them at threshold 0.1.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from record import ended, record

from harmonica import Schedule


def main() -> None:
    """Read, compare and record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    routers = {
        steps: Schedule.load(folder / "l2c" / f"DDIM{steps}_router.pt", tau=0.1)
        for steps in (20, 50)
    }
    exported = Schedule.load(folder / "smoothcache" / "50-N-2-l2c.json")
    differs = routers[50].compute != exported.compute
    figures = {
        "ddim50_against_its_smoothcache_export": {
            "steps_that_differ": int(differs.any(1).sum()),
            "sites_that_differ": f"{int(differs.any(0).sum())} of {len(exported.sites)}",
        },
        "cur_percent": {
            f"ddim{steps}": round(100 * table.cur, 2) for steps, table in routers.items()
        },
    }
    record("imports", figures)


if __name__ == "__main__":
    ended(main)
