"""PixArt-α and PixArt-Σ: text-conditioned diffusion transformers, run as diffusers' pipelines run
them.

A block has three sites: self-attention `attn1`, cross-attention to the prompt `attn2`, feed-forward
`ff`. The transformer is diffusers' own class; the prompts are encoded once, before the walk, and
the 4.7 billion parameters of T5 are let go. A condition of a walk is then the number of a prompt,
as a class label is for DiT. This file does not know caches.

    B batch   P prompts   L text tokens (120 for α, 300 for Σ)   D_text 4096   C, H, W latent
"""

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harmonica.models.guided import Guided, check_inputs
from harmonica.models.sites import sites
from harmonica.samplers import Sampler
from harmonica.storage.files import decoding


@dataclass(frozen=True)
class Variant:
    """One of the released PixArt models."""

    latent_size: int  # H = W of the latent, an eighth of the image's
    text_tokens: int  # L
    micro_conditions: bool  # the model is told the image's size and aspect ratio
    transformer: str  # hub repository of the transformer
    rest: str  # hub repository of tokenizer, text encoder and autoencoder


_ALPHA = "PixArt-alpha/PixArt-XL-2-1024-MS"
_SIGMA = "PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers"
PIXART: dict[str, Variant] = {
    "pixart-alpha-256": Variant(32, 120, False, "PixArt-alpha/PixArt-XL-2-256x256", _ALPHA),
    "pixart-alpha-512": Variant(64, 120, False, "PixArt-alpha/PixArt-XL-2-512x512", _ALPHA),
    "pixart-alpha-1024": Variant(128, 120, True, _ALPHA, _ALPHA),
    "pixart-sigma-1024": Variant(128, 300, False, "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS", _SIGMA),
    "pixart-sigma-2k": Variant(256, 300, False, "PixArt-alpha/PixArt-Sigma-XL-2-2K-MS", _SIGMA),
}
"""The five models of the paper by name; all have 28 blocks of width 1152."""

XL: dict[str, int] = {"num_attention_heads": 16, "attention_head_dim": 72, "num_layers": 28}
XL |= {"cross_attention_dim": 1152, "caption_channels": 4096}
"""Arguments of `PixArtTransformer2DModel` that all variants share."""


def transformer_of(variant: Variant) -> Any:
    """Return diffusers' transformer of this variant with new weights, on torch's current device."""
    from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel

    size, micro = variant.latent_size, variant.micro_conditions
    return PixArtTransformer2DModel(**XL, sample_size=size, use_additional_conditions=micro)


@dataclass(frozen=True)
class Prompts:
    """What a text encoder says of P prompts; the last row is of the empty one, guidance's null."""

    texts: tuple[str, ...]  # P
    embeds: Tensor  # (P + 1, L, D_text)
    mask: Tensor  # (P + 1, L), 1 where a token is a word, 0 where it is padding

    def to(self, like: Tensor) -> "Prompts":
        """Return the same prompts on the device and in the dtype of `like`."""
        return Prompts(self.texts, self.embeds.to(like), self.mask.to(like.device))


def random_prompts(texts: Sequence[str], tokens: int, width: int = 4096) -> Prompts:
    """Return drawn embeddings (P + 1, L, width) for timing: no text encoder has read the texts."""
    generator = torch.Generator().manual_seed(0)
    embeds = torch.randn(len(texts) + 1, tokens, width, generator=generator)
    words = torch.randint(1, tokens + 1, (len(texts) + 1, 1), generator=generator)
    return Prompts(tuple(texts), embeds, (torch.arange(tokens) < words).long())


