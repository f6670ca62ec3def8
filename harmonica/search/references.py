"""References: the images that a sampler would make with many more steps, and pools of them.

A walk of T steps only approximates where the sampler goes: the solution of the probability-flow
ODE. A reference is the image that the same sampler makes from the same noise with factor·T steps,
close to that solution. A cached walk can be nearer to it than the uncached walk is.

    pool      noises x, conditions and the image that each noise should become
    factor    steps of the reference walk over T; 1 is the uncached walk itself
    error     mean squared difference of an image to its target, in squared units of the image

A pool is made once and shared by whatever is tuned towards it. A few noises may end at another
image altogether and say little about small changes. So what is fitted to errors, or judged by them,
counts such a noise less (`outlier_weights`, `typical_error`).
"""

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from harmonica.check import checksum, identity, require_denoiser
from harmonica.denoise import Denoiser, sample
from harmonica.inference.walk import Refinable, Walk
from harmonica.memory import in_portions
from harmonica.router import Schedule
from harmonica.storage.files import read_tensors, require_same, write_tensors
from harmonica.values import LARGEST, StrPath, check_rows, of_type, require, seeded, whole

R = TypeVar("R")
Toward = Literal["reference", "uncached"]
"""What images should be near: the reference of a finer walk, or the uncached walk's image."""
SEED = 30_000_001  # of the noises, if nobody brings a generator
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


def outlier_weights(errors: Tensor, limit: float | Tensor) -> Tensor:
    """Return how much each noise counts, (B,): 1, or limit/error where its error is above that."""
    return torch.where(errors > limit, limit / errors, 1.0)


def typical_error(errors: Tensor) -> Tensor:
    """Return the mean () of errors (B,), each counted up to CAP times their median, and infinity if
    one of them is not finite. One noise that ends at another image would outweigh a hundred others.

    >>> typical_error(torch.tensor([1.0, 1.0, 1.0, 64.0])).item()
    1.75
    """
    counted = errors * outlier_weights(errors, CAP * errors.median())  # infinity · 0 is NaN
    return counted.mean().nan_to_num(math.inf)


@dataclass(frozen=True)
class Pool:
    """Noises and the images that they should become."""

    x: Tensor  # (M, C, H, W) pure noise
    cond: Any  # conditions, a tensor with M rows or a tree of them
    images: Tensor  # (M, C, H, W), the target of each noise

    def __post_init__(self) -> None:
        for name, value in (("x", self.x), ("images", self.images)):
            real = of_type(name, value, Tensor, "torch.stack makes one").is_floating_point()
            require(real, f"{name} is {value.dtype}; expected floating-point numbers")
        kinds = [f"{tuple(each.shape)} on {each.device}" for each in (self.x, self.images)]
        fit = kinds[0] == kinds[1] and self.x.dim() > 1 and len(self.x) > 0
        rule = "a pool has one image for each noise, and at least one"
        require(fit, f"x is {kinds[0]} and images are {kinds[1]}; {rule}")
        check_rows("cond", self.cond, len(self.x))

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, which: slice | Tensor) -> "Pool":
        """Return the part of the pool at a slice or at indices."""
        rows = which.to(self.x.device) if isinstance(which, Tensor) else which
        cond = tree_map_only(Tensor, lambda leaf: leaf[rows], self.cond)
        return Pool(self.x[rows], cond, self.images[rows])

    def portions(self, run: Callable[["Pool"], R], size: int | None = None) -> Iterator[R]:
        """Yield run(part) for parts of `size` noises, or PORTION; fewer where memory runs out."""
        parts = lambda first, last: run(self[slice(first, last)])  # noqa: E731
        return in_portions(parts, len(self), PORTION if size is None else size)


def with_images(denoiser: Denoiser, x: Tensor, cond: Any) -> Pool:
    """Return a pool of the noises x (M, C, H, W) and the images that the denoiser makes of them."""
    images = Pool(x, cond, x).portions(lambda part: sample(denoiser, part.x, part.cond))
    return Pool(x, cond, torch.cat(list(images)))


def pool_errors(denoiser: Denoiser, pool: Pool, schedule: Schedule | None = None) -> Tensor:
    """Return how far the images under a schedule are from the pool's, (M,) float64."""
    walk = Walk(denoiser, schedule, exact=True)
    errors = lambda part: image_errors(walk(part.x, part.cond), part.images)  # noqa: E731
    return torch.cat(list(pool.portions(errors)))


def references(
    denoiser: Denoiser, *, noises: int = 384, factor: int = 10,
    generator: torch.Generator | None = None, path: StrPath | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Pool:  # fmt: skip
    """Return a pool: noises that the denoiser draws, and the image of factor·T steps for each.

    That costs noises·factor·T predictions; a factor of 1 gives the uncached walk's images, and so
    does a sampler that draws noise during the walk. The file at `path` keeps the images, and
    continues what an earlier call left there. `progress` is called as
    progress(images that are done, noises).

    Raises ValueError if a number is below 1, the denoiser has no finer walk, or the file at `path`
    is of another denoiser, or of other noises, conditions or steps.
    """
    require_denoiser(denoiser)
    finer = finer_walk(denoiser, whole("factor", factor))
    x, cond = denoiser.draw(whole("noises", noises, 1, LARGEST), seeded(generator, SEED))
    facts = {**identity(denoiser), "reference_steps": finer.steps, "noises": checksum([x])}
    facts["conditions"] = checksum(leaf for leaf in tree_leaves(cond) if isinstance(leaf, Tensor))
    parts = [] if path is None else _kept(path, x, facts)
    done = sum(map(len, parts))
    rest = Pool(x, cond, x)[slice(done, None)] if done < noises else None
    for images in rest.portions(lambda part: sample(finer, part.x, part.cond)) if rest else ():
        parts.append(images)
        if path is not None:
            write_tensors(path, {"images": torch.cat(parts)}, {"references": facts})
        if progress is not None:
            progress(sum(map(len, parts)), noises)
    return Pool(x, cond, torch.cat(parts))


def finer_walk(denoiser: Denoiser, factor: int = 10) -> Denoiser:
    """Return the denoiser with factor·T steps, itself for a factor of 1 or, with a warning, a
    sampler that draws noise. Raises ValueError if it cannot be had with that many steps.
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


def _kept(path: StrPath, x: Tensor, facts: dict[str, Any]) -> list[Tensor]:
    """Return the images that a file holds for the first noises, in a list of at most one."""
    if not Path(path).exists():
        return []
    tensors, held = read_tensors(path)
    then: Any = held.get("references")
    images = tensors.get("images", torch.zeros(()))
    require(isinstance(then, dict), f"{path} holds no references; name another file")
    require_same(f"{path} holds references of something else", then, facts, "name another")
    fit = images.shape[1:] == x.shape[1:] and 0 < images.shape[:1].numel() <= len(x)
    fit = fit and images.is_floating_point() and bool(images.isfinite().all())
    rule = f"expected finite ones for {len(x)} noises at most"
    require(fit, f"{path} holds images {tuple(images.shape)} {images.dtype}; {rule}")
    return [images.to(x)]
