"""Image files: a set of images on disk, and the finished batches that it is put together from.

    X.npz      arr_0 images (N, H, W, 3) uint8, arr_1 conditions (N,) int64: what the ADM evaluator
               reads
    X/         000000.png, 000001.png, …; conditions one to a line in X.labels.txt beside it
    X.parts/   A-B.safetensors holds images A … B − 1 and their conditions, until all are there

No image is in two files of finished batches. This file does not know models, schedules or
processes.
"""

import re
import zipfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from numpy.lib import format as npy
from torch import Tensor

from harmonica.storage.files import read_tensors, write_tensors, write_text, write_whole
from harmonica.table import require


class Piece(NamedTuple):
    """What one file of finished images gives to the set: its first images."""

    path: Path
    numbers: range  # of those images


def parts_of(out: Path) -> Path:
    """Return the folder of finished batches."""
    return out.with_name(f"{out.name}.parts")


def labels_of(out: Path) -> Path:
    """Return the file of conditions beside a folder of images, where no tool takes it for one."""
    return out.with_name(f"{out.name}.labels.txt")


def check_out(out: Path) -> None:
    """Raise ValueError if `out` has no name, FileExistsError if it is there and not half done."""
    require(bool(out.name), f"out is {str(out)!r}; expected NAME.npz, or a folder to be made")
    taken = out.is_file() or (out.is_dir() and any(out.iterdir())) or labels_of(out).exists()
    if taken and not parts_of(out).is_dir():
        raise FileExistsError(f"{out} exists; choose another name, or remove it")


def to_uint8(images: Tensor) -> Tensor:
    """Return images (B, 1 or 3, H, W) in [−1, 1] as (B, H, W, 3) uint8: to the nearest level, grey
    as three equal channels. Raises ValueError for other channels, or a value that is not finite.

    >>> to_uint8(torch.tensor([-1.0, 0.0, 1.0, 7.0]).view(1, 1, 1, 4))[0, 0, :, 0].tolist()
    [0, 128, 255, 255]
    """
    shape = tuple(images.shape)
    fit = len(shape) == 4 and shape[1] in (1, 3)
    require(fit, f"decode made {shape}; expected (B, 1 or 3, H, W), grey or RGB")
    todo = "look for NaN in the weights, or widen the dtype"
    require(bool(images.isfinite().all()), f"decode made values that are not finite; {todo}")
    levels = (images.float() * 127.5 + 128.0).floor().clamp(0, 255)  # half up, as DiT's own script
    return levels.to(torch.uint8).expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous()


def write_part(parts: Path, numbers: range, images: Tensor, labels: Tensor) -> None:
    """Write a finished batch: images (B, H, W, 3) uint8 of these numbers, conditions (B,)."""
    name = f"{numbers.start:08}-{numbers.stop:08}.safetensors"
    write_tensors(parts / name, {"images": images, "labels": labels.long()}, {})


def finished(parts: Path) -> list[tuple[range, Path]]:
    """Return the numbers of the images in each file of a finished batch, in order."""
    name = re.compile(r"([0-9]{1,18})-([0-9]{1,18})\.safetensors")
    matches = [(name.fullmatch(path.name), path) for path in parts.glob("*.safetensors")]
    batches = [(range(int(m[1]), int(m[2])), path) for m, path in matches if m]
    return sorted(batches, key=lambda batch: (batch[0].start, batch[0].stop))


def unfinished(parts: Path, count: int, batch_size: int) -> list[range]:
    """Return batches of the images 0 … count − 1 that are in no file, of batch_size at most."""
    batches, position = [], 0
    for numbers in (*(numbers for numbers, _ in finished(parts)), range(count, count)):
        stop = min(numbers.start, count)
        starts = range(position, stop, batch_size)
        batches += [range(i, min(i + batch_size, stop)) for i in starts]
        position = max(position, numbers.stop)
    return batches


def pieces_of(parts: Path, count: int) -> list[Piece]:
    """Return which images to take from which file, each of 0 … count − 1 once and in order.

    Raises FileNotFoundError if an image is in none.
    """
    pieces, position = [], 0
    for numbers, path in finished(parts):
        if numbers.start == position < count:
            position = min(numbers.stop, count)
            pieces.append(Piece(path, range(numbers.start, position)))
    if position < count:
        todo = "all processes must see one folder; run it again"
        raise FileNotFoundError(f"{parts} lacks image {position}; {todo}")
    return pieces


def read_piece(piece: Piece) -> tuple[Tensor, Tensor]:
    """Return images (B, H, W, 3) uint8 and labels (B,) int64 of a piece; raise ValueError if its
    file has others.
    """
    tensors, _ = read_tensors(piece.path)
    start, stop = map(int, piece.path.stem.split("-"))
    count, kinds = stop - start, {name: (t.dtype, *t.shape) for name, t in tensors.items()}
    size, wanted = kinds.get("images", ())[2:4], len(piece.numbers)
    fit = {"images": (torch.uint8, count, *size, 3), "labels": (torch.int64, count)} == kinds
    what = f"{piece.path} has {kinds or 'nothing'!s:.200}; {count} images and their labels"
    require(fit and len(size) == 2, f"{what} were expected; remove the file and run it again")
    return tensors["images"][:wanted], tensors["labels"][:wanted]


def write_npz(path: Path, pieces: Sequence[Piece]) -> None:
    """Write arr_0 and arr_1 as numpy.savez does, but piece by piece: 50 000 images of 256 pixels
    are 10 GB, which need not be in memory.
    """
    count = pieces[-1].numbers.stop
    size = read_piece(pieces[0])[0].shape[1:]  # (H, W, 3)

    def write(beside: Path) -> None:
        labels = []
        with zipfile.ZipFile(beside, "w") as archive:  # stored, not packed
            with archive.open("arr_0.npy", "w", force_zip64=True) as file:
                header = {"descr": "|u1", "fortran_order": False, "shape": (count, *size)}
                npy.write_array_header_1_0(file, header)
                for piece in pieces:
                    images, some = read_piece(piece)
                    here, there = f"{tuple(images.shape[1:])} in {piece.path}", pieces[0].path
                    other = f"images differ in size: {here}, {tuple(size)} in {there}"
                    require(images.shape[1:] == size, f"{other}; remove the folder, run it again")
                    file.write(images.numpy().tobytes())
                    labels.append(some)
            with archive.open("arr_1.npy", "w") as file:
                npy.write_array(file, torch.cat(labels).numpy(), allow_pickle=False)

    write_whole(path, write)


def write_pngs(folder: Path, pieces: Sequence[Piece]) -> None:
    """Write each image as a PNG file named by its number."""
    from PIL import Image  # matplotlib brings Pillow along

    for piece in pieces:
        for i, image in zip(piece.numbers, read_piece(piece)[0], strict=True):
            save = partial(Image.fromarray(image.numpy()).save, format="PNG")
            write_whole(folder / f"{i:06}.png", save)


def write_labels(path: Path, pieces: Sequence[Piece]) -> None:
    """Write the conditions of all images, one to a line."""
    labels = torch.cat([read_piece(piece)[1] for piece in pieces]).tolist()
    write_text(path, "".join(f"{label}\n" for label in labels))
