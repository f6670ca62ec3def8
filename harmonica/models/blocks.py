"""Blocks: skip all that a skipped site does not need, not only the site.

`gated` overrides sites, so the norm and the modulation before a skipped site still run.
`gated_blocks` overrides the blocks that it knows, and asks the same gate with all of the branch
inside:

    gated          n = norm(h)·(1 + scale) + shift;  h + gate · ask(i, lambda: site(n))
    gated_blocks   h + gate · ask(i, lambda: site(norm(h)·(1 + scale) + shift))

The same operations in the same order, so the same numbers bit for bit. Known are our DiT's block,
U-ViT's, and diffusers' BasicTransformerBlock with adaLN-zero (DiTPipeline) and adaLN-single
(PixArt). Whatever is unusual about a block or a call, a hook on a norm, a chunked feed-forward,
arguments of an adapter, takes the plain way through `gated`, for this block and this call.

    h tokens (B, L, D)   scale, shift, gate (B, 1, D)   out, what a site returned (B, L, D)

This file does not know schedules, steps or samplers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from harmonica.cache import Compute, Feature, Gate, called_by, gated
from harmonica.calls import of_call
from harmonica.override import Answer, is_overridden, overridden

Ask = Callable[[str, Compute], Feature]
"""(name of a block's site, branch) -> feature; a module that is no site computes."""


class Arithmetic(NamedTuple):
    """modulate(h, scale, shift) = h·(1 + scale) + shift, and add(h, gate, out) = gate·out + h."""

    modulate: Callable[[Tensor, Tensor, Tensor], Tensor]
    add: Callable[[Tensor, Tensor, Tensor], Tensor]


EXACT = Arithmetic(
    lambda h, scale, shift: h * (1 + scale) + shift,
    lambda h, gate, out: gate * out + h,  # in this order: a sum lies in memory as its first part
)
FUSED = Arithmetic(
    lambda h, scale, shift: torch.addcmul(shift, h, 1 + scale),
    lambda h, gate, out: torch.addcmul(h.contiguous(), gate, out),
)
"""A product and a sum in one pass over memory: rounded once, not twice."""


def dit_block(block: Any, ask: Ask, math: Arithmetic, h: Tensor, c: Tensor) -> Tensor:
    """Do what `dit.Block.forward` does."""
    parts = block.adaLN_modulation(c)[:, None].chunk(6, dim=-1)  # 6 × (B, 1, D)
    shift1, scale1, gate1, shift2, scale2, gate2 = parts
    out = ask("attn", lambda: block.attn(math.modulate(block.norm1(h), scale1, shift1)))
    h = math.add(h, gate1, out)
    out = ask("mlp", lambda: block.mlp(math.modulate(block.norm2(h), scale2, shift2)))
    return math.add(h, gate2, out)


def uvit_block(block: Any, ask: Ask, _: Arithmetic, h: Tensor, skip: Tensor | None = None) -> Any:
    """Do what `uvit.Block.forward` does."""
    if block.skip_linear is not None and skip is not None:
        h = block.skip_linear(torch.cat([h, skip], dim=-1))
    h = h + ask("attn", lambda: block.attn(block.norm1(h)))
    return h + ask("mlp", lambda: block.mlp(block.norm2(h)))


def ada_zero_block(
    block: Any, ask: Ask, math: Arithmetic, hidden_states: Tensor, timestep: Tensor,
    class_labels: Tensor, added_cond_kwargs: object = None,
) -> Tensor:  # fmt: skip
    """Do what diffusers' block does with adaLN-zero, which has no cross-attention: DiTPipeline."""
    h, ada = hidden_states, block.norm1
    c = ada.emb(timestep, class_labels, hidden_dtype=h.dtype)  # (B, D)
    parts = ada.linear(ada.silu(c)).chunk(6, dim=1)
    shift1, scale1, gate1, shift2, scale2, gate2 = (part[:, None] for part in parts)  # (B, 1, D)
    out = ask("attn1", lambda: block.attn1(math.modulate(ada.norm(h), scale1, shift1)))
    h = math.add(h, gate1, out)
    out = ask("ff", lambda: block.ff(math.modulate(block.norm3(h), scale2, shift2)))
    return math.add(h, gate2, out)


def ada_single_block(
    block: Any, ask: Ask, math: Arithmetic, hidden_states: Tensor, timestep: Tensor,
    encoder_hidden_states: Tensor | None = None, encoder_attention_mask: Tensor | None = None,
    attention_mask: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Do what diffusers' block does with adaLN-single, one modulation for all blocks: PixArt."""
    h = hidden_states  # (B, L, D)
    shared = block.scale_shift_table[None] + timestep.reshape(len(h), 6, -1)  # (B, 6, D)
    shift1, scale1, gate1, shift2, scale2, gate2 = shared.chunk(6, dim=1)  # (B, 1, D)
    own = partial(block.attn1, encoder_hidden_states=None, attention_mask=attention_mask)
    h = math.add(h, gate1, ask("attn1", lambda: own(math.modulate(block.norm1(h), scale1, shift1))))
    h = ask("attn2", lambda: block.attn2(h, encoder_hidden_states, encoder_attention_mask)) + h
    out = ask("ff", lambda: block.ff(math.modulate(block.norm2(h), scale2, shift2)))
    return math.add(h, gate2, out)


class Form(NamedTuple):
    """How to run blocks of one class with all of a branch inside the gate.

    `run` is called with (block, ask, arithmetic, arguments of the block's forward) and returns what
    that returns. An argument that it does not take must be None or empty.
    """

    kind: str  # name of the class; naming it does not import it
    run: Callable[..., Any]
    site_names: tuple[str, ...]  # of the modules of the block that may be sites
    norms: tuple[str, ...] = ("norm1", "norm2")  # not run where their site is skipped
    fits: Callable[[Any], bool] = lambda block: True  # whether `run` does such a block


def _basic(block: Any, norm_type: str, *, crosses: bool) -> bool:
    plain = block.pos_embed is None and not block.only_cross_attention
    return plain and block.norm_type == norm_type and (block.attn2 is not None) == crosses


def _ada_zero(block: Any) -> bool:
    return _basic(block, "ada_norm_zero", crosses=False) and block.norm1.emb is not None


BASIC = "diffusers.models.attention.BasicTransformerBlock"
FORMS = (
    Form("harmonica.models.dit.Block", dit_block, ("attn", "mlp")),
    Form("harmonica.models.uvit.Block", uvit_block, ("attn", "mlp")),
    Form(BASIC, ada_zero_block, ("attn1", "ff"), ("norm1", "norm1.norm", "norm3"), _ada_zero),
    Form(BASIC, ada_single_block, ("attn1", "attn2", "ff"),
         fits=partial(_basic, norm_type="ada_norm_single", crosses=True)),
)  # fmt: skip


def form_of(block: nn.Module) -> Form | None:
    """Return how to run this block; None if it has to be run as it stands, since its class is not
    known, or something on it would see, or want, what is not called any more.
    """
    kind = f"{type(block).__module__}.{type(block).__qualname__}"
    form = next((form for form in FORMS if form.kind == kind and form.fits(block)), None)
    if form is None:
        return None
    norms = [block.get_submodule(name) for name in form.norms]
    quiet = (*norms, *map(block.get_submodule, form.site_names))
    replaced = any(
        is_overridden(m, "forward") or called_by(m) != "forward" for m in (block, *norms)
    )
    hooked = any(m._forward_hooks or m._forward_pre_hooks for m in quiet)
    return None if replaced or hooked or block.training else form


@cache
def _parameters(function: Callable[..., Any]) -> list[str]:
    return list(signature(function).parameters)


def _arguments(block: nn.Module, form: Form, args: Any, kwargs: Any) -> dict[str, Any] | None:
    """Return the arguments of a call by name, or None if the form does not do such a call."""
    takes, does = _parameters(type(block).forward)[1:], _parameters(form.run)[3:]
    named = dict(zip(takes, args, strict=False)) | kwargs
    h, others = named.get(takes[0]), [named.pop(name) for name in named.keys() - {*does}]
    usual = len(args) <= len(takes) and not (isinstance(h, Tensor) and h.dim() != 3)
    empty = all(it is None or (isinstance(it, dict) and not it) for it in others)
    return named if usual and empty else None


@contextmanager
def gated_blocks(
    model: nn.Module, sites: Mapping[str, nn.Module] | Sequence[nn.Module], gate: Gate, *,
    exact: bool = True,
) -> Iterator[None]:  # fmt: skip
    """Do what `gated(sites, gate)` does, with the norm and the modulation before each site inside
    the gate.

    Args:
        model: whose blocks are looked through; sites in unknown ones are overridden one by one.
        sites: as in `gated`.
        gate: as in `gated`.
        exact: the numbers of `gated` bit for bit; otherwise in fewer passes, and to rounding.
    """
    modules = list(sites.values() if isinstance(sites, Mapping) else sites)
    column = {id(module): site for site, module in enumerate(modules)}
    blocks = [(block, form) for block in model.modules() if (form := form_of(block))]
    inside = {id(block.get_submodule(name)) for block, form in blocks for name in form.site_names}
    rest = [site for site, module in enumerate(modules) if id(module) not in inside]
    math = EXACT if exact else FUSED
    known = ((block, "forward", _answer(block, form, column, gate, math)) for block, form in blocks)
    with gated([modules[site] for site in rest], _renamed(gate, rest)), overridden(known):
        yield


def _renamed(gate: Gate, columns: Sequence[int]) -> Gate:
    return lambda site, compute: gate(of_call(columns[site]), compute)


def _answer(
    block: nn.Module, form: Form, column: Mapping[int, int], gate: Gate, math: Arithmetic
) -> Answer:
    """Return what answers for a block; `column` is that of each site's module by its id."""
    parts = {name: block.get_submodule(name) for name in form.site_names}
    columns = {name: column[id(part)] for name, part in parts.items() if id(part) in column}

    def ask(name: str, compute: Compute) -> Feature:
        site = columns.get(name)
        return compute() if site is None else gate(of_call(site), compute)

    def answer(forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        named = _arguments(block, form, args, kwargs)
        if named is not None and getattr(block, "_chunk_size", None) is None:
            return form.run(block, ask, math, **named)
        with gated([parts[name] for name in columns], _renamed(gate, list(columns.values()))):
            return forward(*args, **kwargs)

    return answer
