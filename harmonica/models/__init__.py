"""Models: load(name) gives a `Denoiser`, a frozen model with its sampler and guidance.

    tiny                   bundled: 8 blocks, 0.6 M parameters, real 8×8 digits, no autoencoder
    dit-xl, dit-xl-256     DiT-XL/2 on the 32×32 latent of 256×256 images
    dit-xl-512             DiT-XL/2 on the 64×64 latent of 512×512 images

Weights of the large ones are given as a file of the original (`DiT-XL-2-256x256.pt`), or "random" for timing.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harmonica.files import StrPath, existing, read_tensors
from harmonica.models.dit import SIZES, DiT, DiTDenoiser
from harmonica.models.tiny import TINY
from harmonica.samplers import make_sampler

_XL = {"depth": 28, "hidden_size": 1152, "num_heads": 16, "patch_size": 2}
MODELS: dict[str, dict[str, Any]] = {
    "tiny": TINY,
    "dit-xl": {**_XL, "input_size": 32},
    "dit-xl-256": {**_XL, "input_size": 32},
    "dit-xl-512": {**_XL, "input_size": 64},
}
"""Arguments of `DiT` by model name."""

_ORIGINAL_FILES = {"dit-xl": "DiT-XL-2-256x256.pt", "dit-xl-256": "DiT-XL-2-256x256.pt"}
_ORIGINAL_FILES["dit-xl-512"] = "DiT-XL-2-512x512.pt"

__all__ = ["MODELS", "SIZES", "DiT", "DiTDenoiser", "load"]


def load(
    name: str = "tiny",
    *,
    sampler: str = "ddim",
    steps: int = 20,
    guidance: float = 1.5,
    weights: StrPath | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> DiTDenoiser:
    """Return a frozen model with its sampler and guidance, ready to walk, to train a router for, or to count.

    Args:
        name: one of MODELS.
        sampler: "ddim".
        steps: T, predictions in one walk.
        guidance: classifier-free guidance scale; 1 switches it off.
        weights: a .pt or .safetensors file in the original parameter names; "random" for timing; None for the bundled
            weights, which only `tiny` has.
        dtype: of the weights and of x.
        device: where they live.

    Raises:
        ValueError: if a name, a number or the weights do not fit.
        FileNotFoundError: if there is no such file.

    >>> load("tiny", steps=10).steps
    10
    """
    if name not in MODELS:
        raise ValueError(f"model is {name!r}; this version has {', '.join(MODELS)}")
    if weights is None:
        if name in _ORIGINAL_FILES:
            raise ValueError(
                f"the weights of {name} are not bundled; pass weights=PATH of the original {_ORIGINAL_FILES[name]}, "
                'or weights="random" to time it'
            )
        weights = Path(__file__).with_name("tiny.safetensors")
    drawn = make_sampler(sampler, steps)
    with torch.device("cpu" if weights == "random" else "meta"):  # nothing is initialised that a file will replace
        model = DiT(**MODELS[name])
    if weights != "random":
        _fill(model, _state_dict(weights), weights)
    guided = 3 if name != "tiny" else None  # the original guides 3 of its 4 latent channels
    frozen = model.to(device=device, dtype=dtype)
    return DiTDenoiser(frozen, drawn, guidance=guidance, guided_channels=guided, name=name.removesuffix("-256"))


def _state_dict(path: StrPath) -> dict[str, Tensor]:
    """Read parameters by name, executing nothing that the file says."""
    if existing(path).suffix == ".safetensors":
        return read_tensors(path)[0]
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} is not a checkpoint of weights alone: {why}") from None
    data = data.get("ema", data) if isinstance(data, dict) else data  # a training checkpoint keeps an averaged copy
    if not isinstance(data, dict) or not all(isinstance(value, Tensor) for value in data.values()):
        raise ValueError(f"{path} does not hold tensors by parameter name")
    return data


def _fill(model: DiT, state: dict[str, Tensor], path: StrPath) -> None:
    try:
        model.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:3]]
        raise ValueError(f"{path} does not fit the model: {' '.join(lines)}") from None
    for name, value in model.state_dict().items():
        if not bool(value.isfinite().all()):
            raise ValueError(f"{path} has a value in {name} that is not finite; the file is damaged")
