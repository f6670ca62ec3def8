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

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from harmonica.memory import check_device
from harmonica.models import pixart
from harmonica.models.dit import DiT, DiTDenoiser, sincos_positions
from harmonica.models.guided import Guided
from harmonica.models.pixart import PIXART, PixArtDenoiser, Prompts
from harmonica.models.prompts import read_prompts
from harmonica.models.uvit import UVIT_H, UViT, UViTDenoiser
from harmonica.models.weights import component, dit_from_diffusers, fill, from_diffusers, read_state
from harmonica.run_again import run_again
from harmonica.samplers import Betas, make_sampler
from harmonica.storage.files import FLOATS
from harmonica.storage.hub import download
from harmonica.values import StrPath, number, require

_SMALL = {"in_channels": 1, "num_classes": 10, "num_heads": 4, "depth": 8, "learn_sigma": False}
_XL = {"depth": 28, "hidden_size": 1152, "num_heads": 16, "patch_size": 2}
DITS: dict[str, dict[str, Any]] = {
    "tiny": {**_SMALL, "input_size": 8, "patch_size": 2, "hidden_size": 64},
    "garments": {**_SMALL, "input_size": 28, "patch_size": 4, "hidden_size": 96},
    "dit-xl": {**_XL, "input_size": 32},
    "dit-xl-256": {**_XL, "input_size": 32},
    "dit-xl-512": {**_XL, "input_size": 64},
}
"""Arguments of `DiT` by model name."""

BUNDLED = {name: Path(__file__).with_name(f"{name}.safetensors") for name in ("tiny", "garments")}
"""Files of the weights that come with the package, by model name; they draw pixels, no latents."""

MODELS = (*DITS, *PIXART, "uvit-h")
"""The names that `load` knows."""

_OWN = {"pixart": ("dpm-solver++", 4.5), "uvit": ("dpm-solver++", 1.4)}  # others: ddim, 1.5
OR_RANDOM = 'or weights="random" to time it'
UVIT_FILE = "imagenet256_uvit_huge.pth"

__all__ = ["BUNDLED", "DITS", "MODELS", "PIXART", "PixArtDenoiser", "load"]


@torch.inference_mode(False)  # or weights loaded there could not be trained with
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
        weights: "random" for timing, from torch's generator; None for the package's own or the
            hub's (U-ViT has none there); a folder saved by diffusers (DiT, PixArt); a .pt, .pth or
            .safetensors file in the original's parameter names (DiT, U-ViT).
        prompts: for PixArt, a file with one prompt a line, or the prompts; None for a bundled list.
        dtype: of the weights. With float16 or bfloat16 weights x is still kept in float32.
        device: where everything lives.
        activation_checkpointing: in training, run blocks again in backward instead of keeping what
            they computed: less memory, more time, the same gradients.

    >>> load("tiny", steps=10).steps
    10
    """
    require(name in MODELS, f"model is {name!r}; this version has {', '.join(MODELS)}")
    own_sampler, own_guidance = _OWN.get(name.split("-")[0], ("ddim", 1.5))
    betas: Betas = "scaled-linear" if name == "uvit-h" else "linear"
    walk = make_sampler(sampler or own_sampler, steps, betas)
    require(prompts is None or name in PIXART, f"{name} takes no prompts; it draws classes")
    require(dtype in FLOATS, f"dtype is {dtype}; weights can be {FLOATS}")
    scale = number("guidance", own_guidance if guidance is None else guidance, 1)
    check_device(device)  # all of this before a weight is read
    if name in PIXART:
        model, encoded = _pixart(name, weights, read_prompts(prompts), dtype, device)
        if activation_checkpointing:
            model.enable_gradient_checkpointing(run_again)
        return PixArtDenoiser(model, walk, encoded, guidance=scale, name=name)
    model = _of_classes(name, weights, device).to(device=device, dtype=dtype)
    model.activation_checkpointing = activation_checkpointing
    if name == "uvit-h":
        return UViTDenoiser(model, walk, guidance=scale)
    channels = None if name in BUNDLED else 3  # of the latent's 4, as in the original
    name = name.removesuffix("-256")
    return DiTDenoiser(model, walk, guidance=scale, guided_channels=channels, name=name)


def _birthplace(weights: StrPath | None, device: str | torch.device) -> torch.device:
    """Return where weights are drawn, or nowhere if a file replaces them; mps has no float64."""
    place = torch.device(device if weights == "random" else "meta")
    return torch.device("cpu") if place.type == "mps" else place


def _of_classes(name: str, weights: StrPath | None, device: str | torch.device) -> Any:
    """Return a DiT or U-ViT with its weights."""
    with _birthplace(weights, device):
        model = UViT(**UVIT_H) if name == "uvit-h" else DiT(**DITS[name])
    if weights != "random":
        weights = weights or BUNDLED.get(name) or _fetched(name)
        folder = Path(weights).is_dir()
        fill(model, _state_of(weights, name, model) if folder else read_state(weights), weights)
    return model


def _fetched(name: str) -> Path:
    """Return the folder of the weights that the hub has for a DiT."""
    if name == "uvit-h":
        ways = f"pass weights=PATH of the original {UVIT_FILE} (or the same in .safetensors)"
        raise ValueError(f"the weights of {name} are on no hub that we know; {ways}, {OR_RANDOM}")
    size = "DiT-XL-2-512x512" if name == "dit-xl-512" else "DiT-XL-2-256x256"
    ways = f"pass weights=PATH of the original {size}.pt or of a diffusers folder, {OR_RANDOM}"
    return download(f"facebook/{size}", ["transformer/*"], otherwise=ways)


def _state_of(folder: StrPath, name: str, model: Any) -> dict[str, torch.Tensor]:
    """Return the parameters of a DiT that diffusers saved, by the original's names."""
    takes = f"{folder} is a folder; {name} takes the original file, {UVIT_FILE}"
    require(name != "uvit-h", takes)
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

    place = component(folder, "transformer", "DiTTransformer2DModel", "Transformer2DModel")
    theirs = from_diffusers(DiTTransformer2DModel, place, model.input_size)
    positions = sincos_positions(model.pos_embed.shape[2], model.input_size // model.patch_size)
    return dit_from_diffusers(theirs.state_dict(), positions)


def _pixart(
    name: str, weights: StrPath | None, texts: Sequence[str], dtype: torch.dtype,
    device: str | torch.device,
) -> tuple[Any, Prompts]:  # fmt: skip
    """Return diffusers' transformer, and the prompts as its text encoder reads them."""
    from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel

    variant = PIXART[name]
    if weights == "random":
        encoded = pixart.random_prompts(texts, variant.text_tokens, pixart.XL["caption_channels"])
        with _birthplace(weights, device):
            model = pixart.transformer_of(variant)
        # diffusers' own `to` warns of modules that it does not have
        return torch.nn.Module.to(model, device=device, dtype=dtype), encoded
    ways = f"pass weights=FOLDER of a diffusers pipeline, {OR_RANDOM}"
    fetch, given = partial(download, otherwise=ways), None if weights is None else Path(weights)
    text_folder = given or fetch(variant.rest, ["tokenizer/*", "text_encoder/*"])
    folder = given or fetch(variant.transformer, ["transformer/*"])
    folder = component(folder, "transformer", "PixArtTransformer2DModel", "Transformer2DModel")
    encoded = pixart.encode(text_folder, texts, variant.text_tokens, dtype, device)
    model = from_diffusers(PixArtTransformer2DModel, folder, variant.latent_size, dtype)
    return model.to(device), encoded
