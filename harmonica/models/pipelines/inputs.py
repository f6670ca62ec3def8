"""Inputs: what a pipeline is called with for a batch of samples, checked before anything runs.

This file does not know denoisers or what the arguments do.
"""

import inspect
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor

from harmonica.models.pipelines.checks import check_pipeline
from harmonica.models.prompts import read_prompts
from harmonica.values import StrPath, items, require, whole

Sample = tuple[int, int]
"""Row of the prompt, seed."""

SHORT = {"steps": "num_inference_steps", "guidance": "guidance_scale"}
"""Other names of two arguments, which `from_pipeline` and `tune` take as well."""


@dataclass(frozen=True)
class Inputs:
    """What the pipeline is called with."""

    call: Mapping[str, Any]  # arguments that are the same for every sample
    each: Mapping[str, Any]  # those that each row has its own of, tensors (rows, …) or lists
    rows: int
    takes_generator: bool

    def samples(self, cond: Tensor) -> list[Sample]:
        """Return the samples of cond (B, 2); raise ValueError for rows that are not there."""
        samples = [(int(row), int(seed)) for row, seed in cond.tolist()]
        rows = [row for row, _ in samples]
        exist = all(0 <= row < self.rows for row in rows)
        require(exist, f"cond names rows {rows}; there are {self.rows} prompts")
        return samples

    def of(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """Return the arguments for a batch of samples."""
        several, call = len(samples) > 1, dict(self.call)
        if several and isinstance(call.get("negative_prompt"), str):
            call["negative_prompt"] = [call["negative_prompt"]] * len(samples)
        for name, values in self.each.items():
            chosen = [values[row] for row, _ in samples]  # an index tensor would be waited for
            if isinstance(values, Tensor):
                call[name] = torch.stack(chosen)
            else:
                alone = not several and not isinstance(chosen[0], Tensor | int)
                call[name] = chosen[0] if alone else chosen
        if self.takes_generator:
            generators = [torch.Generator().manual_seed(seed) for _, seed in samples]
            call["generator"] = generators if several else generators[0]
        return call


def inputs_of(
    pipe: Any, prompts: StrPath | Sequence[str] | None, each: Mapping[str, Any] | None,
    call: Mapping[str, Any],
) -> Inputs:  # fmt: skip
    """Return what the pipeline is called with; raises as `from_pipeline` does."""
    check_pipeline(pipe)
    name, parameters = type(pipe).__name__, inspect.signature(type(pipe).__call__).parameters
    each, call = {**(each or {})}, _by_their_names(call)
    prompted, given = {"prompt"} if prompts is not None else set(), {*each, *call}
    twice = {*each} & {*call} | prompted & given
    todo = "give it once: as prompts, in each, or for all samples"
    require(not twice, f"{', '.join(twice)} is given in two ways; {todo}")
    if prompted or ("prompt" in parameters and not {"prompt", "prompt_embeds"} & given):
        each["prompt"] = read_prompts(prompts)
    if "class_labels" in parameters and "class_labels" not in given:
        each["class_labels"] = range(pipe.transformer.config.num_embeds_ada_norm)
    _check_arguments(name, parameters, each, call)
    each = {it: _rows(it, values, str(parameters[it].annotation)) for it, values in each.items()}
    lengths = {argument: len(values) for argument, values in each.items()}
    fit = len({*lengths.values()}) < 2 and 0 not in lengths.values()
    why = f"the lengths of prompts and each differ, or are zero: {lengths}"
    require(fit, f"{why}; give each prompt one")
    if call.get("num_inference_steps") is None:
        call["num_inference_steps"] = parameters["num_inference_steps"].default
    call["num_inference_steps"] = whole("steps", call["num_inference_steps"])
    if "output_type" in parameters:
        call.setdefault("output_type", "latent")
    rows = len(next(iter(each.values()), [None]))
    return Inputs(call, each, rows, "generator" in parameters)


def _by_their_names(call: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments by the names that pipelines have for them."""
    named = dict(call)
    for short, name in SHORT.items():
        value, other = named.pop(short, None), named.get(name)
        both = f"{short} is {value} and {name} {other}"
        require(value is None or other is None, f"{both}; they are one argument, so give one")
        named |= {} if value is None else {name: value}
    return named


def _check_arguments(
    name: str, parameters: Collection[str], each: Mapping[str, Any], call: Mapping[str, Any]
) -> None:
    for argument in (*each, *call, "num_inference_steps"):
        if argument not in parameters:
            takes, near = list(parameters)[1:], get_close_matches(argument, parameters, 3)
            hint = f"did you mean {' or '.join(near)}?" if near else f"it takes {', '.join(takes)}"
            raise TypeError(f"{name} does not take {argument}; {hint}")
    for argument in {"generator", "latents"} & {*each, *call}:
        raise ValueError(f"{argument} is given; x and its seeds take its place, leave it out")
    for argument in ("num_images_per_prompt", "num_videos_per_prompt"):
        count = each.get(argument, call.get(argument, 1))
        require(count == 1, f"{argument} is {count}; a sample is one image, so leave it out")


def _rows(name: str, values: Any, takes: str) -> Any:
    """Return an argument's values, one a row, in one tensor where the pipeline takes no list."""
    if isinstance(values, Tensor):
        return values
    rows, no_list = items(name, values), "Tensor" in takes and "list" not in takes.lower()
    tensors = len(rows) > 0 and all(isinstance(row, Tensor) for row in rows)
    return torch.stack(rows) if tensors and no_list else rows


def about(pipe: Any, call: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a table of this pipeline belongs to, in the words of `Schedule`'s fields."""
    size = "x".join(str(call[side]) for side in ("height", "width") if side in call)
    default = inspect.signature(type(pipe).__call__).parameters.get("guidance_scale")
    scale = call.get("guidance_scale", getattr(default, "default", None))
    guidance = float(scale) if isinstance(scale, int | float) else None
    model = f"{type(pipe).__name__}-{size}".rstrip("-")
    return {"model": model, "sampler": type(pipe.scheduler).__name__, "guidance": guidance}
