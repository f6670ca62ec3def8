"""Errors: how far images are from what they should be, and how many noises are walked at a time.

    error      mean squared difference of an image to its target, in squared units of the image

A few noises may end at another image altogether. They say little about small changes, so whatever
is fitted to errors counts such a noise less (`outlier_weights`).
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from harmonica.cache import Compute, Feature, gated
from harmonica.denoise import Denoiser
from harmonica.memory import free_bytes

CAP = 4.0  # a noise whose error is more than so many times the median counts less
PORTION = 64  # noises walked at a time, where there is room


def image_errors(images: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared difference of each image to its target, (B,) float64."""
    return (images.double() - target.double()).square().flatten(1).mean(1)


def image_mse(images: Tensor, target: Tensor) -> float:
    """Return the mean squared difference of two batches (B, C, H, W).

    >>> image_mse(torch.ones(2, 1, 2, 2), torch.zeros(2, 1, 2, 2))
    1.0
    """
    return float(image_errors(images, target).mean())


def outlier_weights(errors: Tensor, limit: float) -> Tensor:
    """Return how much each noise counts, (B,): 1, or limit/error where its error is above that."""
    return torch.where(errors > limit, limit / errors, 1.0)


def noises_that_fit(denoiser: Denoiser, x: Tensor, cond: Any) -> int:
    """Return how many noises, PORTION at most, leave half of the free memory when the features of
    all T steps are alive, as they are while a walk is differentiated. Costs a prediction of x.
    """
    features: list[int] = []

    def gate(site: int, compute: Compute) -> Feature:
        feature = compute()
        features.extend(leaf.nbytes for leaf in tree_leaves(feature) if isinstance(leaf, Tensor))
        return feature

    with torch.no_grad(), gated(denoiser.sites, gate):
        denoiser.predict(x, 0, cond)
    each = denoiser.steps * sum(features) // len(x)
    return max(1, min(PORTION, free_bytes(x.device) // 2 // max(each, 1)))
