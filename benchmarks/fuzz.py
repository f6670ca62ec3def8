"""Spoilt files, for as long as one likes: what the loaders do with them.

    nice -n 10 python benchmarks/fuzz.py --seconds 180

Every kind of file that the library reads gets an equal share of the time. What is done to a file and what counts as a
finding: benchmarks/fuzzing.py. A finding can be made again: its seed and way are in results/fuzz.json.
"""

from __future__ import annotations

import argparse
import random
import resource
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from record import ended, record

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from fuzzing import TARGETS, Target, outcome, put, ways, whole

MEMORY = 8 << 30
"""Bytes of address space; a file that makes a reader ask for more is a finding, and not the end of the machine."""
SLOW = 2.0
"""Seconds to read a file of a few kilobytes; more is a finding."""


def fuzz(
    target: Target, seconds: float, seed: int, findings: list[dict[str, Any]]
) -> dict[str, int]:
    """Spoil and read files of one kind; return how many there were, their bytes, and how reading ended."""
    counts: Counter[str] = Counter(files=0, bytes=0)
    end = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        while time.monotonic() < end:
            counts["files"] += 1
            drawn = f"{seed}:{target.name}:{counts['files']}"
            draw = random.Random(drawn)
            way = draw.choice(ways(target))
            data = way(whole(target)[target.file], draw)
            path, begun = put(target, Path(folder), data), time.monotonic()
            ending = outcome(target, path)
            if time.monotonic() - begun > SLOW:
                ending = f"took {time.monotonic() - begun:.0f} s"
            counts["bytes"] += len(data)
            counts[ending if ending in ("object", "refused") else "findings"] += 1
            if ending not in ("object", "refused"):
                findings.append(
                    {"target": target.name, "way": way.__name__, "seed": drawn, "found": ending}
                )
    return dict(counts)


def main() -> None:
    """Fuzz every kind of file and record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=180.0, help="for all kinds together (180)")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (0)")
    args = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    findings: list[dict[str, Any]] = []
    counts = {t.name: fuzz(t, args.seconds / len(TARGETS), args.seed, findings) for t in TARGETS}
    total = sum((Counter(count) for count in counts.values()), Counter())
    figures = {"total": dict(total), "findings": findings[:50], "kinds_of_file": counts}
    record("fuzz", figures)


if __name__ == "__main__":
    ended(main)