@torch.no_grad()
def encode(
    folder: Path, texts: Sequence[str], tokens: int, dtype: torch.dtype, device: str | torch.device
) -> Prompts:
    """Encode P prompts of at most L tokens with the T5 of a diffusers folder, and let it go.

    T5 runs in `dtype` on `device`; the embeddings come back to the CPU. Raises FileNotFoundError if
    the folder lacks a part, ValueError if a package that reads T5 is missing.
    """
    for file in ("text_encoder/config.json", "tokenizer/tokenizer_config.json"):
        if not (folder / file).is_file():
            whole = "expected the folder of a whole diffusers pipeline"
            raise FileNotFoundError(f"{folder} has no {file}; {whole}")
    try:
        for package in ("sentencepiece", "google.protobuf", "transformers"):
            import_module(package)
    except ModuleNotFoundError as error:
        extra = "pip install 'harmonica-dit[pixart]' brings it"
        raise ValueError(f"reading T5 takes {error.name}; {extra}") from None
    from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import PixArtAlphaPipeline
    from transformers import AutoTokenizer, T5EncoderModel

    with decoding(folder, "has no tokenizer and text encoder that can be read"):
        encoder = T5EncoderModel.from_pretrained(folder / "text_encoder", dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    encoder = encoder.to(device)
    pipe = PixArtAlphaPipeline(tokenizer, encoder, vae=None, transformer=None, scheduler=None)
    how, parts = {"device": encoder.device, "max_sequence_length": tokens}, []
    for start in range(0, len(texts), 8):
        encoded = pipe.encode_prompt(list(texts[start : start + 8]), **how)
        parts.append([tensor.cpu() for tensor in encoded])  # embeds, mask, null embeds, null mask
    del pipe, encoder, encoded
    gc.collect()  # T5 takes more memory than what follows; it leaves before that is loaded
    null = [tensor[:1] for tensor in parts[0][2:]]
    embeds, mask = (torch.cat(group) for group in zip(*(p[:2] for p in parts), null, strict=True))
    return Prompts(tuple(texts), embeds, mask)


class PixArtDenoiser(Guided):
    """A frozen PixArt with encoded prompts; a condition is the number of one of them.

    Guidance runs one batch [null, conditional] of 2B and mixes all latent channels, as diffusers'
    pipelines do. `transformer` is diffusers' `PixArtTransformer2DModel`; the other arguments are
    described at `Guided`.
    """

    def __init__(
        self, transformer: Any, sampler: Sampler, prompts: Prompts, *, guidance: float = 4.5,
        name: str = "pixart",
    ) -> None:  # fmt: skip
        config = transformer.config
        shape, count = (config.in_channels, *2 * [config.sample_size]), len(prompts.texts)
        super().__init__(transformer, sampler, guidance, name, sites(transformer), shape, count)
        self.prompts = prompts.to(next(transformer.parameters()))

    def predict(self, x: Tensor, k: int, cond: Tensor) -> Tensor:
        """Return the guided noise at step k for x (B, C, H, W) and numbers of prompts (B,), and the
        conditional variance if the sampler reads one: (B, C or 2C, H, W).
        """
        shape = self.shape[0], *x.shape[2:]  # of any size
        check_inputs(x, cond, shape, self.conditions)
        if self.guidance == 1.0:
            guided = conditional = self._run(x, k, cond)  # (B, 2C, H, W)
        else:
            numbers = torch.cat([torch.full_like(cond, self.conditions), cond])  # (2B,)
            unconditional, conditional = self._run(torch.cat([x, x]), k, numbers).chunk(2)
            guided = self.mix(conditional, unconditional)  # (B, 2C, H, W)
        channels = x.shape[1]
        if not self.sampler.learns_variance:
            return guided[:, :channels]
        return torch.cat([guided[:, :channels], conditional[:, channels:]], 1)

    def _run(self, x: Tensor, k: int, numbers: Tensor) -> Tensor:
        text, mask = self.prompts.embeds[numbers], self.prompts.mask[numbers]  # (B, L, D_text)
        size: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if self.model.use_additional_conditions:  # in pixels, eight for each latent place
            height, width = 8 * x.shape[2], 8 * x.shape[3]
            # Filled in where they are needed: a list would be copied to the device, and waited for.
            full = [text.new_full((len(x), 1), each) for each in (height, width, height / width)]
            size = {"resolution": torch.cat(full[:2], dim=1), "aspect_ratio": full[2]}
        out: Tensor = self.model(
            x.to(text.dtype), encoder_hidden_states=text, encoder_attention_mask=mask,
            timestep=self.clock(x, k), added_cond_kwargs=size, return_dict=False,
        )[0]  # fmt: skip
        return out.to(x.dtype)
