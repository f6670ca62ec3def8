"""Models: load(name) gives a `Denoiser`, a frozen model with its sampler and guidance.

    name                  model              on what                            sampler, guidance
    tiny                  DiT, bundled       8×8 digits, no autoencoder         ddim, 1.5
    garments              DiT, bundled       28×28 photographs of clothes       ddim, 1.5
    dit-xl, dit-xl-256    DiT-XL/2           32×32 latent of 256×256 images     ddim, 1.5
    dit-xl-512            DiT-XL/2           64×64 latent                       ddim, 1.5
    pixart-alpha-256      PixArt-α           32×32 latent and a prompt          dpm-solver++, 4.5
    pixart-alpha-512      PixArt-α           64×64 latent                       dpm-solver++, 4.5
    pixart-alpha-1024     PixArt-α           128×128 latent, micro-conditions   dpm-solver++, 4.5
    pixart-sigma-1024     PixArt-Σ           128×128 latent, 300 tokens         dpm-solver++, 4.5
    pixart-sigma-2k       PixArt-Σ           256×256 latent, 300 tokens         dpm-solver++, 4.5
    uvit-h                U-ViT-H/2          32×32 latent of 256×256 images     dpm-solver++, 1.4

Each takes each of the four samplers. A stock diffusers pipeline that is already in memory becomes a
denoiser with `pipelines.from_pipeline`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from harmonica.models import pixart
from harmonica.models.dit import DiT, DiTDenoiser, sincos_positions
from harmonica.models.guided import Guided, check_guidance
from harmonica.models.pixart import PIXART, PixArtDenoiser
from harmonica.models.prompts import read_prompts
from harmonica.models.uvit import UVIT_H, UViT, UViTDenoiser
from harmonica.models.weights import component, dit_from_diffusers, fill, from_diffusers, read_state
from harmonica.run_again import run_again
from harmonica.samplers import Betas, Sampler, make_sampler
from harmonica.storage.files import StrPath
from harmonica.storage.hub import download
from harmonica.table import require

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

DTYPES = torch.float32, torch.bfloat16, torch.float16, torch.float64

__all__ = ["BUNDLED", "DITS", "MODELS", "PIXART", "PixArtDenoiser", "load"]


def load(
    name: str = "tiny", *, sampler: str | None = None, steps: int = 20,
    guidance: float | None = None, weights: StrPath | None = None,
    prompts: StrPath | Sequence[str] | None = None, dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu", activation_checkpointing: bool = False,
) -> Guided:  # fmt: skip
    """Return a frozen model with its sampler and guidance.

    Raises ValueError if a name, a number or the weights do not fit, or the weights cannot be had,
    FileNotFoundError if there is no such file.

    Args:
        name: one of MODELS.
        sampler: "ddim", "dpm-solver++", "iddpm" or "sa-solver"; None for the model's own (table).
        steps: T, predictions in one walk.
        guidance: classifier-free guidance scale; 1 switches it off; None for the model's own.
        weights: "random" for timing, drawn on the device from torch's generator; None for the
            package's own or the repository on the hub, which U-ViT has none of; PATH of a folder
            saved by diffusers, of DiT or PixArt; PATH of a .pt, .pth or .safetensors file in the
            original's parameter names, of DiT or U-ViT.
        prompts: for PixArt, what images to train on: a file with one prompt a line, or the prompts;
            None for a bundled list.
        dtype: of the weights. With float16 or bfloat16 weights x is still kept in float32.
        device: where everything lives.
        activation_checkpointing: in training, run blocks again instead of keeping what they
            computed: less memory, more time, the same gradients.

    >>> load("tiny", steps=10).steps
    10
    """
    require(name in MODELS, f"model is {name!r}; this version has {', '.join(MODELS)}")
    own_sampler, own_guidance, build = _FAMILIES.get(name.split("-")[0], _DIT)
    betas: Betas = "scaled-linear" if name == "uvit-h" else "linear"
    walk = make_sampler(sampler or own_sampler, steps, betas)
    no_prompts = prompts is None or name in PIXART
    require(no_prompts, f"{name} takes no prompts; it draws classes")
    choices = ", ".join(map(str, DTYPES))
    require(dtype in DTYPES, f"dtype is {dtype}; weights can be {choices}")
    scale = own_guidance if guidance is None else guidance
    check_guidance(scale)  # before anything is read
    return build(_How(name, walk, scale, weights, prompts, dtype, device, activation_checkpointing))


class _How(NamedTuple):
    """What `load` was given, and what it chose where nothing was given."""

    name: str
    sampler: Sampler
    guidance: float
    weights: StrPath | None
    prompts: StrPath | Sequence[str] | None
    dtype: torch.dtype
    device: str | torch.device
    activation_checkpointing: bool

    @property
    def birthplace(self) -> torch.device:
        """Where random weights are drawn, or nowhere if a file replaces them. Positions are made in
        float64, which mps does not have.
        """
        device = torch.device(self.device if self.weights == "random" else "meta")
        return torch.device("cpu") if device.type == "mps" else device


def _filled(model: Any, how: _How, read: Callable[[], dict[str, torch.Tensor]]) -> Any:
    """Return a new model with its weights, drawn or `read`, where they shall live."""
    if how.weights != "random":
        fill(model, read(), str(how.weights))
    model.activation_checkpointing = how.activation_checkpointing
    return model.to(device=how.device, dtype=how.dtype)


def _dit(how: _How) -> DiTDenoiser:
    name, weights = how.name, how.weights
    pixels = name.removeprefix("dit-xl").removeprefix("-") or "256"
    if weights is None and name in BUNDLED:
        weights = BUNDLED[name]
    elif weights is None:
        file = f"DiT-XL-2-{pixels}x{pixels}.pt"
        ways = f"pass weights=PATH of the original {file} or of a diffusers folder, {OR_RANDOM}"
        weights = download(f"facebook/DiT-XL-2-{pixels}", ["transformer/*"], otherwise=ways)
    how = how._replace(weights=weights)
    with how.birthplace:
        model = DiT(**DITS[name])
    read = _diffusers_dit if Path(weights).is_dir() else lambda file, _: read_state(file)
    _filled(model, how, lambda: read(weights, model))
    guided = None if name in BUNDLED else 3  # the original guides 3 of its 4 latent channels
    name, guidance = name.removesuffix("-256"), how.guidance
    return DiTDenoiser(model, how.sampler, guidance=guidance, guided_channels=guided, name=name)


def _diffusers_dit(folder: StrPath, model: DiT) -> dict[str, torch.Tensor]:
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

    place = component(folder, "transformer", "DiTTransformer2DModel", "Transformer2DModel")
    theirs = from_diffusers(DiTTransformer2DModel, place)
    size, own = theirs.config.sample_size, model.input_size
    # Positions are made anew, so the shapes alone would fit.
    require(size == own, f"{folder} is for a latent of {size} × {size}; this model has {own}")
    positions = sincos_positions(model.pos_embed.shape[2], own // model.patch_size)
    return dit_from_diffusers(theirs.state_dict(), positions)


def _pixart(how: _How) -> PixArtDenoiser:
    variant, texts = PIXART[how.name], read_prompts(how.prompts)
    if how.weights == "random":
        encoded = pixart.random_prompts(texts, variant.text_tokens, pixart.XL["caption_channels"])
        with how.birthplace:
            transformer = pixart.transformer_of(variant)
        # diffusers' own `to` warns of modules that it does not have
        torch.nn.Module.to(transformer, how.dtype)
    else:
        ways = f"pass weights=FOLDER of a diffusers pipeline, {OR_RANDOM}"
        fetch = partial(download, otherwise=ways)
        given = None if how.weights is None else Path(how.weights)
        text_folder = given or fetch(variant.rest, ["tokenizer/*", "text_encoder/*"])
        folder = given or fetch(variant.transformer, ["transformer/*"])
        folder = component(folder, "transformer", "PixArtTransformer2DModel", "Transformer2DModel")
        encoded = pixart.encode(text_folder, texts, variant.text_tokens, how.dtype, how.device)
        transformer = pixart.read_transformer(folder, variant, how.name, how.dtype)
    transformer.to(how.device)
    if how.activation_checkpointing:
        transformer.enable_gradient_checkpointing(run_again)
    guidance, name = how.guidance, how.name
    return PixArtDenoiser(transformer, how.sampler, encoded, guidance=guidance, name=name)


def _uvit(how: _How) -> UViTDenoiser:
    name, weights, file = how.name, how.weights, "imagenet256_uvit_huge.pth"
    if weights is None:
        ways = (
            f"pass weights=PATH of the original {file} (or the same in .safetensors), {OR_RANDOM}"
        )
        raise ValueError(f"the weights of {name} are on no hub that we know; {ways}")
    takes = f"{weights} is a folder; {name} takes the original file, {file}"
    require(not Path(weights).is_dir(), takes)
    with how.birthplace:
        model = UViT(**UVIT_H)
    _filled(model, how, lambda: read_state(weights))
    return UViTDenoiser(model, how.sampler, guidance=how.guidance)


OR_RANDOM = 'or weights="random" to time it'

_Family = tuple[str, float, Callable[[_How], Guided]]
"""Default sampler, default guidance and builder."""

_FAMILIES: dict[str, _Family] = {"pixart": ("dpm-solver++", 4.5, _pixart)}
_FAMILIES["uvit"] = "dpm-solver++", 1.4, _uvit
_DIT: _Family = "ddim", 1.5, _dit
