"""Distances: how far images are from others of the same noises, and a set of images from another.

    image error        mean squared difference to the image made without a cache, pixel by pixel
    Fréchet distance   between Gaussians fitted to two sets (FID where the features are Inception's)

A Gaussian is fitted to vectors: the pixels of an image, or the features that a network makes of it.
This file does not know how the images were made. More distances are in benchmarks/scores.py.
"""

import torch
from torch import Tensor

from harmonica.search.references import image_mse as image_mse
from harmonica.table import require

Moments = tuple[Tensor, Tensor]  # mean (D,) and covariance (D, D) of vectors, float64


def moments(vectors: Tensor) -> Moments:
    """Return the mean and the covariance of vectors (B, …); raise ValueError if B is below 2.

    The covariance needs more vectors than they have dimensions.
    """
    count = len(vectors)
    require(count >= 2, f"there are {count} vectors; a covariance takes at least 2")
    rows = vectors.detach().flatten(1).double()  # (B, D)
    return rows.mean(0), torch.cov(rows.T).view(rows.shape[1], -1)


def frechet_distance(first: Moments, second: Moments) -> float:
    """Return ‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2(Σ₁Σ₂)^½) of two Gaussians (Heusel et al. 2017).

    It falls as the sets grow that the Gaussians were fitted to: compare sets of one size.
    """
    (mean, cov), (mean2, cov2) = first, second
    values, vectors = torch.linalg.eigh(cov)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T  # Σ₁^½
    # tr (Σ₁Σ₂)^½ = tr (Σ₁^½ Σ₂ Σ₁^½)^½, and this one is symmetric
    cross = torch.linalg.eigvalsh(root @ cov2 @ root).clamp_min(0).sqrt().sum()
    return float((mean - mean2).square().sum() + cov.trace() + cov2.trace() - 2 * cross)
