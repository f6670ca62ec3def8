"""Samples: many images on disk, for the tools that the field measures with.

    python -m harmonica.image_sets --model tiny --schedule out/demo/schedule.json --count 1000 \
        --out out/samples.npz
    torchrun --nproc-per-node 4 -m harmonica.image_sets --model dit-xl --device cuda \
        --count 50000 --out out/dit-xl.npz

    --out X.npz    what the ADM evaluator reads: arr_0 images (N, H, W, 3) uint8, arr_1 conditions (N,) int64
    --out X        a folder of 000000.png, 000001.png, …, conditions one to a line in X.labels.txt beside it

Image i starts from noise and a condition drawn from (seed, i) alone, so it does not depend on how
many there are, nor on batches and processes (but for rounding in the model). Finished batches are
kept in OUT.parts until all are there: what was interrupted is continued by running the same again.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import shutil
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from harmonica.command_line import (
    Parser,
    add_model_options,
    check_device,
    command,
    load_model,
    whole,
)
from harmonica.denoise import Denoiser
from harmonica.inference.walk import Walk
from harmonica.processes import from_rank_0, mean_over_ranks, processes, rank, started_as, world
from harmonica.router import Schedule
from harmonica.storage.files import (
    StrPath,
    exclusive_lock,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
    write_whole,
)

PROG = "python -m harmonica.image_sets"


class Piece(NamedTuple):
    """What one file of finished images gives to the whole."""

    path: Path
    first: int  # number of its first image that is wanted
    skip: int  # images of the file before that one
    images: int  # wanted from there on


def write_samples(
    denoiser: Denoiser,
    schedule: Schedule | None,
    decode: Callable[[Tensor], Tensor],
    *,
    count: int,
    batch_size: int = 32,
    seed: int = 0,
    out: StrPath,
    progress: bool = True,
) -> Path:
    """Make images 0 … count − 1 of a seed and write them whole; return where they are.

    Under torchrun batch j is made by process j mod world, and all of them must see the folder of
    `out`.

    Args:
        denoiser: model, sampler, guidance; its conditions must be whole numbers (B,): classes, or
            numbers of prompts.
        schedule: what the cache follows; None is the plain model.
        decode: x₀ (B, C, H, W) -> images (B, 1 or 3, H', W') in [−1, 1], as
            `models.autoencoder.decoder` returns.
        count: N, images in all.
        batch_size: images in a walk.
        seed: of all images; those of one seed and number start from the same noise and condition.
        out: a name ending in .npz, or a folder to be made.
        progress: show a bar of this process's batches on rank 0.

    Raises:
        ValueError: if a number is out of range, the images are no pictures, or `out` was begun with
            other settings.
        FileExistsError: if `out` is there already.
        BlockingIOError: if another run is at it.
        FileNotFoundError: if images of other processes are not to be seen here.
        KeyboardInterrupt: on Ctrl-C, saying what is kept.
    """
    out = Path(out)
    check_request(count, batch_size, out)
    held = ExitStack()
    from_rank_0(lambda: _begin(parts_of(out), _settings(denoiser, schedule, seed), held))
    with held:
        return _write(denoiser, schedule, decode, count, batch_size, seed, out, progress)


def _write(
    denoiser: Denoiser,
    schedule: Schedule | None,
    decode: Callable[[Tensor], Tensor],
    count: int,
    batch_size: int,
    seed: int,
    out: Path,
    progress: bool,
) -> Path:
    parts = parts_of(out)
    walk = Walk(denoiser, schedule)
    batches = [range(i, min(i + batch_size, count)) for i in range(0, count, batch_size)][
        rank() :: world()
    ]
    try:
        for numbers in _unfinished(batches, parts, progress):
            _write_batch(denoiser, walk, decode, numbers, seed, parts)
        _wait_for_all(denoiser)
        pieces = pieces_of(parts, count)
        if out.suffix == ".npz":
            from_rank_0(lambda: _write_npz(out, pieces, count))
        else:
            from_rank_0(lambda: out.mkdir(exist_ok=True))
            _write_pictures(out, pieces[rank() :: world()])
            _wait_for_all(denoiser)
            from_rank_0(lambda: _write_labels(labels_of(out), pieces))
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"stopped; finished images are in {parts}, run the same again to continue"
        ) from None
    from_rank_0(lambda: shutil.rmtree(parts))
    return out


def check_request(count: int, batch_size: int, out: Path) -> None:
    """Refuse what no model could make, or what is there already: raise ValueError or
    FileExistsError.
    """
    for name, value in (("count", count), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be 1 or more")
    if not out.name:
        raise ValueError(f"out is {str(out)!r}; expected NAME.npz, or a folder that is to be made")
    there = out.is_file() or (out.is_dir() and any(out.iterdir())) or labels_of(out).exists()
    if there and not parts_of(out).is_dir():  # with its parts, it is half done and may be continued
        raise FileExistsError(f"{out} exists; choose another name, or remove it")


def parts_of(out: Path) -> Path:
    """Return the folder of finished batches."""
    return out.with_name(f"{out.name}.parts")


def labels_of(out: Path) -> Path:
    """Return the file of conditions beside a folder; inside, some tools would take it for an
    image.
    """
    return out.with_name(f"{out.name}.labels.txt")


# ------------------------------------------------------------ one image, one batch


def generator_of(seed: int, i: int) -> torch.Generator:
    """Return the generator of image i.

    torch's generator on the CPU reads the low 32 bits of its seed. Adding i to where a seed begins
    gives four billion images different ones; hashing (seed, i) to 32 bits would make twins among 50
    000 images every third time.
    """
    begin = zlib.crc32(str(seed).encode())
    return torch.Generator().manual_seed((begin + i) % 2**32)


def draw_images(denoiser: Denoiser, numbers: Sequence[int], seed: int) -> tuple[Tensor, Tensor]:
    """Draw noise (B, C, H, W) and conditions (B,) of these images, each from a generator of its
    own.

    Raises ValueError if conditions are not one whole number for each image.
    """
    drawn = [denoiser.draw(1, generator_of(seed, i)) for i in numbers]
    conditions = [cond for _, cond in drawn]
    for cond in conditions:
        if not isinstance(cond, Tensor) or cond.shape != (1,) or cond.is_floating_point():
            found = (
                f"{tuple(cond.shape)} {cond.dtype}"
                if isinstance(cond, Tensor)
                else type(cond).__name__
            )
            raise ValueError(
                f"the denoiser draws conditions {found}; samples keep them as whole numbers, (B,) int64"
            )
    return torch.cat([x for x, _ in drawn]), torch.cat(conditions)


def to_uint8(images: Tensor) -> Tensor:
    """Return images (B, 1 or 3, H, W) in [−1, 1] as (B, H, W, 3) uint8: to the nearest level, grey
    as three equals.

    Raises ValueError if they have other channels, or a value is not finite.

    >>> to_uint8(torch.tensor([-1.0, 0.0, 1.0, 7.0]).view(1, 1, 1, 4))[0, 0, :, 0].tolist()
    [0, 128, 255, 255]
    """
    if images.dim() != 4 or images.shape[1] not in (1, 3):
        raise ValueError(
            f"decode made {tuple(images.shape)}; expected (B, 1 or 3, H, W), grey or RGB"
        )
    if not bool(images.isfinite().all()):
        raise ValueError(
            "decode made values that are not finite; look for NaN in the weights, or take a wider dtype"
        )
    levels = (
        (images.float() * 127.5 + 128.0).floor().clamp(0, 255).to(torch.uint8)
    )  # half up, as DiT's own script does
    return levels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous()


def _write_batch(
    denoiser: Denoiser,
    walk: Walk,
    decode: Callable[[Tensor], Tensor],
    numbers: range,
    seed: int,
    parts: Path,
) -> None:
    x, cond = draw_images(denoiser, numbers, seed)
    images = to_uint8(decode(walk(x, cond)))
    name = f"{numbers.start:08}-{numbers.stop:08}.safetensors"
    write_tensors(parts / name, {"images": images, "labels": cond.long()}, {})


# ------------------------------------------------------------ what is finished


def _settings(denoiser: Denoiser, schedule: Schedule | None, seed: int) -> dict[str, Any]:
    """Return what all images of one set have in common, as JSON has it."""
    about = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in denoiser.about.items()
    }
    table = b"" if schedule is None else bytes(schedule.compute.flatten().tolist())
    return {
        "seed": seed,
        **about,
        "schedule": hashlib.sha256(table).hexdigest() if table else "none",
    }


def _begin(parts: Path, settings: dict[str, Any], held: ExitStack) -> None:
    """Make the folder of finished batches, or see that the one that is there is of the same set;
    hold it.
    """
    note = parts / "settings.json"
    parts.mkdir(parents=True, exist_ok=True)
    held.enter_context(exclusive_lock(parts))
    if not note.is_file():
        write_json(note, settings)
    begun = read_json(note)
    other = [
        name for name in settings.keys() | begun.keys() if begun.get(name) != settings.get(name)
    ]
    if other:
        found = ", ".join(
            f"{name} {_short(begun.get(name))} -> {_short(settings.get(name))}"
            for name in sorted(other)
        )
        raise ValueError(
            f"{parts} was begun with other settings: {found}; go on with those, or remove the folder"
        )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 12 else f"{text[:11]}…"


def _finished(parts: Path) -> list[tuple[int, int, Path]]:
    """Return (first image, one after the last, file) of each finished batch, in order."""
    files = [
        (path, re.fullmatch(r"([0-9]{1,18})-([0-9]{1,18})", path.stem))
        for path in parts.glob("*.safetensors")
    ]
    return sorted((int(numbers[1]), int(numbers[2]), path) for path, numbers in files if numbers)


def _unfinished(batches: list[range], parts: Path, progress: bool) -> Iterator[range]:
    """Yield the batches that are not finished, with a bar."""
    from tqdm import tqdm

    there = {i for start, stop, _ in _finished(parts) for i in range(start, stop)}
    left = [numbers for numbers in batches if not there.issuperset(numbers)]
    quiet = (
        None if progress and rank() == 0 else True
    )  # None: silent where stderr is not a terminal
    yield from tqdm(
        left, initial=len(batches) - len(left), total=len(batches), unit="batch", disable=quiet
    )


def pieces_of(parts: Path, count: int) -> list[Piece]:
    """Return which images to take from which file, each of 0 … count − 1 once and in order.

    Files overlap where a run went on with another batch size.

    Raises FileNotFoundError if an image is in none.
    """
    pieces, position = [], 0
    for start, stop, path in _finished(parts):
        stop = min(stop, count)
        if start <= position < stop:
            pieces.append(Piece(path, position, position - start, stop - position))
            position = stop
    if position < count:
        raise FileNotFoundError(
            f"{parts} lacks image {position}; all processes must see one folder; run it again"
        )
    return pieces


def read_piece(piece: Piece) -> tuple[Tensor, Tensor]:
    """Return images (B, H, W, 3) uint8 and labels (B,) int64 of a piece; raise ValueError if its
    file has others.
    """
    tensors, _ = read_tensors(piece.path)
    start, stop = map(int, piece.path.stem.split("-"))
    images, labels = tensors.get("images"), tensors.get("labels")
    if (
        images is None or images.dtype != torch.uint8 or images.dim() != 4 or images.shape[::3] != (stop - start, 3)
        or labels is None or labels.dtype != torch.int64 or labels.shape != (stop - start,)
    ):  # fmt: skip
        found = ", ".join(
            f"{name} {tuple(value.shape)} {value.dtype}" for name, value in tensors.items()
        )
        todo = f"{stop - start} images and their labels were expected; remove the file and run it again"
        raise ValueError(f"{piece.path} has {found or 'nothing':.200}; {todo}")
    wanted = slice(piece.skip, piece.skip + piece.images)
    return images[wanted], labels[wanted]


def _wait_for_all(denoiser: Denoiser) -> None:
    """Return when every process is here."""
    place = next(
        p.device for site in denoiser.sites.values() for p in site.parameters()
    )  # nccl speaks on GPUs only
    mean_over_ranks(torch.zeros((), device=place))


# ------------------------------------------------------------ the whole


def _write_npz(path: Path, pieces: Sequence[Piece], count: int) -> None:
    """Write arr_0 and arr_1 piece by piece: 50 000 images of 256 pixels are 10 GB, which need not
    be in memory.
    """
    from numpy.lib import format as npy

    shape = read_piece(pieces[0])[0].shape[1:]  # (H, W, 3)

    def write(beside: Path) -> None:
        labels = []
        with zipfile.ZipFile(beside, "w") as archive:  # stored, not packed, as numpy.savez does
            with archive.open("arr_0.npy", "w", force_zip64=True) as file:
                header = {"descr": "|u1", "fortran_order": False, "shape": (count, *shape)}
                npy.write_array_header_1_0(file, header)
                for piece in pieces:
                    images, some = read_piece(piece)
                    if images.shape[1:] != shape:
                        found = f"{tuple(images.shape[1:])} in {piece.path}, {tuple(shape)} in {pieces[0].path}"
                        raise ValueError(
                            f"images differ in size: {found}; remove the folder and run it again"
                        )
                    file.write(images.numpy().tobytes())
                    labels.append(some)
            with archive.open("arr_1.npy", "w") as file:
                npy.write_array(file, torch.cat(labels).numpy(), allow_pickle=False)

    write_whole(path, write)


def _write_pictures(folder: Path, pieces: Sequence[Piece]) -> None:
    """Write each image as a PNG file named by its number."""
    from PIL import Image  # matplotlib brings Pillow along

    for piece in pieces:
        for i, image in enumerate(read_piece(piece)[0], start=piece.first):
            save = partial(
                Image.fromarray(image.numpy()).save, format="PNG"
            )  # the name beside does not end in .png
            write_whole(folder / f"{i:06}.png", save)


def _write_labels(path: Path, pieces: Sequence[Piece]) -> None:
    lines = [f"{label}\n" for piece in pieces for label in read_piece(piece)[1].tolist()]
    write_whole(path, lambda beside: beside.write_text("".join(lines), encoding="ascii"))


# ------------------------------------------------------------ the command


def parser() -> Parser:
    """Return the command line of sampling."""
    p = Parser(prog=PROG, description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_model_options(p)
    p.add_argument(
        "--vae", type=Path, metavar="DIR", help="autoencoder saved by diffusers (the model's own)"
    )
    p.add_argument(
        "--schedule",
        type=Path,
        metavar="FILE",
        help="what the cache follows (none: the plain model)",
    )
    p.add_argument("--count", type=whole, default=1000, help="images in all (1000)")
    p.add_argument(
        "--batch-size", type=whole, default=32, help="images in a walk, of each process (32)"
    )
    p.add_argument("--seed", type=int, default=0, help="of noise and conditions (0)")
    p.add_argument(
        "--out",
        type=Path,
        default=Path("out/samples.npz"),
        help="NAME.npz or a folder (out/samples.npz)",
    )
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Write samples; return 0, 2 for bad input or 130 after Ctrl-C, with one line on stderr."""
    return command(parser(), run, arguments)


def run(args: argparse.Namespace) -> None:
    """Check, join the other processes if any, load, sample; rank 0 alone prints."""
    from harmonica.models.autoencoder import decoder

    if started_as()[0] == 0:  # others may come when the first has begun to write
        check_request(args.count, args.batch_size, args.out)
    if started_as()[1] == 1:
        check_device(args.device)
    schedule = None if args.schedule is None else Schedule.load(args.schedule)
    with processes(args.device) as device:
        denoiser = load_model(args, device)
        decode = decoder(args.model, args.weights, vae=args.vae, device=device)
        if schedule is not None:
            schedule = schedule.fit(tuple(denoiser.sites))
            schedule.check(denoiser.steps, tuple(denoiser.sites), denoiser.about["timesteps"])
        write_samples(
            denoiser,
            schedule,
            decode,
            count=args.count,
            batch_size=args.batch_size,
            seed=args.seed,
            out=args.out,
        )
        if rank() == 0:
            print(f"{args.count} images of seed {args.seed} are in {args.out}")


if __name__ == "__main__":
    sys.exit(main())
