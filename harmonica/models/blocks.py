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

This file does not know schedules, steps or samplers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from harmonica.cache import Compute, Feature, Gate, called_by, gated
from harmonica.models.arithmetic import EXACT, Arithmetic
from harmonica.override import Answer, is_overridden, overridden

Streams = tuple[Tensor, ...]
"""What a U-ViT runs side by side."""

Ask = Callable[[str, Compute], Feature]
"""(name of a block's site, branch) -> feature; a module that is no site computes."""


# ------------------------------------------------------------ blocks


def dit_block(block: Any, ask: Ask, math: Arithmetic, h: Tensor, c: Tensor) -> Tensor:
    """Do what `dit.Block.forward` does."""
    parts = block.adaLN_modulation(c)[:, None].chunk(6, dim=-1)  # 6 × (B, 1, D)
    shift1, scale1, gate1, shift2, scale2, gate2 = parts
    out = ask("attn", lambda: block.attn(math.modulate(block.norm1(h), scale1, shift1)))
    h = math.add(h, gate1, out)
    out = ask("mlp", lambda: block.mlp(math.modulate(block.norm2(h), scale2, shift2)))
    return math.add(h, gate2, out)


def uvit_block(block: Any, ask: Ask, math: Arithmetic, h: Streams, skip: Streams = ()) -> Streams:
    """Do what `uvit.Block.forward` does."""
    if block.skip_linear is not None:
        pairs = zip(h, skip, strict=True)
        h = tuple(block.skip_linear(torch.cat(pair, dim=-1)) for pair in pairs)
    h = tuple(map(torch.add, h, ask("attn", lambda: block.attn(tuple(map(block.norm1, h))))))
    return tuple(map(torch.add, h, ask("mlp", lambda: block.mlp(tuple(map(block.norm2, h))))))


def ada_zero_block(
    block: Any,
    ask: Ask,
    math: Arithmetic,
    hidden_states: Tensor,
    timestep: Tensor,
    class_labels: Tensor,
    added_cond_kwargs: object = None,
) -> Tensor:
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
    block: Any,
    ask: Ask,
    math: Arithmetic,
    hidden_states: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """Do what diffusers' block does with adaLN-single, one modulation for all blocks: PixArt."""
    h = hidden_states  # (B, N, D)
    shared = block.scale_shift_table[None] + timestep.reshape(len(h), 6, -1)  # (B, 6, D)
    shift1, scale1, gate1, shift2, scale2, gate2 = shared.chunk(6, dim=1)  # (B, 1, D)
    own = partial(block.attn1, encoder_hidden_states=None, attention_mask=attention_mask)
    h = math.add(h, gate1, ask("attn1", lambda: own(math.modulate(block.norm1(h), scale1, shift1))))
    h = ask("attn2", lambda: block.attn2(h, encoder_hidden_states, encoder_attention_mask)) + h
    out = ask("ff", lambda: block.ff(math.modulate(block.norm2(h), scale2, shift2)))
    return math.add(h, gate2, out)


# ------------------------------------------------------------ which block is known


