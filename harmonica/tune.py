"""python -m harmonica.tune: find a schedule for a diffusers pipeline, and show what it does.

Writes schedule.json, and comparison.png, one image without and with the schedule, to --out:

    python -m harmonica.tune --pipeline FOLDER_OR_HUB_ID --speedup 1.5 --steps 28 --guidance 3.5
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from harmonica.command_line import DTYPES, Parser, check_device, command, make_writable, seed, whole
from harmonica.models.pipelines import tune
from harmonica.router import Schedule


class _Command(ModuleType):
    """A module that is called as the function of its name.

    Importing harmonica.tune puts this module where the function `harmonica.tune` is looked up.
    """

    def __call__(self, *args: Any, **options: Any) -> Schedule:
        return tune(*args, **options)


sys.modules[__name__].__class__ = _Command


def parser() -> Parser:
    """Return the command line of tuning."""
    p = Parser(
        prog="python -m harmonica.tune",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    p.add_argument(
        "--pipeline", required=True, help="a folder of a diffusers pipeline, or its name on the Hub"
    )
    p.add_argument("--speedup", type=float, required=True, help="theoretical, of the transformer")
    p.add_argument("--steps", type=whole, help="num_inference_steps (the pipeline's own)")
    p.add_argument("--guidance", type=float, help="guidance_scale (the pipeline's own)")
    p.add_argument("--height", type=whole, help="of the image (the pipeline's own)")
    p.add_argument("--width", type=whole, help="of the image (the pipeline's own)")
    p.add_argument("--prompts", type=Path, metavar="FILE", help="one to a line (64 of our own)")
    p.add_argument(
        "--order", type=whole, default=0, help="differences that continue skipped outputs (0)"
    )
    p.add_argument(
        "--method", choices=("auto", "sdt"), default="auto", help="sdt is the paper's training"
    )
    p.add_argument("--budget", type=whole, help="predictions that may be spent (1000 walks')")
    p.add_argument("--cost", choices=("milliseconds",), help="aim at the clock, not at MACs")
    p.add_argument("--seed", type=seed, default=0, help="of the image that is shown (0)")
    p.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (cpu)")
    p.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights (float32)")
    p.add_argument("--out", type=Path, default=Path("out/tune"), help="folder (out/tune)")
    return p  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return command(parser(), _run, arguments)


def _run(args: argparse.Namespace) -> None:
    from diffusers import DiffusionPipeline

    from harmonica.evaluation.pictures import comparison, save
    from harmonica.models.pipelines import cached
    from harmonica.models.prompts import read_prompts

    check_device(args.device)
    make_writable(args.out)
    pipe: Any = DiffusionPipeline.from_pretrained(
        args.pipeline, torch_dtype=getattr(torch, args.dtype)
    ).to(args.device)
    names = {"steps": "num_inference_steps", "guidance": "guidance_scale"}
    names |= {side: side for side in ("height", "width")}
    values = {name: getattr(args, option) for option, name in names.items()}
    call = {name: value for name, value in values.items() if value is not None}
    how = {"speedup": args.speedup, "order": args.order, "method": args.method}
    schedule = tune(pipe, args.prompts, budget=args.budget, cost=args.cost, **how, **call)
    schedule.save(args.out / "schedule.json")
    call["prompt"] = read_prompts(args.prompts)[0]
    plain = _image(pipe, call, args.seed)
    with cached(pipe, schedule):
        fast = _image(pipe, call, args.seed)
    save(comparison(plain, fast, labels=[call["prompt"]]), args.out / "comparison.png")
    print(f"CUR {schedule.cur:.1%}; wrote schedule.json and comparison.png to {args.out}")


def _image(pipe: Any, call: dict[str, Any], seed: int) -> Tensor:
    """Return the image that the pipeline makes, or the first frame of its video, (1, 3, H, W)."""
    output = pipe(**call, output_type="pt", generator=torch.Generator().manual_seed(seed))
    made: Tensor = next(iter(output.values()))
    return 2 * made.reshape(-1, *made.shape[-3:])[:1].float().cpu() - 1


if __name__ == "__main__":
    sys.exit(main())
