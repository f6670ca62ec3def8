"""In turn: a table and the weights of its gates, each learned for the other, until neither helps.

    weights    are learned for the table (harmonica.search.learn)
    table      a search flips single entries of it under these weights (harmonica.search.refine)

Weights that were learned know which outputs they may read, so a flip is worth something else with
them than without. This file does not know how either of the two works.
"""

from functools import partial
from itertools import cycle

import torch

from harmonica.denoise import Denoiser
from harmonica.router import Schedule
from harmonica.search.flip_effects import with_table
from harmonica.search.learn import held_back, learn_weights
from harmonica.search.references import Pool
from harmonica.search.refine import WALKS_PER_ROUND, few_of, refine
from harmonica.search.target import Target

TURN_ROUNDS, TURN_NOISES = 8, 256
"""Rounds of the search in one turn; noises that it judges tables on, half of the pool at most."""


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
) -> Schedule:
    """Return a schedule on target whose table and weights were learned in turn.

    The noises that `learn_weights` holds back decide: a turn after which their error has not fallen
    is not kept, and is the last. One turn costs about TURN_ROUNDS rounds of the search on its
    noises, and an update about three walks of `batch_size` noises.

    Args:
        denoiser, pool, iterations, batch_size, generator: as in `learn_weights`.
        schedule: on target, with or without weights.
        target: the speedup that tables must have.
        turns: at most so many times the table is searched and the weights learned again.

    Raises ValueError if a number is out of range, or the schedule is slower than the target.
    """
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    _, training = held_back(pool)
    judging = training[slice(min(max(len(pool) // 2, 1), TURN_NOISES))]
    few = few_of(len(judging))
    others = cycle([training[slice(i, i + few)] for i in range(0, len(training) - few + 1, few)])
    one = TURN_ROUNDS * WALKS_PER_ROUND * denoiser.steps
    budget = one * len(judging)  # predictions of one noise
    learn = partial(
        learn_weights, iterations=iterations, batch_size=batch_size, generator=generator
    )
    best = learn(denoiser, schedule, pool)
    for _ in range(turns):
        tables = refine(denoiser, [best.compute], judging, others, target, budget=budget, fill=best)
        *_, judged = tables
        after = learn(denoiser, with_table(best, judged.table), pool)
        if not _validation_error(after) < _validation_error(best):
            break
        best = after
    return best


def _validation_error(learned: Schedule) -> float:
    return float(learned.provenance["weights_validation_error"])
