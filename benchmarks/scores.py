"""Scores that the field publishes of images, and nothing in the library needs.

    psnr               against the uncached images, in decibels; higher is better
    precision_recall   of vectors against a reference set; higher is better     Kynkäänniemi et al. 2019
    fid_inception      against a reference set; lower is better                 Heusel et al. 2017
    inception_score    of a set alone; higher is better                         Salimans et al. 2016
    clip_score         of images beside the prompts they were made for; higher  Hessel et al. 2021

The last three read what `harmonica.image_sets` wrote and take the extra `fid`, with networks that
torchmetrics fetches once. Scores of one protocol (number of images, reference, resizing) cannot be
set beside those of another.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harmonica.search.references import image_mse
from harmonica.storage.files import decoding, existing, is_archive
from harmonica.values import StrPath

PICTURES = (".png", ".jpg", ".jpeg")
ROWS = 512
"""Rows of a distance matrix that are in memory at once."""


def psnr(images: Tensor, reference: Tensor, *, span: float = 2.0) -> float:
    """Return 10·log₁₀(span² / image_mse) of two batches (B, C, H, W), in decibels; infinite where
    they are equal. `span` is white minus black, 2 for images in [−1, 1].

    It is taken of the mean error, not averaged over images: one image that the cache left alone
    would make the average infinite.

    >>> round(psnr(torch.full((1, 1, 2, 2), 0.2), torch.zeros(1, 1, 2, 2)), 3)
    20.0
    """
    error = image_mse(images, reference)
    return math.inf if error == 0 else 10 * math.log10(span**2 / error)


def precision_recall(images: Tensor, reference: Tensor, neighbours: int = 3) -> tuple[float, float]:
    """Return precision and recall of vectors (B, D) against a reference (M, D), 0 … 1 each (eq. 1
    and 2).

    A set covers a ball around each of its vectors, out to the k-th nearest other vector of the set,
    k = `neighbours`. Precision is the share of images that the reference covers, recall the share
    of the reference that the images cover.

    >>> precision_recall(torch.tensor([[0.0], [1.0], [9.0]]), torch.tensor([[0.5], [1.5], [2.0]]), 1)
    (0.6666666666666666, 1.0)
    """
    return _covered(images, reference, neighbours), _covered(reference, images, neighbours)


def _covered(points: Tensor, centres: Tensor, neighbours: int) -> float:
    """Return the share of points (B, D) inside a ball of centres (M, D)."""
    # each centre is its own nearest neighbour, at distance 0
    rank = neighbours + 1
    radii = [d.kthvalue(rank, dim=1).values for d in _distances(centres, centres)]
    inside = [(d <= torch.cat(radii)).any(1) for d in _distances(points, centres)]
    return float(torch.cat(inside).double().mean())


def _distances(rows: Tensor, columns: Tensor) -> Iterator[Tensor]:
    """Yield distances of rows (B, D) to columns (M, D), a few rows at a time: (≤ ROWS, M) each."""
    exact = "donot_use_mm_for_euclid_dist"  # products would put a vector 1e-8 away from its copy
    for some in torch.split(rows.double(), ROWS):
        yield torch.cdist(some, columns.double(), compute_mode=exact)


def read_images(path: StrPath, batch_size: int = 64) -> Iterator[Tensor]:
    """Yield (B, H, W, 3) uint8 of an .npz (its arr_0) or of a folder's PNG and JPEG files in the
    order of their names.

    Raises FileNotFoundError if there is none, ValueError if they are no images or differ in size.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in PICTURES)
        if not files:
            raise FileNotFoundError(f"{path} has no image; expected files in {', '.join(PICTURES)}")
        yield from (_stacked(files[i : i + batch_size]) for i in range(0, len(files), batch_size))
        return
    import numpy as np

    if not is_archive(existing(path)):
        raise ValueError(f"{path} is neither an .npz nor a folder of images")
    with decoding(path, "is a damaged .npz"), np.load(path, allow_pickle=False) as arrays:
        images = np.asarray(
            arrays["arr_0"] if "arr_0" in arrays else np.empty(0)
        )  # what is no .npy comes as bytes
        names = ", ".join(arrays)
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
        found = f"arr_0 {images.dtype} {images.shape}" if images.size else f"arrays {names:.200}"
        raise ValueError(f"{path} has {found}; expected arr_0 of uint8 (N, H, W, 3)")
    yield from torch.split(torch.from_numpy(images), batch_size)


