"""python -m harmonica.tune: find a schedule for a diffusers pipeline, and show what it does.

Writes to --out: schedule.json, and comparison.png, an image without and with the schedule.

    python -m harmonica.tune --pipeline FOLDER_OR_HUB_ID --speedup 1.5 --steps 28 --guidance 3.5
"""

import argparse
import json
import sys
import warnings
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from harmonica import command_line
from harmonica.command_line import Parser, whole
from harmonica.models.pipelines import cached, tune
from harmonica.models.pipelines.inputs import Inputs, inputs_of
from harmonica.storage.files import decoding


class _Command(ModuleType):
    """A module that can be called: importing this one puts it where `harmonica.tune`, the function,
    is looked up, and nobody's call should break by that.
    """

    __call__ = staticmethod(tune)


sys.modules[__name__].__class__ = _Command


def parser() -> Parser:
    """Return the command line of tuning."""
    p = Parser("tune", __doc__)
    call = "other arguments of the pipeline: height=1024 width=1024"
    p.add_argument("--pipeline", required=True, help="a folder, or the name of a Hub repository")
    p.add_argument("--speedup", type=float, required=True, help="theoretical, of the transformer")
    p.option("steps", whole, "num_inference_steps (the pipeline's own)")
    p.option("guidance", float, "guidance_scale (the pipeline's own)")
    p.add_argument("--call", nargs="+", type=_argument, default=[], metavar="NAME=VALUE", help=call)
    p.option("prompts", Path, "one to a line (64 of our own)", shown="FILE")
    p.option("order", whole, "0 returns a skipped site's last output, 1 and more extrapolate", 0)
    p.option("method", ("auto", "sdt"), "sdt is the paper's training", "auto")
    p.option("budget", whole, "predictions that may be spent (1000 walks')")
    p.option("cost", ("milliseconds",), "aim at the clock, not at MACs")
    p.option("seed", command_line.seed, "of the image that is shown", 0)
    p.option("device", str, "cpu, cuda or cuda:N", "cpu")
    p.option("dtype", command_line.DTYPES, "of the weights (float32; on cuda bfloat16)")
    p.option("out", Path, "folder", Path("out/tune"))
    return p


def _argument(text: str) -> tuple[str, Any]:
    """Return the name and the value of NAME=VALUE, a value in JSON or else a string.

    >>> _argument("height=64"), _argument("negative_prompt=blurry")
    (('height', 64), ('negative_prompt', 'blurry'))
    """
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"found {text[:40]!r}; expected NAME=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _run(args: argparse.Namespace) -> None:
    from PIL import Image

    command_line.check_device(args.device)
    command_line.make_writable(args.out)
    pipe = _load(args.pipeline, command_line.dtype_of(args, args.device)).to(args.device)
    call = {"steps": args.steps, "guidance": args.guidance, **dict(args.call)}
    try:
        inputs = inputs_of(pipe, args.prompts, None, call)
    except TypeError as error:  # not such a pipeline, or no argument of it
        raise ValueError(str(error)) from None
    how = {"speedup": args.speedup, "order": args.order, "method": args.method}
    schedule = tune(pipe, args.prompts, budget=args.budget, cost=args.cost, **how, **call)
    schedule.save(args.out / "schedule.json")
    pipe.set_progress_bar_config(disable=True)
    plain = _image(pipe, inputs, args.seed)
    with cached(pipe, schedule) as session:
        fast = _image(pipe, inputs, args.seed)
    factor = 1 / max(float((fast - plain).abs().max()), 1e-6)
    both = torch.cat([plain, fast, 0.5 + (fast - plain) * factor / 2], 1)
    Image.fromarray(both.mul(255).round().byte().numpy()).save(args.out / "comparison.png")
    print(f"{session}\nwrote to {args.out}: schedule.json; comparison.png, an image without and")
    print(f"with the schedule, and the difference, {factor:.0f} times enlarged")


main = partial(command_line.command, parser, _run)


def _load(name: str, dtype: torch.dtype) -> Any:
    from diffusers import DiffusionPipeline

    todo = "is no pipeline; pass a folder saved by diffusers, or OWNER/NAME of a Hub repository"
    with decoding(name, todo), warnings.catch_warnings():  # the oldest diffusers knows no `dtype`
        warnings.filterwarnings("ignore", "`torch_dtype` is deprecated")
        return DiffusionPipeline.from_pretrained(name, torch_dtype=dtype)


def _image(pipe: Any, inputs: Inputs, seed: int) -> Tensor:
    """Return the pipeline's image, or the first frame of its video, (H, W, 3) in [0, 1]."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # for a pipeline that takes no generator
        output = pipe(**inputs.of([(0, seed)]) | {"output_type": "np"})
    images = torch.as_tensor(next(iter(output.values())))  # (B, [frames,] H, W, 3)
    return images.reshape(-1, *images.shape[-3:])[0].float()


if __name__ == "__main__":
    sys.exit(main())
