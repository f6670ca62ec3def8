"""Small models of every class that the library knows, with no weight of zero, and tables for them."""

from dataclasses import replace
from pipes import pixart_transformer, randomised, stock_dit

import torch
from conftest import SMALL, make, redrawn, seeded

from harmonica import Schedule
from harmonica.models import BUNDLED, DITS, PIXART, load, pixart
from harmonica.models import __dict__ as models
from harmonica.models.pixart import PixArtDenoiser, Variant, random_prompts
from harmonica.models.uvit import UViT, UViTDenoiser
from harmonica.samplers import DDIM
from harmonica.table import outputs_before

SMALL_DIT = {"input_size": 8, "patch_size": 2, "hidden_size": 16, "depth": 2, "num_heads": 2}
SMALL_PIXART = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2}
SMALL_PIXART |= {"cross_attention_dim": 24, "caption_channels": 12}
SMALL_UVIT = SMALL_DIT | {"in_channels": 4, "num_classes": 5}


def shrink(monkeypatch):
    """Shrink every model of `load` but the bundled one; class, loading and everything else stay."""
    for name in DITS:
        if name not in BUNDLED:
            monkeypatch.setitem(DITS, name, SMALL_DIT)
    for name, variant in PIXART.items():
        small = Variant(8, 6, variant.micro_conditions, variant.transformer, variant.rest)
        monkeypatch.setitem(PIXART, name, small)
    monkeypatch.setattr(pixart, "XL", SMALL_PIXART)
    monkeypatch.setitem(models, "UVIT_H", SMALL_UVIT)


def loaded(name: str, sampler: str | None = None, steps: int = 4, **more):
    """Load a model that the fixture `small_models` shrinks."""
    weights = None if name in BUNDLED else "random"
    d = load(name, sampler=sampler, steps=steps, weights=weights, **more)
    if name not in BUNDLED:
        randomised(d.model)  # DiT starts with gates of zero, under which no site matters
    return d


def uvit_model(*, dtype=torch.float64, depth=2, seed=0):
    return redrawn(UViT(**SMALL, depth=depth), seed).to(dtype)


def make_uvit(steps=4, *, guidance=1.4, **options):
    return UViTDenoiser(uvit_model(**options), DDIM(steps), guidance=guidance, name="small")


PROMPTS = random_prompts(["a", "b"], 6, 12)
MADE = {"dit": make, "stock": stock_dit, "uvit": make_uvit}
MADE["pixart"] = lambda steps=4: PixArtDenoiser(pixart_transformer(), DDIM(steps), PROMPTS)
"""A denoiser for each kind of block that is known."""


def in_double(d):
    d.model.double()
    if isinstance(d, PixArtDenoiser):
        d.prompts = d.prompts.to(torch.zeros(0, dtype=torch.float64))
    return d


def random_table(d, share=0.5, seed=0):
    rows = torch.rand(d.steps, len(d.sites), generator=seeded(seed)) > share
    rows[0] = True
    return Schedule(rows, sites=tuple(d.sites))


def weigh(table, past, seed=0):
    """Return a schedule with random weights wherever its table allows them."""
    weights = torch.randn(*table.compute.shape, 1 + past, generator=seeded(seed))
    weights *= torch.arange(1 + past) <= outputs_before(table.compute)[:, :, None]
    weights[:, :, 0] *= table.compute
    return replace(table, weights=weights)
