"""Two questions about SDT on the bundled digits model: whose walk it trains on, and what a row cannot see.

    python benchmarks/walks.py                           half an hour on one core
    python benchmarks/walks.py --updates 40 --seeds 1    to see it run

Whose walk: SDT lets the student's output take the step, so that later rows meet the errors of earlier reuse. Here the
same training also runs with the teacher's output taking the step, as training without the walk would have it. Both are
judged on the walk of inference, at the same speed, by the distance to the uncached image and to the reference.

What a row cannot see: a table reuses all sites at steps 1 to 7. One step of these is computed after all. What does the
image gain if the fresh outputs serve this step only, and if they also stay in the cache for the steps after it? The
gradient of a row of the router knows the first and never the second.

Writes results/walks.json and results/walks.png.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from record import RESULTS, ended, record
from torch import Tensor

from harmonica import Denoiser, Schedule, macs, references, sample, train_sdt
from harmonica.cache import Cache, Gate, reuse
from harmonica.denoise import denoise, final_image
from harmonica.models import load
from harmonica.pictures import per_step, save
from harmonica.search.references import image_mse

RUN = range(1, 8)  # the steps that reuse everything


class TeacherWalks:
    """The denoiser, except that a step is taken with the first prediction made at it: the teacher's."""

    def __init__(self, inner: Denoiser) -> None:
        self.inner, self.steps, self.sites, self.about = (
            inner,
            inner.steps,
            inner.sites,
            inner.about,
        )
        self.draw = inner.draw
        self.k = -1

    def predict(self, x: Tensor, k: int, cond: Any) -> Tensor:
        """Predict, and keep the first prediction of each step."""
        out = self.inner.predict(x, k, cond)
        if k != self.k:
            self.k, self.first = k, out.detach()
        return out

    def step(self, x: Tensor, out: Tensor, k: int, memory: dict[str, Any]) -> Tensor:
        """Take the step with the prediction that was kept."""
        return self.inner.step(x, self.first, k, memory)


def whose_walk(steps: int, speedup: float, seeds: int, updates: int) -> list[dict[str, Any]]:
    """Train on the student's and on the teacher's walk, and judge both tables on the same noises."""
    denoiser = load("tiny", steps=steps)
    pool = references(denoiser, noises=500, generator=torch.Generator().manual_seed(1_000_003))
    plain = sample(denoiser, pool.x, pool.cond)
    rows = []
    for seed in range(seeds):
        for walk, trained in (("student", denoiser), ("teacher", TeacherWalks(denoiser))):
            schedule = train_sdt(
                trained, iterations=updates, batch_size=8, lr=0.1, refresh_every=10, budget=0, target_speedup=speedup,
                cost=macs(denoiser), generator=torch.Generator().manual_seed(seed), progress=False,
            ).schedule(0.1)  # fmt: skip
            images = sample(denoiser, pool.x, pool.cond, schedule)
            rows.append(
                {
                    "walk": walk, "T": steps, "asked": speedup, "seed": seed,
                    "speedup": schedule.speedup(macs(denoiser)),
                    "image_error": image_mse(images, plain),
                    "to_reference_over_uncached": image_mse(images, pool.images) / image_mse(plain, pool.images),
                }
            )  # fmt: skip
            print(rows[-1], flush=True)
    return rows


def one_refresh(count: int = 256) -> dict[str, list[float]]:
    """Return what computing at each step of the run takes off the image error, by both accounts."""
    denoiser = load("tiny", steps=20)
    x, cond = denoiser.draw(count, torch.Generator().manual_seed(1_000_003))
    compute = torch.ones(denoiser.steps, len(denoiser.sites), dtype=torch.bool)
    compute[RUN.start : RUN.stop] = False
    plain = sample(denoiser, x, cond)
    without = image_mse(
        sample(denoiser, x, cond, Schedule(compute, sites=tuple(denoiser.sites))), plain
    )

    def error(fresh: int, kept: bool) -> float:
        cache: Cache = {}

        def gate(k: int) -> Gate:
            row = compute[k].tolist() if k != fresh else [True] * len(denoiser.sites)
            return reuse(row, cache if k != fresh or kept else {})

        return image_mse(final_image(denoise(denoiser, x, cond, gate)), plain)

    def gains(kept: bool) -> list[float]:
        return [without - error(k, kept) for k in RUN]

    return {
        "for this step only": gains(False),
        "kept for later steps too": gains(True),
        "without": [without],
    }


def main() -> None:
    """Train, refresh, record, draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--updates", type=int, default=1500)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    refresh = one_refresh()
    settings: tuple[tuple[int, float], ...] = ((20, 2.0), (10, 2.0))
    rows = [row for setting in settings for row in whose_walk(*setting, args.seeds, args.updates)]
    shown = {name: [float("nan"), *refresh[name]] for name in list(refresh)[:2]}
    figure = per_step(shown, ylabel="image error that one\ncomputed step saves")
    save(figure, RESULTS / "walks.png")
    record("walks", {"updates": args.updates, "whose_walk": rows, "one_refresh": refresh})


if __name__ == "__main__":
    ended(main)
