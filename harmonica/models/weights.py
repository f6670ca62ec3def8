"""Weights: from the hub, a folder of diffusers or a file of the original, into a model.

    original file     DiT-XL-2-256x256.pt, imagenet256_uvit_huge.pth    the original's parameter names
    diffusers folder  a pipeline (model_index.json) or its transformer  diffusers' parameter names
    "random"          no weights at all, for timing

Reading a file executes nothing that is in it. This file does not know samplers, caches or routers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from harmonica.storage.files import (
    StrPath,
    decoding,
    existing,
    is_plain,
    read_json,
    read_pickle,
    refused,
)


def component(folder: StrPath, name: str, *classes: str) -> Path:
    """Return the folder of one part of a pipeline, or the folder itself if it is that part.

    Args:
        folder: of a pipeline, or of the part alone.
        name: of the part, such as transformer.
        classes: of diffusers, one of which it must have been saved from; any if none is given.

    Raises:
        FileNotFoundError: if neither is there.
        ValueError: if it is a part of another class.
    """
    for place in (Path(folder) / name, Path(folder)):
        if (place / "config.json").is_file():
            found = read_json(place / "config.json").get("_class_name")
            if classes and found not in classes:
                raise ValueError(f"{place} holds a {found!s:.80}; a {classes[0]} was expected")
            return place
    raise FileNotFoundError(
        f"{folder} has no {name}/config.json; expected a folder saved by diffusers"
    )


def from_diffusers(kind: Any, folder: StrPath, **options: Any) -> Any:
    """Read a model of diffusers from the folder that one was saved to, all of it.

    Args:
        kind: class of diffusers.
        folder: with a config.json and weights.
        options: of its `from_pretrained`.

    Raises:
        ValueError: naming the folder, if it is damaged, or lacks a parameter (diffusers would draw
            it and go on), or has one that is not finite.
    """
    with decoding(folder, f"cannot be read as a {kind.__name__} saved by diffusers"):
        model, told = kind.from_pretrained(folder, output_loading_info=True, **options)
    if told["missing_keys"]:
        lacks = f"{len(told['missing_keys'])} parameters, the first of them {sorted(told['missing_keys'])[0]}"
        raise ValueError(f"{folder} lacks {lacks}; the file is damaged, or of another model")
    _must_be_finite(model, folder)
    return model


def read_state(path: StrPath) -> dict[str, Tensor]:
    """Read parameters by name from a .safetensors, .pt or .pth file, executing nothing that the
    file says.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it does not hold tensors by parameter name.
    """
    if existing(path).suffix == ".safetensors":
        return _safetensors(path)
    data = read_pickle(path)
    data = (
        data.get("ema", data) if isinstance(data, dict) else data
    )  # a training checkpoint keeps an averaged copy
    if not isinstance(data, dict) or not all(
        isinstance(key, str) and is_plain(data[key]) for key in data
    ):
        raise ValueError(f"{path} does not hold tensors by parameter name")
    return data


def _safetensors(path: StrPath) -> dict[str, Tensor]:
    """Read tensors; what others wrote in the metadata is theirs."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, ValueError) as error:
        raise refused(path, "is not a safetensors file", error) from None


def fill(model: nn.Module, state: dict[str, Tensor], path: StrPath) -> None:
    """Give a model its parameters, every one of them and no other.

    Raises:
        ValueError: naming the first parameters that do not fit, or one that is not finite.
    """
    try:
        model.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:3]]
        raise refused(path, "does not fit the model", " ".join(lines)) from None
    _must_be_finite(model, path)


def _must_be_finite(model: nn.Module, path: StrPath) -> None:
    for name, value in model.state_dict().items():
        if not bool(value.isfinite().all()):
            raise ValueError(
                f"{path} has a value in {name} that is not finite; the file is damaged"
            )


