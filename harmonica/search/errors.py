"""Errors: how far images are from what they should be, and in which portions walks are run.

    error      mean squared difference of an image to its target, in squared units of the image
    portion    so many noises at a time as the device has room for

A few noises may end at another image altogether. They say little about small changes, so whatever
is fitted to errors counts such a noise less (`outlier_weights`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from harmonica.memory import is_out_of_memory

CAP = 4.0
"""A noise whose error is more than so many times the median counts in proportion less."""

R = TypeVar("R")


def image_errors(images: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared difference of each image to its target, (B,) float64.

    >>> image_errors(torch.ones(2, 1, 2, 2), torch.zeros(2, 1, 2, 2)).tolist()
    [1.0, 1.0]
    """
    return (images.double() - target.double()).square().flatten(1).mean(1)


def image_mse(images: Tensor, target: Tensor) -> float:
    """Return the mean squared difference of two batches (B, C, H, W).

    >>> image_mse(torch.ones(2, 1, 2, 2), torch.zeros(2, 1, 2, 2))
    1.0
    """
    return float(image_errors(images, target).mean())


def outlier_weights(errors: Tensor, most: float) -> Tensor:
    """Return how much each noise counts, (B,): 1, or most/error where its error is above `most`."""
    return torch.where(errors > most, most / errors, 1.0)


def in_portions(run: Callable[[int, int], R], total: int, size: int) -> Iterator[R]:
    """Yield run(first, last) for portions of `total` noises, halving `size` where memory runs out.

    Raises the device's own error where a single noise does not fit.

    >>> list(in_portions(lambda first, last: last - first, 5, 2))
    [2, 2, 1]
    """
    first = 0
    while first < total:
        try:
            result = run(first, min(first + size, total))
        except (RuntimeError, MemoryError) as error:
            if size == 1 or not is_out_of_memory(error):
                raise
            size = max(size // 2, 1)
            continue
        yield result
        first += size
