"""References: the images that a sampler would make with many more steps, and pools of them.

A walk of T steps only approximates where the sampler goes: the solution of the probability-flow
ODE. A reference is the image that the same sampler makes from the same noise with factor·T steps,
close to that solution. A cached walk can be nearer to it than the uncached walk is.

    pool      noises x, conditions and the image that each noise should become
    factor    steps of the reference walk over T; 1 is the uncached walk itself

A pool is made once and shared by whatever is tuned towards it. This file does not know tables.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from harmonica.denoise import Denoiser, sample
from harmonica.inference.walk import Refinable
from harmonica.memory import in_portions
from harmonica.router import Schedule
from harmonica.search.errors import PORTION, image_errors
from harmonica.storage.files import StrPath, read_tensors, write_tensors

Toward = Literal["reference", "uncached"]
"""What images should be near: the reference of a finer walk, or the uncached walk's image."""

SEED = 30_000_001
"""Seed of the noises, if nobody brings a generator."""


@dataclass(frozen=True)
class Pool:
    """Noises and the images that they should become.

    Attributes:
        x: (M, C, H, W) pure noise.
        cond: conditions, a tensor with M rows or a tree of them.
        images: (M, C, H, W), the target of each noise.
    """

    x: Tensor
    cond: Any
    images: Tensor

    def __post_init__(self) -> None:
        if self.x.shape != self.images.shape or len(self.x) == 0:
            shapes = f"x is {tuple(self.x.shape)} and images are {tuple(self.images.shape)}"
            raise ValueError(f"{shapes}; a pool has one image for each noise, and at least one")

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, which: slice | Tensor) -> Pool:
        """Return the part of the pool at a slice or at indices."""
        rows = which.to(self.x.device) if isinstance(which, Tensor) else which
        cond = tree_map_only(Tensor, lambda leaf: leaf[rows], self.cond)
        return Pool(self.x[rows], cond, self.images[rows])


def with_images(denoiser: Denoiser, x: Tensor, cond: Any) -> Pool:
    """Return a pool of the noises x (M, C, H, W) and the images that the denoiser makes of them."""
    noises = Pool(x, cond, x)

    def run(first: int, last: int) -> Tensor:
        part = noises[slice(first, last)]
        return sample(denoiser, part.x, part.cond)

    return Pool(x, cond, torch.cat(list(in_portions(run, len(x), PORTION))))


def pool_errors(denoiser: Denoiser, pool: Pool, schedule: Schedule | None = None) -> Tensor:
    """Return how far the images under a schedule are from the pool's, (M,) float64."""

    def run(first: int, last: int) -> Tensor:
        part = pool[slice(first, last)]
        return image_errors(sample(denoiser, part.x, part.cond, schedule), part.images)

    return torch.cat(list(in_portions(run, len(pool), PORTION)))


def references(
    denoiser: Denoiser,
    *,
    noises: int = 384,
    factor: int = 10,
    generator: torch.Generator | None = None,
    path: StrPath | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Pool:
    """Return a pool: noises that the denoiser draws, and the image of factor·T steps for each.

    That costs noises·factor·T predictions. Where the sampler draws noise during the walk, a finer
    walk ends at another image, so there the target is the uncached walk's image; a warning says so.

    Args:
        denoiser: model, sampler, guidance.
        noises: M.
        factor: steps of the reference walk over T; 1 is the uncached walk.
        generator: draws the noises; one with a seed of its own if None.
        path: keeps the images in this file, and continues what an earlier call left there.
        progress: called as progress(images that are done, noises).

    Raises ValueError if a number is below 1, the denoiser has no finer walk, or the file at `path`
    is of other noises or steps.
    """
    if noises < 1 or factor < 1:
        raise ValueError(f"noises is {noises} and factor {factor}; both must be 1 or more")
    finer = finer_walk(denoiser, factor)
    generator = torch.Generator().manual_seed(SEED) if generator is None else generator
    x, cond = denoiser.draw(noises, generator)
    drawn = Pool(x, cond, x)
    parts = [] if path is None else _kept(path, x, finer.steps)
    done = sum(map(len, parts))
    rest = drawn[slice(done, None)] if done < noises else None

    def run(first: int, last: int) -> Tensor:
        portion = drawn[slice(done + first, done + last)]
        return sample(finer, portion.x, portion.cond)

    for images in in_portions(run, 0 if rest is None else len(rest), PORTION):
        parts.append(images)
        if path is not None:
            tensors = {"x": x.cpu(), "images": torch.cat(parts).cpu()}
            write_tensors(path, tensors, {"steps": finer.steps})
        if progress is not None:
            progress(sum(map(len, parts)), noises)
    return Pool(x, cond, torch.cat(parts))


def finer_walk(denoiser: Denoiser, factor: int = 10) -> Denoiser:
    """Return the denoiser with factor·T steps, itself for a factor of 1 or a sampler that draws
    noise.

    Raises ValueError if the denoiser cannot be had with that many steps.
    """
    if factor == 1:
        return denoiser
    todo = 'use toward="uncached" (factor=1), the uncached walk'
    if not isinstance(denoiser, Refinable):
        name = type(denoiser).__name__
        raise ValueError(f"{name} has no with_steps, so it has no finer walk; {todo}")
    if denoiser.draws_noise:
        what = "the sampler draws noise during the walk, so a noise has no reference"
        warnings.warn(f"{what}; the uncached walk's image is the target", stacklevel=3)
        return denoiser
    try:
        return denoiser.with_steps(factor * denoiser.steps)
    except ValueError as error:
        raise ValueError(f"no walk of {factor} × {denoiser.steps} steps: {error}; {todo}") from None


def factor_of(toward: Toward, factor: int = 10) -> int:
    """Return the factor of a target: `factor`, or 1 for the uncached walk.

    Raises ValueError for another word.
    """
    if toward not in ("reference", "uncached"):
        raise ValueError(f"toward is {toward!r}; it must be 'reference' or 'uncached'")
    return factor if toward == "reference" else 1


def _kept(path: StrPath, x: Tensor, steps: int) -> list[Tensor]:
    """Return the images that a file holds for the first noises, in a list of at most one."""
    if not Path(path).exists():
        return []
    tensors, facts = read_tensors(path)
    images, before = tensors.get("images"), tensors.get("x")
    if images is None or before is None or facts.get("steps") != steps:
        held = f"{facts.get('steps', 'unknown')} steps"
        raise ValueError(
            f"{path} holds no references of {steps} steps (found {held}); name another file"
        )
    same = before.shape == x.shape and torch.equal(before, x.cpu())
    if not same or images.shape[1:] != x.shape[1:] or len(images) > len(x):
        raise ValueError(f"{path} holds references of other noises; name another file")
    return [images.to(x)]
