"""bootstrap: where a metric would lie on other images of the same making."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Interval(NamedTuple):
    """A metric of a set, and where it would lie on other sets of the same size and making."""

    value: float
    low: float
    high: float


def bootstrap(
    metric: Callable[..., float],
    images: Tensor,
    *paired: Tensor,
    resamples: int = 200,
    level: float = 0.95,
    generator: torch.Generator,
) -> Interval:
    """Return a metric with its bootstrap interval: what it becomes on images drawn again from
    these, with replacement.

        bootstrap(judge.frechet, images, generator=g)
        bootstrap(image_mse, cached, plain, generator=g)

    The quantiles of the resamples' metrics are moved so that their median stands on the value. A
    mean is not biased, so nothing moves. A Fréchet distance is: a resample repeats images, its
    covariance is narrower, and every resample is farther from the reference than the set is. The
    shift takes that out; a low end below 0 means "as near as none".

    Args:
        metric: called as metric(images, *paired) on the set and then on each resample.
        images: (B, …). An expensive feature extractor is best applied before, once.
        paired: more tensors with B rows, resampled together with the images: references, labels.
        resamples: how many.
        level: share of resamples inside, 0 < level < 1.
        generator: draws the resamples.

    Returns:
        (value, low, high), low ≤ value ≤ high.

    Raises ValueError if resamples or level is out of range, the rows do not pair up, or the metric
    is not finite.

    >>> bootstrap(lambda x: float(x.mean()), torch.ones(5), generator=torch.Generator())
    Interval(value=1.0, low=1.0, high=1.0)
    """
    sets = (images, *paired)
    if resamples < 1 or not 0.0 < level < 1.0:
        raise ValueError(
            f"found resamples {resamples}, level {level}; expected resamples ≥ 1 and 0 < level < 1"
        )
    if len({len(rows) for rows in sets}) > 1 or len(images) == 0:
        counts = ", ".join(str(len(rows)) for rows in sets)
        raise ValueError(
            f"the tensors have {counts} rows; they are resampled together and need the same number, not 0"
        )
    value = metric(*sets)
    again: list[float] = []
    for _ in range(resamples):
        drawn = torch.randint(
            len(images), (len(images),), generator=generator, device=generator.device
        )
        again.append(metric(*(rows[drawn.to(rows.device)] for rows in sets)))
    spread = torch.tensor(again, dtype=torch.float64)
    if not math.isfinite(value) or not bool(spread.isfinite().all()):
        raise ValueError(
            f"the metric is {value}, and not finite on all resamples; an interval needs finite numbers"
        )
    ends = torch.tensor([(1 - level) / 2, 0.5, (1 + level) / 2], dtype=torch.float64)
    low, median, high = spread.quantile(ends).tolist()
    return Interval(value, value - (median - low), value + (high - median))
