"""In turn: a table and the weights of its gates, each learned for the other, until neither helps.

    weights    are learned for the table (harmonica.search.learn)
    table      a search flips single entries of it under these weights (harmonica.search.refine)

Weights that were learned know which outputs they may read, so a flip is worth something else with
them than without. This file does not know how either of the two works.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle

import torch

from harmonica.denoise import Denoiser
from harmonica.router import Schedule
from harmonica.search.budget import Target
from harmonica.search.flip_effects import with_table
from harmonica.search.learn import SHARE, learn_weights
from harmonica.search.references import Pool, pool_errors
from harmonica.search.refine import ROUND, few_of, refine

ROUNDS, NOISES = 8, 256
"""Rounds of the search in one turn, and noises that it judges tables on, half of the pool at most."""


def learn_in_turn(  # noqa: D417 (some arguments are described together)
    denoiser: Denoiser,
    schedule: Schedule,
    pool: Pool,
    target: Target,
    *,
    turns: int = 3,
    iterations: int = 288,
    batch_size: int = 16,
    generator: torch.Generator | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> Schedule:
    """Return a schedule on target whose table and weights were learned in turn.

    The noises that `learn_weights` holds back decide: a turn after which their error has not fallen
    is not kept, and is the last. One turn costs about ROUNDS rounds of the search on its
    noises, and an update about three walks of `batch_size` noises.

    Args:
        denoiser, pool, iterations, batch_size, generator: as in `learn_weights`.
        schedule: on target, with or without weights.
        target: the speedup that tables must have.
        turns: at most so many times the table is searched and the weights learned again.
        progress: called before each turn as progress(turn, error of the noises held back).

    Raises ValueError if a number is out of range, or the schedule is slower than the target.
    """
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    held_back = max(len(pool) // SHARE, 1)
    validation = pool[slice(held_back)]
    judged = pool[slice(held_back, held_back + min(max(len(pool) // 2, 1), NOISES))]
    few = few_of(len(judged))
    others = cycle([pool[slice(i, i + few)] for i in range(held_back, len(pool) - few + 1, few)])
    budget = ROUNDS * ROUND * denoiser.steps * len(judged)

    def learned(start: Schedule) -> tuple[float, Schedule]:
        end = learn_weights(
            denoiser, start, pool, iterations=iterations, batch_size=batch_size, generator=generator
        )
        return float(pool_errors(denoiser, validation, end).mean()), end

    error, best = learned(schedule)
    for turn in range(turns):
        if progress is not None:
            progress(turn, error)
        tables = refine(denoiser, [best.compute], judged, others, target, budget=budget, gate=best)
        *_, found = tables
        lower, after = learned(with_table(best, found.table))
        if not lower < error:
            break
        error, best = lower, after
    return best
