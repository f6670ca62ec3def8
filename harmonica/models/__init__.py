"""Models: load(name) gives a `Denoiser`, a frozen model with its sampler and guidance.

    name                  model              on what                            default sampler
    tiny                  DiT, bundled       8×8 digits, no autoencoder         ddim, T = 20, guidance 1.5
    garments              DiT, bundled       28×28 photographs of clothes       ddim, T = 20, guidance 1.5
    dit-xl, dit-xl-256    DiT-XL/2           32×32 latent of 256×256 images     ddim, T = 20, guidance 1.5
    dit-xl-512            DiT-XL/2           64×64 latent                       ddim, T = 20, guidance 1.5
    pixart-alpha-256      PixArt-α           32×32 latent and a prompt          dpm-solver++, T = 20, guidance 4.5
    pixart-alpha-512      PixArt-α           64×64 latent                       dpm-solver++, T = 20, guidance 4.5
    pixart-alpha-1024     PixArt-α           128×128 latent, micro-conditions   dpm-solver++, T = 20, guidance 4.5
    pixart-sigma-1024     PixArt-Σ           128×128 latent, 300 tokens         dpm-solver++, T = 20, guidance 4.5
    pixart-sigma-2k       PixArt-Σ           256×256 latent, 300 tokens         dpm-solver++, T = 20, guidance 4.5
    uvit-h                U-ViT-H/2          32×32 latent of 256×256 images     dpm-solver++, T = 20, guidance 1.4

Each takes each of the four samplers. Weights come from the hub, a folder, a file of the original,
or are "random". A stock diffusers pipeline that is already in memory becomes a denoiser with
`pipelines.from_pipeline`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from harmonica.models import pixart
from harmonica.models.dit import DiT, DiTDenoiser, sincos_positions
from harmonica.models.guided import Guided, check_guidance
from harmonica.models.pixart import PIXART, PixArtDenoiser
from harmonica.models.prompts import prompts_from
from harmonica.models.uvit import UVIT_H, UViT, UViTDenoiser
from harmonica.models.weights import component, dit_from_diffusers, fill, from_diffusers, read_state
from harmonica.run_again import run_again
from harmonica.samplers import Betas, Sampler, make_sampler
from harmonica.storage.files import StrPath
from harmonica.storage.hub import download

_BUNDLED = {"in_channels": 1, "num_classes": 10, "num_heads": 4, "depth": 8, "learn_sigma": False}
_XL = {"depth": 28, "hidden_size": 1152, "num_heads": 16, "patch_size": 2}
DITS: dict[str, dict[str, Any]] = {
    "tiny": {**_BUNDLED, "input_size": 8, "patch_size": 2, "hidden_size": 64},
    "garments": {**_BUNDLED, "input_size": 28, "patch_size": 4, "hidden_size": 96},
    "dit-xl": {**_XL, "input_size": 32},
    "dit-xl-256": {**_XL, "input_size": 32},
    "dit-xl-512": {**_XL, "input_size": 64},
}
"""Arguments of `DiT` by model name."""

BUNDLED = {name: Path(__file__).with_name(f"{name}.safetensors") for name in ("tiny", "garments")}
"""Files of the weights that come with the package, by model name; they draw pixels, no latents."""

MODELS = (*DITS, *PIXART, "uvit-h")
"""The names that `load` knows."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Of the weights."""

__all__ = ["BUNDLED", "DITS", "MODELS", "PIXART", "PixArtDenoiser", "load"]


def load(
    name: str = "tiny",
    *,
    sampler: str | None = None,
    steps: int = 20,
    guidance: float | None = None,
    weights: StrPath | None = None,
    prompts: StrPath | Sequence[str] | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    activation_checkpointing: bool = False,
) -> Guided:
    """Return a frozen model with its sampler and guidance.

    Args:
        name: one of MODELS.
        sampler: "ddim", "dpm-solver++", "iddpm" or "sa-solver"; None for the model's own (table
            above).
        steps: T, predictions in one walk.
        guidance: classifier-free guidance scale; 1 switches it off; None for the model's own.
        weights: None for the model's repository on the hub (bundled models have theirs in the package);
            a folder saved by diffusers; a .pt, .pth or .safetensors file in the original parameter
            names; "random" for timing, drawn on the device from torch's generator.
        prompts: for PixArt, what images to train on: a file with one prompt a line, or the prompts;
            None for a bundled list.
        dtype: of the weights; x stays float32 if they are half as wide.
        device: where everything lives.
        activation_checkpointing: in training, run blocks again instead of keeping what they
            computed: less memory, more time, the same gradients.

    Raises ValueError if a name, a number or the weights do not fit, or the weights cannot be had,
    FileNotFoundError if there is no such file.

    >>> load("tiny", steps=10).steps
    10
    """
    if name not in MODELS:
        raise ValueError(f"model is {name!r}; this version has {', '.join(MODELS)}")
    own_sampler, own_guidance, build = _FAMILIES[name.split("-")[0]]
    betas: Betas = "scaled-linear" if name == "uvit-h" else "linear"
    walk = make_sampler(sampler or own_sampler, steps, betas)
    if prompts is not None and name not in PIXART:
        raise ValueError(f"{name} takes no prompts; it draws classes")
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype}; weights can be {', '.join(map(str, DTYPES))}")
    scale = own_guidance if guidance is None else guidance
    check_guidance(scale)
    place = _Place(dtype, device, activation_checkpointing, prompts)
    return build(name, walk, scale, weights, place)


@dataclass(frozen=True)
class _Place:
    """How and where a model lives, and what it is asked to draw."""

    dtype: torch.dtype
    device: str | torch.device
    activation_checkpointing: bool
    prompts: StrPath | Sequence[str] | None


