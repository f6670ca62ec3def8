"""Metrics: distances between images, and between sets of images.

    image error        mean squared difference to the image made without a cache, pixel by pixel
    label agreement    share of images that a classifier of real images gives their own label
    Fréchet distance   between Gaussians fitted to two sets (FID, on pixels instead of Inception features)

This file does not know how the images were made.
"""

from __future__ import annotations

import torch
from torch import Tensor


def image_mse(images: Tensor, reference: Tensor) -> float:
    """Return the mean squared difference of two batches (B, C, H, W), in squared units of the images.

    >>> image_mse(torch.ones(2, 1, 2, 2), torch.zeros(2, 1, 2, 2))
    1.0
    """
    return float((images.double() - reference.double()).square().mean())


def label_agreement(images: Tensor, labels: Tensor, real: Tensor, real_labels: Tensor, *, neighbours: int = 3) -> float:
    """Return the share, 0 … 1, of images that a nearest-neighbour vote among real images gives their own label.

    Args:
        images: (B, C, H, W).
        labels: (B,) what each image was asked to show.
        real: (M, C, H, W) with labels `real_labels` (M,).
        real_labels: (M,).
        neighbours: voters.
    """
    from sklearn.neighbors import KNeighborsClassifier

    judge = KNeighborsClassifier(neighbours).fit(real.flatten(1).numpy(), real_labels.numpy())
    return float((judge.predict(images.flatten(1).cpu().numpy()) == labels.cpu().numpy()).mean())


def frechet_distance(images: Tensor, reference: Tensor) -> float:
    """Return ‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2(Σ₁Σ₂)^½) of two sets (B, …), each flattened to vectors (Heusel et al. 2017).

    The covariances need more images than dimensions; sets of different sizes are comparable only roughly.
    """
    a, b = images.flatten(1).double(), reference.flatten(1).double()  # (B, D), (M, D)
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)  # (D, D)
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T  # Σ₁^½
    # tr (Σ₁Σ₂)^½ = tr (Σ₁^½ Σ₂ Σ₁^½)^½, and this one is symmetric
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp_min(0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)
