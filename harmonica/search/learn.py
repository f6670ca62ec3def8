"""Learn: the weights of a schedule's gates, by gradients of the distance to a pool's images.

The image of a walk under a schedule is differentiable in the weights of its gates. So the weights
are moved by Adam down the mean squared difference between that image and its target, through the
whole walk:

    for each batch of noises of the pool:
        image = walk(noise, weights)
        error = mean (image − target)²
        weights ← Adam step

A share of the pool, the validation noises, is not trained on. It decides which start is taken and
which weights are kept. In the mean, a noise counts less if its error is above a limit that is fixed
once: CAP times the median of the start's errors on the validation noises.
Activations of the whole walk are kept where a quarter of the free memory holds them; otherwise each
step runs again in backward. `learn_weights` leaves the table as it is; `learn_in_turn` searches for
a better one after each training of the weights.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import cycle
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam

from harmonica.cache import Cache, Gate
from harmonica.check import require_denoiser
from harmonica.denoise import Denoiser, check_fit
from harmonica.forecast import taylor_weights, weighted
from harmonica.router import Schedule
from harmonica.run_again import run_again
from harmonica.search.flip_effects import with_table
from harmonica.search.paths import Run, differentiable_walk, room_for
from harmonica.search.references import (
    CAP,
    Pool,
    image_errors,
    outlier_weights,
    pool_errors,
    typical_error,
)
from harmonica.search.refine import WALKS_PER_ROUND, few_of, refine
from harmonica.search.target import Target, require_target
from harmonica.table import outputs_before
from harmonica.values import LARGEST, of_type, require, seeded, whole

VALIDATION_SHARE = 6  # one noise of so many is not trained on
TURN_ROUNDS, TURN_NOISES = 8, 256  # of the search in a turn; half of the pool at most
LR = 0.01  # of Adam, falling to zero along a half cosine; 0.02 ends equally near


@torch.inference_mode(False)  # and gradients on, whatever the caller's are
def learn_weights(  # noqa: D417 (a denoiser is a denoiser)
    denoiser: Denoiser, schedule: Schedule, pool: Pool, *, history: int = 3, iterations: int = 144,
    batch_size: int = 32, generator: torch.Generator | None = None,
) -> Schedule:  # fmt: skip
    """Return the schedule with weights that bring its images near the pool's.

    Learning starts from the best of these: the schedule as given, reuse, and forecasts that fit
    into `history`. If no learned weights are better on the validation noises, that start is
    returned. An update costs about three walks of `batch_size` noises, four where memory is short.

    Args:
        schedule: whose table stays as it is.
        pool: noises and targets (`references`); one in VALIDATION_SHARE is for validation.
        history: m, past outputs that a gate may read; memory grows with it.
        iterations, batch_size: updates, and noises in each; small batches do more for their price.
        generator: shuffles the pool; one with a seed of its own if None.

    Raises ValueError if a number is out of range, the pool has fewer than two noises, or the
    schedule does not fit the denoiser; FloatingPointError if the error is not finite.
    """
    require_denoiser(denoiser)
    validation, training = held_back(pool)
    history, batch_size = whole("history", history, 1, 11), whole("batch_size", batch_size)
    iterations, generator = whole("iterations", iterations, 1, LARGEST), seeded(generator)
    check_fit(schedule, denoiser)
    best, errors = _best_start(denoiser, schedule, validation, history)
    limit, lowest = CAP * float(errors.median()), _finite(float(typical_error(errors)))
    batches = _batches(len(training), batch_size, iterations, generator)
    for weights in _learn(denoiser, best, training, history, batches, limit):
        learned = replace(schedule, weights=weights)
        error = float(typical_error(pool_errors(denoiser, validation, learned)))
        if error < lowest:
            best, lowest = learned, error
    facts = {**schedule.provenance, "weights_history": history, "weights_pool": len(pool)}
    facts |= {"weights_updates": iterations, "weights_batch_size": batch_size}
    return replace(best, provenance={**facts, "weights_validation_error": lowest})


def learn_in_turn(  # noqa: D417 (some arguments are described together)
    denoiser: Denoiser, schedule: Schedule, pool: Pool, target: Target, *, turns: int = 3,
    iterations: int = 288, batch_size: int = 16, generator: torch.Generator | None = None,
) -> Schedule:  # fmt: skip
    """Return a schedule on target whose table and weights were learned in turn, each for the other.

    In a turn `refine` searches for a better table, in which learned weights stay where a decision
    does not change. Then weights are learned for that table. The validation noises decide: a turn
    after which their error has not fallen is not kept, and is the last. One turn costs about
    TURN_ROUNDS rounds of the search on its noises, and the updates of `learn_weights`.

    Args:
        denoiser, pool, iterations, batch_size, generator: as in `learn_weights`.
        schedule: with or without weights, as fast as the target or faster.
        target: the speedup to keep.
        turns: at most so many times the table is searched and the weights learned again.

    Raises ValueError if a number is out of range, or the schedule is slower than the target.
    """
    require_target(target, denoiser)
    _, training = held_back(pool)
    judging = training[slice(min(max(len(pool) // 2, 1), TURN_NOISES))]
    few = few_of(len(judging))
    others = cycle([training[slice(i, i + few)] for i in range(0, len(training) - few + 1, few)])
    budget = TURN_ROUNDS * WALKS_PER_ROUND * denoiser.steps * len(judging)
    how: dict[str, Any] = {"iterations": iterations, "batch_size": batch_size}
    how["generator"] = seeded(generator)
    best = learn_weights(denoiser, schedule, pool, **how)
    for _ in range(whole("turns", turns, 0)):
        start = [best.compute]
        *_, end = refine(denoiser, start, judging, others, target, budget=budget, fill=best)
        after = learn_weights(denoiser, with_table(best, end.table), pool, **how)
        before, now = (float(each.provenance["weights_validation_error"]) for each in (best, after))
        if not now < before:
            break
        best = after
    return best


def held_back(pool: Pool) -> tuple[Pool, Pool]:
    """Return the noises for validation, one in VALIDATION_SHARE, and those that are trained on."""
    of_type("pool", pool, Pool, "references(denoiser) gives one")
    require(len(pool) >= 2, f"the pool has {len(pool)} noises; expected 2 or more")
    few = max(len(pool) // VALIDATION_SHARE, 1)
    return pool[slice(few)], pool[slice(few, None)]


def _batches(noises: int, size: int, count: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Return `count` batches of indices that go through all noises again and again, shuffled."""
    size = min(size, noises)
    rounds = range(-(-count * size // noises))
    order = [torch.randperm(noises, generator=generator, device=generator.device) for _ in rounds]
    return torch.split(torch.cat(order), size)[:count]


def _learn(
    denoiser: Denoiser, start: Schedule, pool: Pool, history: int, batches: Sequence[Tensor],
    limit: float,
) -> Iterator[Tensor]:  # fmt: skip
    """Yield the weights after each round and at the end; noises above `limit` count less."""
    weights, mask = _trainable(start, history, pool.x)
    optimizer, table = Adam([weights], betas=(0.9, 0.99)), start.compute.tolist()
    portion, run = room_for(denoiser, pool.x, pool.cond, len(batches[0]))

    def gradient(part: Pool) -> Tensor:  # of the sum of its errors
        image = weighted_walk(denoiser, table, weights, part.x, part.cond, run)
        away = image.detach() - part.images
        counts = outlier_weights(image_errors(image.detach(), part.images), limit)
        direction = 2 * counts.view(-1, *[1] * (away.dim() - 1)) * away / away[0].numel()
        # in half precision a small gradient would vanish on its way through the walk
        scale = direction.abs().max().clamp_min(1e-30)
        return torch.autograd.grad(image, weights, (direction / scale).to(image))[0] * scale

    a_round = len(pool) // len(batches[0])
    for update, batch in enumerate(batches, start=1):
        total = torch.stack(list(pool[batch].portions(gradient, portion))).sum(0)
        _finite(float(total.sum()))
        weights.grad = total / len(batch) * mask
        optimizer.param_groups[0]["lr"] = LR * (1 + math.cos(math.pi * update / len(batches))) / 2
        optimizer.step()
        if update % a_round == 0 or update == len(batches):
            yield weights.detach()


def _best_start(
    denoiser: Denoiser, schedule: Schedule, pool: Pool, history: int
) -> tuple[Schedule, Tensor]:
    """Return the best start of `history` past outputs at most, and its errors on the pool."""
    orders = [replace(schedule, order=order, weights=None) for order in range(history)]
    given = [] if schedule in orders else [schedule]
    starts = [(start, pool_errors(denoiser, pool, start)) for start in (*given, *orders)]
    return min(starts, key=lambda start: float(typical_error(start[1])))


def _trainable(start: Schedule, history: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the start's weights (T, N, 1 + m), and which of them may move, on the device of x."""
    given = start.gate_weights
    given = taylor_weights(start.compute, 0) if given is None else given
    weights = torch.zeros(*start.compute.shape, 1 + max(history, given.shape[2] - 1))
    weights[:, :, : given.shape[2]] = given
    mask = torch.arange(weights.shape[2]) <= outputs_before(start.compute)[:, :, None]
    mask[:, :, 0] = start.compute
    return weights.to(x.device).requires_grad_(), mask.to(x.device)


def weighted_walk(
    denoiser: Denoiser, table: list[list[bool]], weights: Tensor, x: Tensor, cond: Any,
    run: Run = run_again,
) -> Tensor:  # fmt: skip
    """Return the image (B, C, H, W) of noise x, differentiable in weights (T, N, 1 + m)."""

    def gate_of(k: int, w: Tensor, cache: Cache) -> Gate:
        return weighted(table[k], [row.unbind() for row in w.unbind()], cache)

    return differentiable_walk(denoiser, x, cond, weights.unbind(), gate_of, run)


def _finite(number: float) -> float:
    if math.isfinite(number):
        return number
    raise FloatingPointError(f"the error of the images is {number}; look for NaN in pool and model")