def _birthplace(weights: StrPath | None, place: _Place) -> torch.device:
    """Return where a model is made: where random weights are drawn, or nowhere if a file replaces
    them. Positions are made in float64, which mps does not have.
    """
    device = torch.device(place.device if weights == "random" else "meta")
    return torch.device("cpu") if device.type == "mps" else device


def _open(model: torch.nn.Module) -> None:
    """Draw the parameters that are zero in a new model, such as DiT's gates: no site would matter."""
    for parameter in model.parameters():
        if not parameter.is_meta and not bool(parameter.any()):
            torch.nn.init.normal_(parameter, std=0.03)


def _dit(
    name: str, sampler: Sampler, guidance: float, weights: StrPath | None, place: _Place
) -> DiTDenoiser:
    if weights is None:
        weights = BUNDLED[name] if name in BUNDLED else _dit_from_hub(name)
    with _birthplace(weights, place):
        model = DiT(**DITS[name])
    if weights != "random":
        state = _diffusers_dit(weights, model) if Path(weights).is_dir() else read_state(weights)
        fill(model, state, weights)
    else:
        _open(model)
    model.activation_checkpointing = place.activation_checkpointing
    guided = None if name in BUNDLED else 3  # the original guides 3 of its 4 latent channels
    model.to(device=place.device, dtype=place.dtype)
    return DiTDenoiser(
        model, sampler, guidance=guidance, guided_channels=guided, name=name.removesuffix("-256")
    )


def _dit_from_hub(name: str) -> Path:
    pixels = name.removeprefix("dit-xl").removeprefix("-") or "256"
    file = f"DiT-XL-2-{pixels}x{pixels}.pt"
    ways = f'pass weights=PATH of the original {file} or of a diffusers folder, or weights="random" to time it'
    return download(f"facebook/DiT-XL-2-{pixels}", ["transformer/*"], otherwise=ways)


def _diffusers_dit(folder: StrPath, model: DiT) -> dict[str, torch.Tensor]:
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

    place = component(folder, "transformer", "DiTTransformer2DModel", "Transformer2DModel")
    theirs = from_diffusers(DiTTransformer2DModel, place)
    size = theirs.config.sample_size
    if size != model.input_size:  # positions are made anew, so the shapes alone would fit
        found = f"{folder} is for a latent of {size} × {size}"
        raise ValueError(f"{found}; this model has {model.input_size}")
    positions = sincos_positions(model.pos_embed.shape[2], model.input_size // model.patch_size)
    return dit_from_diffusers(theirs.state_dict(), positions)


def _pixart(
    name: str, sampler: Sampler, guidance: float, weights: StrPath | None, place: _Place
) -> PixArtDenoiser:
    variant, texts = PIXART[name], prompts_from(place.prompts)
    if weights == "random":
        encoded = pixart.random_prompts(texts, variant.text_tokens, pixart.XL["caption_channels"])
        with _birthplace(weights, place):
            transformer = pixart.transformer_of(variant)
        _open(transformer)
        # diffusers' own `to` warns of modules that it does not have
        torch.nn.Module.to(transformer, place.dtype)
    else:
        text_folder = _pixart_folder(variant.rest, ["tokenizer/*", "text_encoder/*"], weights)
        folder = _pixart_folder(variant.transformer, ["transformer/*"], weights)
        folder = component(folder, "transformer", "PixArtTransformer2DModel", "Transformer2DModel")
        encoded = pixart.encode(
            text_folder, texts, variant.text_tokens, dtype=place.dtype, device=place.device
        )
        transformer = pixart.read_transformer(folder, variant, name, place.dtype)
    transformer.to(place.device)
    if place.activation_checkpointing:
        transformer.enable_gradient_checkpointing(run_again)
    return PixArtDenoiser(transformer, sampler, encoded, guidance=guidance, name=name)


def _pixart_folder(repository: str, patterns: list[str], weights: StrPath | None) -> Path:
    if weights is not None:
        return Path(weights)
    ways = 'pass weights=FOLDER of a diffusers pipeline, or weights="random" to time it'
    return download(repository, patterns, otherwise=ways)


def _uvit(
    name: str, sampler: Sampler, guidance: float, weights: StrPath | None, place: _Place
) -> UViTDenoiser:
    if weights is None:
        raise ValueError(
            f"the weights of {name} are on no hub that we know; pass weights=PATH of the original "
            'imagenet256_uvit_huge.pth (or the same in .safetensors), or weights="random" to time it'
        )
    if Path(weights).is_dir():
        raise ValueError(
            f"{weights} is a folder; {name} takes the original file, imagenet256_uvit_huge.pth"
        )
    with _birthplace(weights, place):
        model = UViT(**UVIT_H)
    if weights != "random":
        fill(model, read_state(weights), weights)
    else:
        _open(model)
    model.activation_checkpointing = place.activation_checkpointing
    model.to(device=place.device, dtype=place.dtype)
    return UViTDenoiser(model, sampler, guidance=guidance)


_Build = Callable[[str, Sampler, float, "StrPath | None", _Place], Guided]
_FAMILIES: dict[str, tuple[str, float, _Build]] = {
    "tiny": ("ddim", 1.5, _dit),
    "garments": ("ddim", 1.5, _dit),
    "dit": ("ddim", 1.5, _dit),
    "pixart": ("dpm-solver++", 4.5, _pixart),
    "uvit": ("dpm-solver++", 1.4, _uvit),
}
"""Default sampler, default guidance and builder, by the first word of a model's name."""
