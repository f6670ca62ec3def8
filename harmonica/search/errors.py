"""Errors: how far images are from what they should be, and in which portions walks are run.

    error      mean squared difference of an image to its target, in squared units of the image
    portion    so many noises at a time as the device has room for

A few noises may end at another image altogether. They say little about small changes, so whatever
is fitted to errors counts such a noise less (`outlier_weights`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from harmonica.cache import Compute, Feature, gated
from harmonica.denoise import Denoiser
from harmonica.memory import is_out_of_memory

CAP = 4.0
"""A noise whose error is more than so many times the median counts in proportion less."""

PORTION = 64
"""Noises walked at a time, where there is room."""

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


def noises_that_fit(denoiser: Denoiser, x: Tensor, cond: Any) -> int:
    """Return how many noises, PORTION at most, leave half of the free memory when the features of
    all T steps are alive, as they are while a walk is differentiated. Costs a prediction of x.
    """
    features: list[int] = []

    def gate(site: int, compute: Compute) -> Feature:
        feature = compute()
        leaves = [leaf for leaf in tree_leaves(feature) if isinstance(leaf, Tensor)]
        features.append(sum(leaf.numel() * leaf.element_size() for leaf in leaves))
        return feature

    with torch.no_grad(), gated(denoiser.sites, gate):
        denoiser.predict(x, 0, cond)
    each = denoiser.steps * sum(features) // len(x)
    return max(1, min(PORTION, free_bytes(x.device) // 2 // max(each, 1)))


def free_bytes(device: torch.device) -> int:
    """Return how much of a device's memory is free."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
