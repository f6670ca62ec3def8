r"""Write many images to disk, for the tools that the field measures with.

    python -m harmonica.image_sets --model tiny --schedule out/demo/schedule.json --count 1000 \
        --out out/images.npz
    torchrun --nproc-per-node 4 -m harmonica.image_sets --model dit-xl --device cuda \
        --count 50000 --out out/dit-xl.npz

    --out X.npz    arr_0 images (N, H, W, 3) uint8, arr_1 conditions (N,) int64
    --out X        a folder of 000000.png, 000001.png, …, conditions in X.labels.txt beside it

Image i starts from noise and a condition that depend on (seed, i) alone. So it does not depend on
the number of images, of processes or of images in a batch (except for rounding in the model).
Finished images are PNG files in OUT.parts until all are there. After an interruption, the same
command makes those that are missing.
"""

import argparse
import hashlib
import json
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image  # matplotlib brings Pillow along
from torch import Tensor

from harmonica import command_line as cli
from harmonica.denoise import Denoiser
from harmonica.inference.walk import Walk
from harmonica.processes import from_rank_0, processes, progress_bar, rank, started_as, world
from harmonica.router import Schedule
from harmonica.storage import files
from harmonica.storage.files import write_text
from harmonica.values import StrPath, require, whole

PARTS, LABELS = ".parts", ".labels.txt"  # endings of the folder of finished images, of conditions
SETTINGS = "settings.json"  # of the images, in the folder of the finished ones


def write_images(  # noqa: D417 (some arguments share a line)
    denoiser: Denoiser, schedule: Schedule | None, decode: Callable[[Tensor], Tensor], *,
    count: int, batch_size: int = 32, seed: int = 0, out: StrPath, progress: bool = True,
) -> Path:  # fmt: skip
    """Make images 0 … count − 1 of a seed and write them whole; return where they are.

    Under torchrun batch j is made by process j mod world; all must see the folder of `out`.

    Args:
        denoiser, schedule: whose conditions are whole numbers (B,); None is the plain model.
        decode: x₀ (B, C, H, W) -> images (B, 1 or 3, H', W') in [−1, 1] (`autoencoder.decoder`).
        count, batch_size, seed: N, images in all; in a walk; and what all of them are drawn from.
        out: a name ending in .npz, or a folder to be made.

    Raises ValueError if a number is out of range or `out` was begun with other settings,
    FileExistsError if `out` is there, BlockingIOError if another run writes to it, and
    FileNotFoundError if images of other processes cannot be seen here.
    """
    out, walk = Path(out), Walk(denoiser, schedule)
    check_out(out)
    count, batch_size = whole("count", count), whole("batch_size", batch_size)
    parts = _beside(out, PARTS)
    pictures = [parts / f"{i:06}.png" for i in range(count)]
    with ExitStack() as held:

        def begin() -> list[int]:
            parts.mkdir(parents=True, exist_ok=True)
            held.enter_context(files.exclusive_lock(parts))
            _check_settings(parts, denoiser, schedule, seed)
            return [i for i, picture in enumerate(pictures) if not picture.exists()]

        missing = from_rank_0(begin)
        batches = [missing[i : i + batch_size] for i in range(0, len(missing), batch_size)]
        try:
            for numbers in progress_bar(progress, iterable=batches[rank() :: world()]):
                images = to_uint8(decode(walk(*draw_images(denoiser, numbers, seed))))
                for i, image in zip(numbers, images, strict=True):
                    write_png(pictures[i], image)
            from_rank_0(lambda: _put_together(out, pictures, denoiser, seed))
        except KeyboardInterrupt:
            kept = f"stopped; finished images are in {parts}, run the same again to continue"
            raise KeyboardInterrupt(kept) from None
    return out


def check_out(out: Path) -> None:
    """Raise ValueError if `out` has no name, FileExistsError if it is there and not half done."""
    require(bool(out.name), f"out is {str(out)!r}; expected NAME.npz, or a folder to be made")
    taken = out.is_file() or (out.is_dir() and any(out.iterdir())) or _beside(out, LABELS).exists()
    if taken and not _beside(out, PARTS).is_dir():
        raise FileExistsError(f"{out} exists; choose another name, or remove it")


def generator_of(seed: int, i: int) -> torch.Generator:
    """Return the generator of image i; four billion images have different ones.

    torch reads 32 bits of a seed. A hash of (seed, i) would often give two images the same one.
    """
    return torch.Generator().manual_seed((zlib.crc32(str(seed).encode()) + i) % 2**32)


def draw_images(denoiser: Denoiser, numbers: Sequence[int], seed: int) -> tuple[Tensor, Tensor]:
    """Draw noise (B, C, H, W) and conditions (B,) of these images, each from its own generator."""
    drawn = [denoiser.draw(1, generator_of(seed, i)) for i in numbers]
    for _, cond in drawn:
        one = isinstance(cond, Tensor) and cond.shape == (1,) and not cond.is_floating_point()
        rule = "expected one whole number, (1,) int64"
        require(one, f"the denoiser draws the condition {cond!r:.60}; {rule}")
    return torch.cat([x for x, _ in drawn]), torch.cat([cond for _, cond in drawn])


