r"""Write many images to disk, for the tools that the field measures with.

    python -m harmonica.image_sets --model tiny --schedule out/demo/schedule.json --count 1000 \
        --out out/images.npz
    torchrun --nproc-per-node 4 -m harmonica.image_sets --model dit-xl --device cuda \
        --count 50000 --out out/dit-xl.npz

    --out X.npz    arr_0 images (N, H, W, 3) uint8, arr_1 conditions (N,) int64
    --out X        a folder of 000000.png, 000001.png, …, conditions in X.labels.txt beside it

Image i starts from noise and a condition that depend on (seed, i) alone. So it does not depend on
the number of images, of processes or of images in a batch (except for rounding in the model).
Finished batches are kept in OUT.parts until all are there. After an interruption, the same command
continues.
"""

import argparse
import hashlib
import json
import shutil
import sys
import zlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harmonica import command_line as cli
from harmonica.columns import fit
from harmonica.denoise import Denoiser
from harmonica.evaluation import image_files
from harmonica.inference.walk import Walk
from harmonica.processes import (
    from_rank_0,
    processes,
    progress_bar,
    rank,
    started_as,
    wait_for_all,
    world,
)
from harmonica.router import Schedule
from harmonica.storage.files import StrPath, changes, exclusive_lock, read_json, write_json
from harmonica.table import require


def write_images(  # noqa: D417 (some arguments share a line)
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

    Under torchrun batch j is made by process j mod world; all must see the folder of `out`.

    Args:
        denoiser: its conditions must be whole numbers (B,): classes, or numbers of prompts.
        schedule: what the cache follows; None is the plain model.
        decode: x₀ (B, C, H, W) -> images (B, 1 or 3, H', W') in [−1, 1] (`autoencoder.decoder`).
        count, batch_size, seed: N, images in all; in a walk; and what all of them are drawn from.
        out: a name ending in .npz, or a folder to be made.

    Raises ValueError if a number is out of range or `out` was begun with other settings,
    FileExistsError if `out` is there already, BlockingIOError if another run writes to it, and
    FileNotFoundError if images of other processes cannot be seen here.
    """
    out = Path(out)
    for name, value in (("count", count), ("batch_size", batch_size)):
        require(value >= 1, f"{name} is {value}; it must be 1 or more")
    image_files.check_out(out)
    parts, walk = image_files.parts_of(out), Walk(denoiser, schedule)
    with ExitStack() as held:

        def begin() -> list[range]:
            _begin(parts, _settings(denoiser, schedule, seed), held)
            return image_files.unfinished(parts, count, batch_size)

        batches = from_rank_0(begin)[rank() :: world()]
        try:
            for numbers in progress_bar(progress, iterable=batches, unit="batch"):
                x, cond = draw_images(denoiser, numbers, seed)
                images = image_files.to_uint8(decode(walk(x, cond)))
                image_files.write_part(parts, numbers, images, cond)
            wait_for_all()
            _put_together(out, count)
        except KeyboardInterrupt:
            kept = f"finished images are in {parts}, run the same again to continue"
            raise KeyboardInterrupt(f"stopped; {kept}") from None
        from_rank_0(lambda: shutil.rmtree(parts))
    return out


def _put_together(out: Path, count: int) -> None:
    pieces = image_files.pieces_of(image_files.parts_of(out), count)
    if out.suffix == ".npz":
        from_rank_0(lambda: image_files.write_npz(out, pieces))
        return
    from_rank_0(lambda: out.mkdir(exist_ok=True))
    image_files.write_pngs(out, pieces[rank() :: world()])
    wait_for_all()
    from_rank_0(lambda: image_files.write_labels(image_files.labels_of(out), pieces))


def generator_of(seed: int, i: int) -> torch.Generator:
    """Return the generator of image i; four billion images have different ones.

    torch reads 32 bits of a seed. To hash (seed, i) to 32 bits would give two of 50 000 images the
    same generator every third time.
    """
    return torch.Generator().manual_seed((zlib.crc32(str(seed).encode()) + i) % 2**32)


def draw_images(denoiser: Denoiser, numbers: Sequence[int], seed: int) -> tuple[Tensor, Tensor]:
    """Draw noise (B, C, H, W) and conditions (B,) of these images, each from its own generator.

    Raises ValueError if conditions are not one whole number for each image.
    """
    drawn = [denoiser.draw(1, generator_of(seed, i)) for i in numbers]
    for _, cond in drawn:
        whole = isinstance(cond, Tensor) and cond.shape == (1,) and not cond.is_floating_point()
        rule = "expected one whole number, (1,) int64"
        require(whole, f"the denoiser draws the condition {cond!r:.60}; {rule}")
    return torch.cat([x for x, _ in drawn]), torch.cat([cond for _, cond in drawn])


def _settings(denoiser: Denoiser, schedule: Schedule | None, seed: int) -> dict[str, Any]:
    """Return what all images of one set have in common, as JSON has it."""
    about: dict[str, Any] = {"seed": seed, **json.loads(json.dumps(denoiser.about))}
    if schedule is None:
        return about | {"schedule": "none"}
    weights = schedule.gate_weights
    content = repr((schedule.compute.tolist(), None if weights is None else weights.tolist()))
    return about | {"schedule": hashlib.sha256(content.encode()).hexdigest()}


def _begin(parts: Path, settings: dict[str, Any], held: ExitStack) -> None:
    """Make the folder of finished batches, or check that it was begun with these settings; hold it
    for this run.
    """
    note = parts / "settings.json"
    parts.mkdir(parents=True, exist_ok=True)
    held.enter_context(exclusive_lock(parts))
    if not note.is_file():
        write_json(note, settings)
    other, todo = changes(read_json(note), settings), "go on with those, or remove the folder"
    require(not other, f"{parts} was begun with other settings: {other}; {todo}")


def parser() -> cli.Parser:
    """Return the command line."""
    p = cli.Parser("image_sets", __doc__)
    cli.add_model_options(p)
    p.option("vae", Path, "autoencoder saved by diffusers", shown="DIR")
    p.option("schedule", Path, "table to follow (none: no cache)", shown="FILE")
    p.option("count", cli.count, "images in all", 1000)
    p.option("batch-size", cli.count, "images in a walk", 32)
    p.option("seed", int, "of noise and conditions", 0)
    p.option("out", Path, "NAME.npz or a folder", Path("out/images.npz"))
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Write images; return 0, 2 for bad input or 130 after Ctrl-C, with one line on stderr."""
    return cli.command(parser(), run, arguments)


def run(args: argparse.Namespace) -> None:
    """Check, join the other processes if any, load, write; only rank 0 prints."""
    from harmonica.models.autoencoder import decoder

    number, of_all = started_as()
    if number == 0:  # others may come when the first has begun to write
        image_files.check_out(args.out)
    if of_all == 1:
        cli.check_device(args.device)
    schedule = None if args.schedule is None else Schedule.load(args.schedule)
    with processes(args.device) as device:
        denoiser = cli.load_model(args, device)
        dtype = cli.dtype_of(args, device)
        decode = decoder(args.model, args.weights, vae=args.vae, device=device, dtype=dtype)
        if schedule is not None:
            schedule = fit(schedule, tuple(denoiser.sites))
        sizes = {"count": args.count, "batch_size": args.batch_size, "seed": args.seed}
        write_images(denoiser, schedule, decode, **sizes, out=args.out)
        if rank() == 0:
            print(f"{args.count} images of seed {args.seed} are in {args.out}")


if __name__ == "__main__":
    sys.exit(main())
