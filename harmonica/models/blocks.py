"""Blocks: skip all that a skipped site does not need, not only the site.

`gated` overrides sites, so the norm and the modulation before a skipped site still run.
`gated_blocks` overrides the blocks that it knows, and asks the same gate with all of the branch
inside:

    gated          n = norm(h)·(1 + scale) + shift;  h + α · gate(i, lambda: site(n))
    gated_blocks   h + α · gate(i, lambda: site(norm(h)·(1 + scale) + shift))

The same operations in the same order, so the same numbers bit for bit. Known are our DiT's block,
U-ViT's, and diffusers' BasicTransformerBlock with adaLN-zero (DiTPipeline) and adaLN-single
(PixArt). Whatever is unusual about a block or a call, a hook on a norm, a chunked feed-forward,
arguments of an adapter, takes the plain way through `gated`, for this block and this call.

    h tokens (B, L, D)   scale, shift, α (B, 1, D)   feature, what a site returned (B, L, D)

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

FeatureOf = Callable[[str, Compute], Feature]
"""(name of a block's site, branch) -> feature; a module that is no site computes."""


def modulate(exact: bool, h: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Return h·(1 + scale) + shift; in one pass over memory, rounded once, if not `exact`."""
    return h * (1 + scale) + shift if exact else torch.addcmul(shift, h, 1 + scale)


def add(exact: bool, h: Tensor, alpha: Tensor, feature: Tensor) -> Tensor:
    """Return h + α·feature; in one pass over memory, rounded once, if not `exact`."""
    # The product comes first: a sum lies in memory as its first part does.
    return alpha * feature + h if exact else torch.addcmul(h.contiguous(), alpha, feature)


def dit_block(block: Any, of: FeatureOf, exact: bool, h: Tensor, c: Tensor) -> Tensor:
    """Do what `dit.Block.forward` does."""
    parts = block.adaLN_modulation(c)[:, None].chunk(6, dim=-1)  # 6 × (B, 1, D)
    shift1, scale1, alpha1, shift2, scale2, alpha2 = parts
    feature = of("attn", lambda: block.attn(modulate(exact, block.norm1(h), scale1, shift1)))
    h = add(exact, h, alpha1, feature)
    feature = of("mlp", lambda: block.mlp(modulate(exact, block.norm2(h), scale2, shift2)))
    return add(exact, h, alpha2, feature)


def uvit_block(block: Any, of: FeatureOf, _: bool, h: Tensor, skip: Tensor | None = None) -> Any:
    """Do what `uvit.Block.forward` does."""
    if block.skip_linear is not None and skip is not None:
        h = block.skip_linear(torch.cat([h, skip], dim=-1))
    h = h + of("attn", lambda: block.attn(block.norm1(h)))
    return h + of("mlp", lambda: block.mlp(block.norm2(h)))


def ada_zero_block(
    block: Any, of: FeatureOf, exact: bool, hidden_states: Tensor, timestep: Tensor,
    class_labels: Tensor, added_cond_kwargs: object = None,
) -> Tensor:  # fmt: skip
    """Do what diffusers' block does with adaLN-zero, which has no cross-attention: DiTPipeline."""
    h, ada = hidden_states, block.norm1
    c = ada.emb(timestep, class_labels, hidden_dtype=h.dtype)  # (B, D)
    parts = ada.linear(ada.silu(c))[:, None].chunk(6, dim=-1)  # 6 × (B, 1, D)
    shift1, scale1, alpha1, shift2, scale2, alpha2 = parts
    feature = of("attn1", lambda: block.attn1(modulate(exact, ada.norm(h), scale1, shift1)))
    h = add(exact, h, alpha1, feature)
    feature = of("ff", lambda: block.ff(modulate(exact, block.norm3(h), scale2, shift2)))
    return add(exact, h, alpha2, feature)


def ada_single_block(
    block: Any, of: FeatureOf, exact: bool, hidden_states: Tensor, timestep: Tensor,
    encoder_hidden_states: Tensor | None = None, encoder_attention_mask: Tensor | None = None,
    attention_mask: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Do what diffusers' block does with adaLN-single, one modulation for all blocks: PixArt."""
    h = hidden_states  # (B, L, D)
    shared = block.scale_shift_table[None] + timestep.reshape(len(h), 6, -1)  # (B, 6, D)
    shift1, scale1, alpha1, shift2, scale2, alpha2 = shared.chunk(6, dim=1)  # (B, 1, D)
    own = partial(block.attn1, encoder_hidden_states=None, attention_mask=attention_mask)
    feature = of("attn1", lambda: own(modulate(exact, block.norm1(h), scale1, shift1)))
    h = add(exact, h, alpha1, feature)
    h = of("attn2", lambda: block.attn2(h, encoder_hidden_states, encoder_attention_mask)) + h
    feature = of("ff", lambda: block.ff(modulate(exact, block.norm2(h), scale2, shift2)))
    return add(exact, h, alpha2, feature)


class Known(NamedTuple):
    """A class of blocks that can run with all of a branch inside the gate.

    `run` is called with (block, FeatureOf, exact, arguments of the block's forward) and returns
    what that returns. An argument that it does not name must be None or empty.
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
KNOWN = (
    Known("harmonica.models.dit.Block", dit_block, ("attn", "mlp")),
    Known("harmonica.models.uvit.Block", uvit_block, ("attn", "mlp")),
    Known(BASIC, ada_zero_block, ("attn1", "ff"), ("norm1", "norm1.norm", "norm3"), _ada_zero),
    Known(BASIC, ada_single_block, ("attn1", "attn2", "ff"),
          fits=partial(_basic, norm_type="ada_norm_single", crosses=True)),
)  # fmt: skip


def known_block(block: nn.Module) -> Known | None:
    """Return how to run this block; None if it has to run as it stands, since its class is not
    known, or something on it would see, or want, what is not called any more.
    """
    kind = f"{type(block).__module__}.{type(block).__qualname__}"
    known = next((known for known in KNOWN if known.kind == kind and known.fits(block)), None)
    if known is None or block.training:
        return None
    norms = [block.get_submodule(name) for name in known.norms]
    parts = (*norms, *map(block.get_submodule, known.site_names))
    hooked = any(m._forward_hooks or m._forward_pre_hooks for m in parts)
    whose = (block, *norms)
    own = all(not is_overridden(m, "forward") and called_by(m) == "forward" for m in whose)
    return known if own and not hooked else None


@cache
def _parameters(function: Callable[..., Any]) -> list[str]:
    return list(signature(function).parameters)


def _arguments(block: nn.Module, known: Known, args: Any, kwargs: Any) -> dict[str, Any] | None:
    """Return the arguments of a call by name, or None if `known.run` does not do such a call."""
    names, used = _parameters(type(block).forward)[1:], _parameters(known.run)[3:]
    given = dict(zip(names, args, strict=False)) | kwargs
    h, unused = given.get(names[0]), [given.pop(name) for name in given.keys() - {*used}]
    usual = len(args) <= len(names) and not (isinstance(h, Tensor) and h.dim() != 3)
    empty = all(it is None or (isinstance(it, dict) and not it) for it in unused)
    return given if usual and empty else None


@contextmanager
def gated_blocks(
    model: nn.Module, sites: Mapping[str, nn.Module] | Sequence[nn.Module], gate: Gate, *,
    exact: bool = True,
) -> Iterator[None]:  # fmt: skip
    """Do what `gated(sites, gate)` does, with the norm and the modulation before each site inside
    the gate, in the blocks of `model` that are known; sites elsewhere are overridden one by one.

    The numbers are those of `gated`, bit for bit if `exact`, else in fewer passes and to rounding.
    """
    modules = list(sites.values() if isinstance(sites, Mapping) else sites)
    column = {id(module): site for site, module in enumerate(modules)}
    blocks = [(block, known) for block in model.modules() if (known := known_block(block))]
    inside = {id(block.get_submodule(name)) for block, known in blocks for name in known.site_names}
    rest = [site for site, module in enumerate(modules) if id(module) not in inside]
    answer_of = partial(_answer, column=column, gate=gate, exact=exact)
    answers = ((block, "forward", answer_of(block, known)) for block, known in blocks)
    with gated([modules[site] for site in rest], _renamed(gate, rest)), overridden(answers):
        yield


def _renamed(gate: Gate, columns: Sequence[int]) -> Gate:
    return lambda site, compute: gate(of_call(columns[site]), compute)


def _answer(
    block: nn.Module, known: Known, column: Mapping[int, int], gate: Gate, exact: bool
) -> Answer:
    """Return what answers for a block; `column` is that of each site's module by its id."""
    parts = {name: block.get_submodule(name) for name in known.site_names}
    columns = {name: column[id(part)] for name, part in parts.items() if id(part) in column}

    def feature_of(name: str, compute: Compute) -> Feature:
        site = columns.get(name)
        return compute() if site is None else gate(of_call(site), compute)

    def answer(forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        given = _arguments(block, known, args, kwargs)
        if given is not None and getattr(block, "_chunk_size", None) is None:
            return known.run(block, feature_of, exact, **given)
        with gated([parts[name] for name in columns], _renamed(gate, list(columns.values()))):
            return forward(*args, **kwargs)

    return answer