def dit_from_diffusers(state: dict[str, Tensor], positions: Tensor) -> dict[str, Tensor]:
    """Rename the parameters of diffusers' DiT to the original's.

    diffusers splits the original's `qkv` in three and gives every block a copy of the timestep and
    label embedders; the copies of block 0 are taken, after a look whether the others are the same.

    Args:
        state: of `DiTTransformer2DModel`.
        positions: (1, N, D), which diffusers computes anew.

    Raises:
        ValueError: if the blocks' copies differ, as in a fine-tuned model: the original has one for
            all of them.
        KeyError: never to the user; a missing parameter is named by `fill`.
    """
    renamed = {"pos_embed": positions}
    rules = {"norm1.linear": "adaLN_modulation.1", "attn1.to_out.0": "attn.proj"}
    rules |= {"ff.net.0.proj": "mlp.fc1", "ff.net.2": "mlp.fc2"}
    outside = {"pos_embed.proj": "x_embedder.proj", "proj_out_1": "final_layer.adaLN_modulation.1"}
    outside |= {"proj_out_2": "final_layer.linear"}
    embedders = {"norm1.emb.timestep_embedder.linear_1": "t_embedder.mlp.0"}
    embedders |= {"norm1.emb.timestep_embedder.linear_2": "t_embedder.mlp.2"}
    embedders |= {"norm1.emb.class_embedder.embedding_table": "y_embedder.embedding_table"}
    for key, value in state.items():
        module, kind = key.rsplit(".", 1)
        if module in outside:
            renamed[f"{outside[module]}.{kind}"] = value
        elif module.startswith("transformer_blocks."):
            _, i, inner = module.split(".", 2)
            if inner in rules:
                renamed[f"blocks.{i}.{rules[inner]}.{kind}"] = value
            elif inner in embedders:
                first = renamed.setdefault(f"{embedders[inner]}.{kind}", value)
                if not torch.equal(first, value):
                    raise ValueError(
                        f"{key} differs from block 0's; use the pipeline itself, from_pipeline(pipe, …)"
                    )
            elif inner == "attn1.to_q":
                parts = [state[f"transformer_blocks.{i}.attn1.to_{part}.{kind}"] for part in "qkv"]
                renamed[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(parts)
    return renamed


def dit_to_diffusers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the parameters of the original's DiT to diffusers', the inverse of
    `dit_from_diffusers`.

    Each block gets a copy of the embedders and a third of `qkv` for each of its three projections;
    positions are left out, since diffusers computes them.
    """
    names = {"x_embedder.proj": "pos_embed.proj", "final_layer.adaLN_modulation.1": "proj_out_1"}
    names |= {"final_layer.linear": "proj_out_2"}
    inner = {"adaLN_modulation.1": "norm1.linear", "attn.proj": "attn1.to_out.0"}
    inner |= {"mlp.fc1": "ff.net.0.proj", "mlp.fc2": "ff.net.2"}
    embedders = {
        "t_embedder.mlp.0": "timestep_embedder.linear_1",
        "t_embedder.mlp.2": "timestep_embedder.linear_2",
    }
    embedders |= {"y_embedder.embedding_table": "class_embedder.embedding_table"}
    blocks = sorted({key.split(".")[1] for key in state if key.startswith("blocks.")})
    renamed = {}
    for key, value in state.items():
        module, _, kind = key.rpartition(".")
        if module in names:
            renamed[f"{names[module]}.{kind}"] = value
        elif module in embedders:
            renamed |= {
                f"transformer_blocks.{i}.norm1.emb.{embedders[module]}.{kind}": value
                for i in blocks
            }
        elif module.startswith("blocks."):
            _, i, part = module.split(".", 2)
            if part == "attn.qkv":
                for letter, third in zip("qkv", value.chunk(3), strict=True):
                    renamed[f"transformer_blocks.{i}.attn1.to_{letter}.{kind}"] = third
            else:
                renamed[f"transformer_blocks.{i}.{inner[part]}.{kind}"] = value
    return renamed
