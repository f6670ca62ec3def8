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

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from harmonica.cache import Compute, Feature, Gate, called_by
from harmonica.calls import of_call
from harmonica.override import Answer, is_overridden, overridden
from harmonica.values import require

FeatureOf = Callable[[str, Compute], Feature]
"""(name of a block's site, branch) -> feature; a module that is no site computes."""


def modulated(
    block: Any, of: FeatureOf, exact: bool, h: Tensor, name: str, norm: Any, parts: Any, **more: Any
) -> Tensor:
    """Return h + α·site(norm(h)·(1 + scale) + shift), `parts` being (shift, scale, α).

    If not `exact`, each sum and its product are one pass over memory, and rounded once.
    """
    shift, scale, alpha = parts  # (B, 1, D)

    def branch() -> Feature:
        n = norm(h)
        n = n * (1 + scale) + shift if exact else torch.addcmul(shift, n, 1 + scale)
        return getattr(block, name)(n, **more)

    feature = of(name, branch)
    # The product comes first: a sum lies in memory as its first part does.
    return alpha * feature + h if exact else torch.addcmul(h.contiguous(), alpha, feature)


def dit_block(block: Any, of: FeatureOf, exact: bool, h: Tensor, c: Tensor) -> Tensor:
    """Do what `dit.Block.forward` does."""
    parts = block.adaLN_modulation(c)[:, None].chunk(6, dim=-1)  # 6 × (B, 1, D)
    h = modulated(block, of, exact, h, "attn", block.norm1, parts[:3])
    return modulated(block, of, exact, h, "mlp", block.norm2, parts[3:])


def uvit_block(block: Any, of: FeatureOf, _: bool, h: Tensor, skip: Tensor | None = None) -> Any:
    """Do what `uvit.Block.forward` does."""
    if block.skip_linear is not None and skip is not None:
        h = block.skip_linear(torch.cat([h, skip], dim=-1))
    h = h + of("attn", lambda: block.attn(block.norm1(h)))
    return h + of("mlp", lambda: block.mlp(block.norm2(h)))


def ada_block(
    block: Any, of: FeatureOf, exact: bool, hidden_states: Tensor, timestep: Tensor,
    class_labels: Tensor | None = None, encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None, attention_mask: Tensor | None = None,
    added_cond_kwargs: object = None,
) -> Tensor:  # fmt: skip
    """Do what diffusers' block does with adaLN-zero (DiTPipeline) or adaLN-single (PixArt)."""
    h, mask, norms = hidden_states, attention_mask, (block.norm1, block.norm2)  # h (B, L, D)
    if block.norm_type == "ada_norm_zero":
        ada, norms = block.norm1, (block.norm1.norm, block.norm3)
        c = ada.emb(timestep, class_labels, hidden_dtype=h.dtype)  # (B, D)
        parts = ada.linear(ada.silu(c))[:, None].chunk(6, dim=-1)  # 6 × (B, 1, D)
    else:
        shared = block.scale_shift_table[None] + timestep.reshape(len(h), 6, -1)  # (B, 6, D)
        parts = shared.chunk(6, dim=1)  # 6 × (B, 1, D)
    h = modulated(block, of, exact, h, "attn1", norms[0], parts[:3], attention_mask=mask)
    if block.attn2 is not None:
        h = of("attn2", lambda: block.attn2(h, encoder_hidden_states, encoder_attention_mask)) + h
    return modulated(block, of, exact, h, "ff", norms[1], parts[3:])


def _does(block: Any) -> bool:
    """Say whether `ada_block` does such a block of diffusers."""
    zero = block.norm_type == "ada_norm_zero" and block.norm1.emb is not None
    usual = block.pos_embed is None and not block.only_cross_attention
    return usual and (zero if block.attn2 is None else block.norm_type == "ada_norm_single")


Run = Callable[..., Any]
"""(block, FeatureOf, exact, arguments of the block's forward by name) -> what that returns. Any
other argument must be None or empty."""
KNOWN: dict[str, Run] = {
    "harmonica.models.dit.Block": dit_block,
    "harmonica.models.uvit.Block": uvit_block,
    "diffusers.models.attention.BasicTransformerBlock": ada_block,
}
"""How to run a block with all of a branch inside the gate, by its class, which imports nothing."""
SITES = ("attn", "mlp", "attn1", "attn2", "ff")  # modules of known blocks that may be sites


def known_block(block: nn.Module) -> Run | None:
    """Return how to run this block; None if it has to run as it stands, since its class is not
    known, or something on it would see, or want, what is not called any more.
    """
    run = KNOWN.get(f"{type(block).__module__}.{type(block).__qualname__}")
    if run is None or block.training or (run is ada_block and not _does(block)):
        return None
    norms = [m for name, m in block.named_modules() if re.fullmatch(r"norm\d(\.norm)?", name)]
    parts = [*norms, *(part for name, part in block.named_children() if name in SITES)]
    hooked = any(m._forward_hooks or m._forward_pre_hooks for m in parts)
    whose = (block, *norms)
    own = all(not is_overridden(m, "forward") and called_by(m) == "forward" for m in whose)
    return run if own and not hooked else None


@cache
def _parameters(function: Callable[..., Any]) -> list[str]:
    return list(signature(function).parameters)


def _arguments(block: nn.Module, run: Run, args: Any, kwargs: Any) -> dict[str, Any] | None:
    """Return the arguments of a call by name, or None if `run` does not do such a call."""
    names, used = _parameters(type(block).forward)[1:], _parameters(run)[3:]
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
    column = {module: i for i, module in enumerate(modules)}
    one_each = "a module stands at two sites; each site needs a module of its own"
    require(len(column) == len(modules), one_each)
    answers: list[tuple[nn.Module, str, Answer]] = []
    for block in model.modules():
        if run := known_block(block):
            parts = [(name, part) for name, part in block.named_children() if name in SITES]
            own = {name: column.pop(part) for name, part in parts if part in column}
            answers.append((block, "forward", _answer(block, run, own, gate, exact)))
    answers += [(module, called_by(module), (gate, i)) for module, i in column.items()]
    with overridden(answers):
        yield


def _answer(block: nn.Module, run: Run, column: dict[str, int], gate: Gate, exact: bool) -> Answer:
    """Return what answers for a block; `column` is that of each of its sites by name."""

    def feature_of(name: str, compute: Compute) -> Feature:
        return gate(of_call(column[name]), compute) if name in column else compute()

    def answer(forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        given = _arguments(block, run, args, kwargs)
        if given is not None and getattr(block, "_chunk_size", None) is None:
            return run(block, feature_of, exact, **given)
        sites = [(block.get_submodule(name), i) for name, i in column.items()]
        with overridden((site, called_by(site), (gate, i)) for site, i in sites):
            return forward(*args, **kwargs)

    return answer