@dataclass(frozen=True)
class Form:
    """How to run blocks of one class with all of a branch inside the gate.

    Attributes:
        kind: name of the class; naming it does not import it.
        run: (block, ask, arithmetic, *what the block's forward takes) -> what it returns.
        arguments: of the block's forward in its order, tokens first.
        site_names: of the modules of the block that may be sites.
        norms: modules that do not run where their site is skipped; one that is hooked must run, and
            forbids this form.
        unused: arguments that `run` does not do, so they must be None or empty.
        fits: whether a block of this class is of the kind that `run` does.
    """

    kind: str
    run: Callable[..., Any]
    arguments: tuple[str, ...]
    site_names: tuple[str, ...]
    norms: tuple[str, ...]
    unused: tuple[str, ...] = ()
    fits: Callable[[Any], bool] = lambda block: True

    def call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the arguments of a call by name, or None if this form does not do such a call."""
        named = dict(zip(self.arguments, args, strict=False)) | dict(kwargs)
        h = named.get(self.arguments[0])
        fits = len(args) <= len(self.arguments) and named.keys() <= set(self.arguments)
        fits = fits and not (isinstance(h, Tensor) and h.dim() != 3)
        unused = [named.pop(name, None) for name in self.unused]
        empty = all(value is None or (isinstance(value, dict) and not value) for value in unused)
        return named if fits and empty else None


def _plain(block: Any, norm_type: str) -> bool:
    plain = block.pos_embed is None and not block.only_cross_attention
    return bool(plain and block.norm_type == norm_type)


def _ada_zero(block: Any) -> bool:
    return _plain(block, "ada_norm_zero") and block.attn2 is None and block.norm1.emb is not None


def _ada_single(block: Any) -> bool:
    return _plain(block, "ada_norm_single") and block.attn2 is not None


_NORMS = ("norm1", "norm2")
_BASIC = "diffusers.models.attention.BasicTransformerBlock"
_TEXT = ("encoder_hidden_states", "encoder_attention_mask")
_OTHERS = ("cross_attention_kwargs", "class_labels", "added_cond_kwargs")
_BASIC_ARGUMENTS = ("hidden_states", "attention_mask", *_TEXT, "timestep", *_OTHERS)
FORMS = (
    Form("harmonica.models.dit.Block", dit_block, ("h", "c"), ("attn", "mlp"), _NORMS),
    Form("harmonica.models.uvit.Block", uvit_block, ("h", "skip"), ("attn", "mlp"), _NORMS),
    Form(
        _BASIC, ada_zero_block, _BASIC_ARGUMENTS, ("attn1", "ff"), ("norm1", "norm1.norm", "norm3"),
        unused=("attention_mask", *_TEXT, "cross_attention_kwargs"), fits=_ada_zero,
    ),
    Form(
        _BASIC, ada_single_block, _BASIC_ARGUMENTS, ("attn1", "attn2", "ff"), _NORMS,
        unused=_OTHERS, fits=_ada_single,
    ),
)  # fmt: skip


def form_of(block: nn.Module) -> Form | None:
    """Return how to run this block, or None if it has to be run as it stands."""
    kind = f"{type(block).__module__}.{type(block).__qualname__}"
    form = next((form for form in FORMS if form.kind == kind and form.fits(block)), None)
    return form if form is not None and _usual(block, form) else None


def _usual(block: nn.Module, form: Form) -> bool:
    """Tell whether nothing on the block would see, or want, what is not called any more."""
    norms = [block.get_submodule(name) for name in form.norms]
    sites = [block.get_submodule(name) for name in form.site_names]
    own = (block, *norms)
    replaced = any(is_overridden(m, "forward") or called_by(m) != "forward" for m in own)
    hooked = any(m._forward_hooks or m._forward_pre_hooks for m in (*norms, *sites))
    return not (replaced or hooked or block.training)


# ------------------------------------------------------------ overriding


@contextmanager
def gated_blocks(
    model: nn.Module | None,
    sites: Mapping[str, nn.Module] | Sequence[nn.Module],
    gate: Gate,
    *,
    math: Arithmetic = EXACT,
) -> Iterator[None]:
    """Do what `gated(sites, gate)` does, with the norm and the modulation before each site inside
    the gate.

    Args:
        model: whose blocks are looked through; None knows no blocks, and all sites are overridden
            one by one.
        sites: modules in the order of the table's columns, as in `gated`.
        gate: asked as gate(index of the site, compute).
        math: EXACT gives the numbers of `gated` bit for bit, FUSED to rounding.
    """
    modules = list(sites.values() if isinstance(sites, Mapping) else sites)
    column = {id(module): site for site, module in enumerate(modules)}
    blocks = [
        (block, form)
        for block in (model.modules() if model is not None else ())
        if (form := form_of(block))
    ]
    inside = {id(block.get_submodule(name)) for block, form in blocks for name in form.site_names}
    rest = [site for site, module in enumerate(modules) if id(module) not in inside]

    known = ((block, "forward", _answer(block, form, column, gate, math)) for block, form in blocks)
    with gated([modules[site] for site in rest], _renamed(gate, rest)), overridden(known):
        yield


def _renamed(gate: Gate, columns: Sequence[int]) -> Gate:
    return lambda site, compute: gate(columns[site], compute)


def _answer(
    block: nn.Module, form: Form, column: Mapping[int, int], gate: Gate, math: Arithmetic
) -> Answer:
    """Return what answers for a block; `column` is that of each site's module by its id."""
    parts = {name: block.get_submodule(name) for name in form.site_names}
    columns = {name: column[id(part)] for name, part in parts.items() if id(part) in column}

    def ask(name: str, compute: Compute) -> Feature:
        site = columns.get(name)
        return compute() if site is None else gate(site, compute)

    def answer(forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        named = form.call(args, kwargs)
        if named is not None and getattr(block, "_chunk_size", None) is None:
            return form.run(block, ask, math, **named)
        with gated([parts[name] for name in columns], _renamed(gate, list(columns.values()))):
            return forward(*args, **kwargs)

    return answer