def _stacked(files: Sequence[Path]) -> Tensor:
    import numpy as np
    from PIL import Image

    images = []
    for file in files:
        with decoding(file, "is no image that can be read"), Image.open(file) as picture:
            images.append(torch.from_numpy(np.array(picture.convert("RGB"))))
        if images[-1].shape != images[0].shape:
            found = (
                f"{file} is {tuple(images[-1].shape[:2])}, {files[0]} {tuple(images[0].shape[:2])}"
            )
            raise ValueError(f"{found} (rows, columns); bring them to one size first")
    return torch.stack(images)


def fid_inception(
    images: StrPath, reference: StrPath, *, batch_size: int = 64, device: str | torch.device = "cpu"
) -> float:
    """Return FID of two sets on disk (.npz or folder), on the 2048 features of Inception.

    Raises ValueError if the extra `fid` is not installed, and what `read_images` raises.
    """
    fid = _metric("image.fid", "FrechetInceptionDistance", feature=2048).to(device)
    for path, real in ((images, False), (reference, True)):
        for batch in _channels_first(path, batch_size):
            fid.update(batch.to(device), real=real)
    return float(fid.compute())


def inception_score(
    images: StrPath, *, splits: int = 10, batch_size: int = 64, device: str | torch.device = "cpu"
) -> tuple[float, float]:
    """Return the Inception score of a set on disk, mean and standard deviation over its splits.

    Raises ValueError if the extra `fid` is not installed or there are fewer images than splits, and
    what `read_images` raises.
    """
    score, count = _metric("image.inception", "InceptionScore", splits=splits).to(device), 0
    for batch in _channels_first(images, batch_size):
        score.update(batch.to(device))
        count += len(batch)
    if not 1 <= splits <= count:
        raise ValueError(
            f"splits is {splits}; {images} has {count} images, and each split needs one"
        )
    mean, deviation = score.compute()
    return float(mean), float(deviation)


def clip_score(
    images: StrPath,
    prompts: Sequence[str],
    *,
    model: str = "openai/clip-vit-base-patch16",
    batch_size: int = 64,
    device: str | torch.device = "cpu",
) -> float:
    """Return how well images on disk fit their prompts: 100·max(cos, 0) of CLIP's embeddings, mean
    over images.

    Args:
        images: .npz or folder, N images.
        prompts: N, in the order of the images; `samples` writes their numbers, arr_1 or
            X.labels.txt.
        model: a CLIP of the hub.
        batch_size: images in a step.
        device: where CLIP runs.

    Raises ValueError if the extra `fid` is not installed or images and prompts do not pair up, and
    what `read_images` raises.
    """
    score, count = (
        _metric("multimodal.clip_score", "CLIPScore", model_name_or_path=model).to(device),
        0,
    )
    for batch in _channels_first(images, batch_size):
        texts = list(prompts[count : count + len(batch)])
        count += len(batch)
        if len(texts) == len(batch):
            score.update(batch.to(device), texts)
    if count != len(prompts):
        raise ValueError(
            f"{images} has {count} images, there are {len(prompts)} prompts; expected one for each"
        )
    return float(score.compute())


def _channels_first(path: StrPath, batch_size: int) -> Iterator[Tensor]:
    """Yield (B, 3, H, W) uint8."""
    return (batch.permute(0, 3, 1, 2) for batch in read_images(path, batch_size))


def _metric(place: str, name: str, **settings: Any) -> Any:
    try:
        return getattr(import_module(f"torchmetrics.{place}"), name)(**settings)
    except (
        ModuleNotFoundError
    ) as error:  # torchmetrics looks for what it needs itself only when it is made
        missing = error.name or "torchmetrics"
        raise ValueError(
            f"{name} takes {missing}; pip install 'harmonica-dit[fid]' brings it"
        ) from None
