"""Weights: from a folder of diffusers or a file of the original, into a model.

    original file     DiT-XL-2-256x256.pt, imagenet256_uvit_huge.pth    the original's names
    diffusers folder  a pipeline (model_index.json) or its transformer  diffusers' names

`load` fetches what is on the hub, and draws random weights. Reading a file executes nothing that is
in it. This file does not know samplers, caches or routers.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from harmonica.storage import files
from harmonica.values import StrPath, require


def component(folder: StrPath, name: str, *classes: str) -> Path:
    """Return the folder of a part of a pipeline, such as transformer, or the folder itself if it is
    that part.

    Raises FileNotFoundError if neither is there, ValueError if it was not saved from one of these
    classes of diffusers; none named stands for any.
    """
    for place in (Path(folder) / name, Path(folder)):
        if (place / "config.json").is_file():
            kind = files.read_json(place / "config.json").get("_class_name")
            if classes and kind not in classes:
                raise ValueError(f"{place} holds a {kind!s:.80}; a {classes[0]} was expected")
            return place
    saved = "expected a folder saved by diffusers"
    raise FileNotFoundError(f"{folder} has no {name}/config.json; {saved}")


def from_diffusers(
    kind: Any, folder: StrPath, latent_size: int | None = None, dtype: torch.dtype | None = None
) -> Any:
    """Read a model of a class of diffusers from the folder that one was saved to, all of it.

    Raises ValueError, naming the folder, if it is damaged, lacks a parameter (diffusers would draw
    it and go on), has one that is not finite, or is for a latent of another size.
    """
    with files.decoding(folder, f"cannot be read as a {kind.__name__} saved by diffusers"):
        model, told = kind.from_pretrained(folder, output_loading_info=True, torch_dtype=dtype)
    lacks = sorted(told["missing_keys"])
    first = f"{len(lacks)} parameters, the first of them {lacks[:1]}"
    require(not lacks, f"{folder} lacks {first}; the file is damaged, or of another model")
    _must_be_finite(model, folder)
    size = latent_size if latent_size is None else model.config.sample_size
    require(size == latent_size, f"{folder} is for a latent of size {size}, not {latent_size}")
    return model


def read_state(path: StrPath) -> dict[str, Tensor]:
    """Read parameters by name from a .safetensors, .pt or .pth file, executing nothing in it.

    Raises FileNotFoundError if there is no such file, ValueError if it holds no tensors by name.
    """
    if files.existing(path).suffix == ".safetensors":
        from safetensors.torch import load_file

        with files.decoding(path, "is not a safetensors file"):
            return load_file(path)
    data = files.read_pickle(path)
    if isinstance(data, dict):
        data = data.get("ema", data)  # a training checkpoint keeps an averaged copy
    entries = data.items() if isinstance(data, dict) else [(None, None)]
    plain = all(isinstance(name, str) and files.is_plain(value) for name, value in entries)
    require(plain, f"{path} does not hold tensors by parameter name")
    return data  # type: ignore[no-any-return]


def fill(model: nn.Module, state: dict[str, Tensor], path: StrPath) -> None:
    """Give a model all of its parameters, which must be finite; raise ValueError otherwise."""
    with files.decoding(path, "does not fit the model"):
        model.load_state_dict(state, strict=True, assign=True)
    _must_be_finite(model, path)


def _must_be_finite(model: nn.Module, path: StrPath) -> None:
    for name, value in model.state_dict().items():
        message = f"{path} has a value in {name} that is not finite; the file is damaged"
        require(bool(value.isfinite().all()), message)


# The original DiT's modules and diffusers': outside of the blocks, in a block, in each block's own
# copy of the embedders.
_OUTSIDE = {"x_embedder.proj": "pos_embed.proj", "final_layer.linear": "proj_out_2"}
_OUTSIDE |= {"final_layer.adaLN_modulation.1": "proj_out_1"}
_INSIDE = {"adaLN_modulation.1": "norm1.linear", "attn.proj": "attn1.to_out.0"}
_INSIDE |= {"mlp.fc1": "ff.net.0.proj", "mlp.fc2": "ff.net.2"}
_EMBEDDERS = {f"t_embedder.mlp.{2 * i}": f"timestep_embedder.linear_{1 + i}" for i in (0, 1)}
_EMBEDDERS |= {"y_embedder.embedding_table": "class_embedder.embedding_table"}


def _dit_names(state: dict[str, Tensor], list_of_blocks: str) -> dict[str, list[str]]:
    """Return what diffusers calls each parameter of the original: one name, that of each block's
    copy, or of the three parts of `qkv`; `state` tells how many blocks there are.
    """
    depth = len({key.split(".")[1] for key in state if key.startswith(f"{list_of_blocks}.")})
    blocks = [f"transformer_blocks.{i}" for i in range(depth)]
    names = {ours: [theirs] for ours, theirs in _OUTSIDE.items()}
    for ours, theirs in _EMBEDDERS.items():
        names[ours] = [f"{block}.norm1.emb.{theirs}" for block in blocks]
    for i, block in enumerate(blocks):
        names |= {f"blocks.{i}.{ours}": [f"{block}.{theirs}"] for ours, theirs in _INSIDE.items()}
        names[f"blocks.{i}.attn.qkv"] = [f"{block}.attn1.to_{part}" for part in "qkv"]
    kinds = ("weight", "bias")
    return {f"{a}.{kind}": [f"{b}.{kind}" for b in names[a]] for a in names for kind in kinds}


def dit_from_diffusers(state: dict[str, Tensor], positions: Tensor) -> dict[str, Tensor]:
    """Rename the parameters of diffusers' DiT to the original's, and add the positions (1, L, D),
    which diffusers computes anew; what is missing stays missing.

    Raises ValueError if the blocks' copies of the embedders differ, as in a fine-tuned model: the
    original has one for all of them.
    """
    renamed = {"pos_embed": positions}
    for ours, theirs in _dit_names(state, "transformer_blocks").items():
        parts = [state[name] for name in theirs if name in state]
        if len(parts) == len(theirs):
            renamed[ours] = torch.cat(parts) if ".qkv." in ours else parts[0]
            for name, part in zip(theirs, parts, strict=True) if ".qkv." not in ours else ():
                same, use = torch.equal(parts[0], part), "use the pipeline itself, from_pipeline"
                require(same, f"{name} differs from block 0's; {use}(pipe, …)")
    return renamed


def dit_to_diffusers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Undo `dit_from_diffusers`: rename the parameters to diffusers' names; leave positions out."""
    renamed: dict[str, Tensor] = {}
    for ours, theirs in _dit_names(state, "blocks").items():
        if ours in state:
            value = state[ours]
            parts = value.chunk(3) if ".qkv." in ours else [value] * len(theirs)
            renamed |= zip(theirs, parts, strict=True)
    return renamed