def to_uint8(images: Tensor) -> Tensor:
    """Return images (B, 1 or 3, H, W) in [−1, 1] as (B, H, W, 3) uint8: to the nearest level, grey
    as three equal channels. Raises ValueError for other channels, or a value that is not finite.

    >>> to_uint8(torch.tensor([-1.0, 0.0, 1.0, 7.0]).view(1, 1, 1, 4))[0, 0, :, 0].tolist()
    [0, 128, 255, 255]
    """
    shape = tuple(images.shape)
    rgb = len(shape) == 4 and shape[1] in (1, 3)
    require(rgb, f"decode made {shape}; expected (B, 1 or 3, H, W), grey or RGB")
    todo = "look for NaN in the weights, or widen the dtype"
    require(bool(images.isfinite().all()), f"decode made values that are not finite; {todo}")
    levels = (images.float() * 127.5 + 128.0).floor().clamp(0, 255)  # half up, as DiT's own script
    return levels.to(torch.uint8).expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous()


def write_png(path: Path, image: Tensor) -> None:
    """Write an image (H, W, 3) uint8."""
    save = Image.fromarray(image.cpu().numpy()).save
    files.write_whole(path, partial(save, format="PNG", compress_level=1))


def read_png(path: Path) -> npt.NDArray[np.uint8]:
    """Return what `write_png` wrote, (H, W, 3); raise ValueError for any other file."""
    verdict = "is no image of this set; remove it and run the same again"
    with files.decoding(path, verdict), Image.open(path, formats=["PNG"]) as picture:
        require(picture.mode == "RGB", f"its mode is {picture.mode}")
        return np.asarray(picture)


def _beside(out: Path, ending: str) -> Path:
    return out.with_name(out.name + ending)  # outside of a folder, where tools expect images alone


def _check_settings(parts: Path, denoiser: Denoiser, schedule: Schedule | None, seed: int) -> None:
    """Write what all images of a set share beside the finished ones, or compare it with theirs."""
    settings = {"seed": seed, "schedule": "none", **json.loads(json.dumps(denoiser.about))}
    if schedule is not None:
        tables = (schedule.compute, schedule.gate_weights)
        content = repr([None if table is None else table.tolist() for table in tables])
        settings["schedule"] = hashlib.sha256(content.encode()).hexdigest()
    if not (parts / SETTINGS).is_file():
        files.write_json(parts / SETTINGS, settings)
    first, todo = files.read_json(parts / SETTINGS), "go on with those, or remove the folder"
    files.require_same(f"{parts} was begun with other settings", first, settings, todo)


def _put_together(out: Path, pictures: Sequence[Path], denoiser: Denoiser, seed: int) -> None:
    """Turn the folder of finished images into `out`."""
    parts = _beside(out, PARTS)
    if lacking := [i for i, path in enumerate(pictures) if not path.exists()]:
        todo = "all processes must see one folder; run it again"
        raise FileNotFoundError(f"{parts} lacks image {lacking[0]}; {todo}")
    labels = [int(draw_images(denoiser, [i], seed)[1]) for i in range(len(pictures))]
    if out.suffix == ".npz":
        files.write_whole(out, partial(_write_npz, pictures, labels))
        shutil.rmtree(parts)
        return
    write_text(_beside(out, LABELS), "".join(f"{label}\n" for label in labels))
    for other in {*parts.iterdir()} - {*pictures, parts / SETTINGS}:  # of a larger count, or half
        other.unlink()
    parts.replace(out)
    (out / SETTINGS).unlink()


def _write_npz(pictures: Sequence[Path], labels: Sequence[int], path: Path) -> None:
    """Write an array of the images: by way of the disk, as 50 000 of 256 pixels are 10 GB."""
    size = read_png(pictures[0]).shape  # (H, W, 3)
    with tempfile.TemporaryFile(dir=path.parent) as on_disk, path.open("wb") as file:
        for picture in pictures:
            image = read_png(picture)
            other = f"images differ in size: {image.shape} in {picture}, {size} in {pictures[0]}"
            require(image.shape == size, f"{other}; remove the folder, run it again")
            on_disk.write(image.tobytes())
        on_disk.flush()
        images = np.memmap(on_disk, np.uint8, "r", shape=(len(pictures), *size))
        np.savez(file, images, np.array(labels))


def parser() -> cli.Parser:
    """Return the command line."""
    p = cli.Parser("image_sets", __doc__)
    cli.add_image_options(p)
    p.option("count", cli.count, "images in all", 1000)
    p.option("batch-size", cli.count, "images in a walk", 32)
    p.option("seed", int, "of noise and conditions", 0)
    p.option("out", Path, "NAME.npz or a folder", Path("out/images.npz"))
    return p


def run(args: argparse.Namespace) -> None:
    """Check, join the other processes if any, load, write; only rank 0 prints."""
    number, of_all = started_as()
    if number == 0:  # others may come when the first has begun to write
        check_out(args.out)
    if of_all == 1:
        cli.check_device(args.device)
    with processes(args.device) as device:
        denoiser, schedule, decode = cli.load_for_images(args, device)
        sizes = {"count": args.count, "batch_size": args.batch_size, "seed": args.seed}
        write_images(denoiser, schedule, decode, **sizes, out=args.out)
        if rank() == 0:
            print(f"{args.count} images of seed {args.seed} are in {args.out}")


main = partial(cli.command, parser, run)

if __name__ == "__main__":
    sys.exit(main())
