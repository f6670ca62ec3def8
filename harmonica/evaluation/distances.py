"""Distances between images, and between sets of images.

    image error        mean squared difference to the image made without a cache, pixel by pixel
    PSNR               the same on a logarithmic scale, in decibels; more is better
    Fréchet distance   between Gaussians fitted to two sets (FID where the features are Inception's)
    precision          share of images that lie among the reference's; recall: share of the reference among the images

A set metric compares vectors: the pixels of an image, or what `features` makes of a batch, (B, C,
H, W) -> (B, …). This file does not know how the images were made.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from harmonica.search.errors import image_mse as image_mse

Features = Callable[[Tensor], Tensor]
"""A batch of images (B, C, H, W) -> one row for each (B, …), such as a classifier's last hidden
layer."""

ROWS = 512
"""Rows of a distance matrix that are in memory at once."""


def psnr(images: Tensor, reference: Tensor, *, span: float = 2.0) -> float:
    """Return 10·log₁₀(span² / image_mse) of two batches (B, C, H, W), in decibels; infinite where
    they are equal.

    It is taken of the mean error, not averaged over images: one image that the cache left alone
    would make the average infinite.

    Args:
        images: (B, C, H, W).
        reference: the same shape.
        span: white minus black, 2 for images in [−1, 1].

    Raises ValueError if the shapes differ or span is not positive.

    >>> round(psnr(torch.full((1, 1, 2, 2), 0.2), torch.zeros(1, 1, 2, 2)), 3)
    20.0
    """
    if images.shape != reference.shape:
        raise ValueError(
            f"images are {tuple(images.shape)} and reference {tuple(reference.shape)}; they pair up"
        )
    if not span > 0:
        raise ValueError(f"span is {span}; it is white minus black, 2 for images in [−1, 1]")
    error = image_mse(images, reference)
    return math.inf if error == 0 else 10 * math.log10(span**2 / error)


def frechet_distance(
    images: Tensor, reference: Tensor, *, features: Features | None = None
) -> float:
    """Return ‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2(Σ₁Σ₂)^½) of two sets, compared as vectors (Heusel et al.
    2017).

    The covariances need more images than dimensions. The distance falls as sets grow: compare sets
    of one size.

    Args:
        images: (B, …).
        reference: (M, …).
        features: what to compare instead of pixels.

    Raises ValueError if the vectors differ in length or a set has fewer than two.
    """
    a, b = _vectors(images, reference, features, at_least=2)  # (B, D), (M, D)
    return frechet_of_moments(moments(a), moments(b))


Moments = tuple[Tensor, Tensor]
"""Mean (D,) and covariance (D, D) of vectors, float64."""


def moments(vectors: Tensor) -> Moments:
    """Return the mean and the covariance of vectors (B, …), B at least 2.

    Raises ValueError if there are fewer.
    """
    if len(vectors) < 2:
        raise ValueError(f"there are {len(vectors)} vectors; a covariance takes at least 2")
    rows = vectors.detach().flatten(1).double()  # (B, D)
    return rows.mean(0), torch.cov(rows.T).view(rows.shape[1], -1)


def frechet_of_moments(first: Moments, second: Moments) -> float:
    """Return the Fréchet distance of two Gaussians, each given by its mean and covariance."""
    (mean, cov), (mean2, cov2) = first, second
    values, vectors = torch.linalg.eigh(cov)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T  # Σ₁^½
    # tr (Σ₁Σ₂)^½ = tr (Σ₁^½ Σ₂ Σ₁^½)^½, and this one is symmetric
    cross = torch.linalg.eigvalsh(root @ cov2 @ root).clamp_min(0).sqrt().sum()
    return float((mean - mean2).square().sum() + cov.trace() + cov2.trace() - 2 * cross)


def precision_recall(
    images: Tensor, reference: Tensor, neighbours: int = 3, *, features: Features | None = None
) -> tuple[float, float]:
    """Return precision and recall of a set against a reference, 0 … 1 each (Kynkäänniemi et al.
    2019, eq. 1 and 2).

    A set covers a ball around each of its vectors, out to the k-th nearest other vector of the set.
    Precision is the share of images that the reference covers, recall the share of the reference
    that the images cover.

    Costs B² + M² + 2·B·M distances of D numbers, taken as differences: exact, so a set covers
    itself, copies included.

    Args:
        images: (B, …).
        reference: (M, …).
        neighbours: k.
        features: what to compare instead of pixels.

    Raises ValueError if the vectors differ in length or a set has no k other vectors.

    >>> precision_recall(torch.tensor([[0.0], [1.0], [9.0]]), torch.tensor([[0.5], [1.5], [2.0]]),
    ...     neighbours=1)
    (0.6666666666666666, 1.0)
    """
    if neighbours < 1:
        raise ValueError(f"neighbours is {neighbours}; it must be 1 or more")
    a, b = _vectors(images, reference, features, at_least=neighbours + 1)  # (B, D), (M, D)
    return _covered(a, b, neighbours), _covered(b, a, neighbours)


def _covered(points: Tensor, centres: Tensor, neighbours: int) -> float:
    """Return the share of points (B, D) inside a ball of centres (M, D)."""
    # each centre is its own nearest neighbour, at distance 0
    radii = torch.cat(
        [d.kthvalue(neighbours + 1, dim=1).values for d in _distances(centres, centres)]
    )  # (M,)
    inside = torch.cat([(d <= radii).any(1) for d in _distances(points, centres)])  # (B,)
    return float(inside.double().mean())


def _distances(rows: Tensor, columns: Tensor) -> Iterator[Tensor]:
    """Yield distances of rows (B, D) to columns (M, D), a few rows at a time: (≤ ROWS, M) each."""
    exact = "donot_use_mm_for_euclid_dist"  # by products, a vector would be some 1e-8 away from its copy
    for some in torch.split(rows, ROWS):
        yield torch.cdist(some, columns, compute_mode=exact)


def _vectors(
    images: Tensor, reference: Tensor, features: Features | None, *, at_least: int
) -> tuple[Tensor, Tensor]:
    """Return both sets as vectors, (B, D) and (M, D) float64."""
    made = [images, reference] if features is None else [features(images), features(reference)]
    for name, given, rows in zip(("images", "reference"), (images, reference), made, strict=True):
        if len(rows) != len(given):
            raise ValueError(
                f"features made {len(rows)} rows of {len(given)} {name}; it must make one for each"
            )
        if len(rows) < at_least:
            raise ValueError(
                f"{name} has {len(rows)} images; this metric takes at least {at_least}"
            )
    a, b = (rows.detach().flatten(1).double() for rows in made)
    if a.shape[1] != b.shape[1]:
        found = f"{tuple(images.shape)} against {tuple(reference.shape)}"
        raise ValueError(
            f"found {found}, vectors of {a.shape[1]} and {b.shape[1]}; sets of one kind are compared"
        )
    return a, b
