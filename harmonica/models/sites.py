"""sites: where a diffusion transformer can be cached, found by the names of its modules.

    block    an element of an nn.ModuleList of the transformer: transformer_blocks, layers …
    site     inside a block, an outermost module whose name says attention or feed-forward: attn1,
             self_attn, ff, img_mlp, ff_context …; what a site holds inside itself is part of it

Two kinds of block have no such module for part of their work, so their linear layers are sites one
by one:

    single-stream   proj_mlp ─┐             Flux and its kin: attn is a module, the feed-forward is
                    attn ─────┴→ proj_out   not, and one projection ends both
    inlined         gate_proj, up_proj → down_proj      PRX: the block multiplies them itself

Reusing proj_out alone would skip one product and still compute all that it reads. (In Flux at
1024 × 1024, proj_out alone brings 56 % of the MACs within reach, attn beside it 82 %, all three
nearly 100 %.) Token refiners, embedders, text encoders and projections have modules of the same
names, but none is the denoiser: they are left out.

A rule about names can be wrong about a model it has never seen; the laws that tell are in
tests/models/test_zoo.py. Some models keep attention keys and values of their own
between forwards (QwenImage 2.1 with use_kv_cache, AnyFlow FAR): a skipped attention writes none, so
run those without their cache. This file does not know pipelines, samplers or routers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from torch import nn

from harmonica.cost import Macs
from harmonica.models.site_costs import ADVICE, NOT_A_SITE, Modules, estimated
from harmonica.table import require

# One word of a module's name, such as those of img_mlp.
_ATTENTION = re.compile(r"\w*(attn|attention)\d*|mhb?a")
_FEED_FORWARD = re.compile(r"ffn?\d*|mlp\d*|feedforward|densereludense|transition")
_CROSS = re.compile(r"\w*cross\w*|attn2|to")  # "to" as in audio_to_video_attn
_INLINED = ("gate_proj", "up_proj", "down_proj")
_NOT_THE_DENOISER = re.compile(
    r"refine|embed|encoder|extractor|projection|projector|fus(ion|er)|perceiver$"
    r"|^(text|txt|context|caption)_"
)
CALLED_TWICE = {"EasyAnimateTransformerBlock": ("ff", "txt_ff")}
CALLED_TWICE |= {f"{model}TransformerBlock": ("ff", "") for model in ("CogView4", "GlmImage")}
"""By class of a block: (a module that it calls on the image's tokens and then on the text's, the
module that it calls on the text's instead where it has one). What is called twice is no site."""


@dataclass(frozen=True, eq=False, repr=False)
class Sites(Mapping[str, nn.Module]):
    """The cacheable modules of a transformer by name: the columns of a router's table."""

    modules: Modules
    kinds: tuple[str, ...]  # N words: attention, cross-attention, feed-forward or both
    macs: Macs  # of one token, estimated from the sizes of the weights

    def __getitem__(self, name: str) -> nn.Module:
        return self.modules[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.modules)

    def __len__(self) -> int:
        return len(self.modules)

    def __str__(self) -> str:
        name, kind = max(map(len, self)), max(map(len, self.kinds))
        rows = zip(self, self.kinds, self.macs.sites / self.macs.total, strict=True)
        lines = [f"{row[0]:{name}}  {row[1]:{kind}}  {float(row[2]):6.1%}" for row in rows]
        how = "estimated per token from the weights"
        return "\n".join(
            [*lines, f"{len(self)} sites cover {self.macs.covered:.1%} of the MACs, {how}"]
        )


def sites(transformer: nn.Module) -> Sites:
    """Find the sites of a transformer by the rule of this module, and what they cost per token:
    without attention products, and with every expert of a mixture.

    Its blocks stand in lists and name their parts. Raises ValueError if it is not a module, has no
    sites, has a module at two sites, or chunks its feed-forwards.

    >>> block = nn.ModuleDict({"attn": nn.Linear(4, 4), "ff": nn.Linear(4, 8)})
    >>> print(sites(nn.ModuleDict({"blocks": nn.ModuleList([block])})))
    blocks.0.attn  attention      33.3%
    blocks.0.ff    feed-forward   66.7%
    2 sites cover 100.0% of the MACs, estimated per token from the weights
    """
    kind = type(transformer)
    takes = f"sites() takes the transformer of a pipeline, a torch module; found {kind}"
    require(isinstance(transformer, nn.Module), takes)
    blocks = dict(_blocks(transformer, ""))
    kinds = dict(part for path, block in blocks.items() for part in _inside(block, path))
    modules: Modules = {name: transformer.get_submodule(name) for name in kinds}
    _check_cacheable(kind.__name__, blocks, modules)
    return Sites(MappingProxyType(modules), tuple(kinds.values()), estimated(blocks, modules))


def kind_of(name: str) -> str | None:
    """Return what a module of this name is: attention, cross-attention, feed-forward, or None.

    >>> kind_of("img_mlp"), kind_of("attn2"), kind_of("ff_norm")
    ('feed-forward', 'cross-attention', None)
    """
    words = name.lower().replace("feed_forward", "feedforward").split("_")
    if any(map(NOT_A_SITE.fullmatch, words)):
        return None
    if any(map(_ATTENTION.fullmatch, words)):
        return "cross-attention" if any(map(_CROSS.fullmatch, words)) else "attention"
    return "feed-forward" if any(map(_FEED_FORWARD.fullmatch, words)) else None


def _blocks(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield the blocks under a module, outside of what is not the denoiser."""
    for name, child in module.named_children():
        if _NOT_THE_DENOISER.search(name):
            continue
        if isinstance(child, nn.ModuleList):
            yield from ((f"{path}{name}.{i}", block) for i, block in child.named_children())
        else:
            yield from _blocks(child, f"{path}{name}.")


def _inside(block: nn.Module, path: str) -> Iterator[tuple[str, str]]:
    """Yield (name, kind) of the sites of a block: outermost matches, in their order."""
    of_list = kind_of(path.split(".")[-2])
    if of_list:  # a list of attentions, each of them a site
        yield path, of_list
        return
    children = dict(block.named_children())
    twice, of_text = CALLED_TWICE.get(type(block).__name__, ("", ""))
    if of_text not in children:
        children.pop(twice, None)
    linear = dict.fromkeys(_INLINED, "feed-forward")
    if {"proj_mlp", "proj_out"} <= children.keys():
        linear |= {"proj_mlp": "feed-forward", "proj_out": "both"}
    for name, child in children.items():
        kind = linear.get(name) or kind_of(name)
        if kind:
            yield f"{path}.{name}", kind
        elif not _NOT_THE_DENOISER.search(name):
            yield from _inside(child, f"{path}.{name}")


def _check_cacheable(name: str, blocks: Modules, modules: Modules) -> None:
    lists = ", ".join(dict.fromkeys(path.rpartition(".")[0] for path in blocks))
    where = "modules (attn…, ff…, mlp …) inside the blocks of its lists"
    looked = f"looked for attention and feed-forward {where} ({lists or 'no list of blocks'})"
    require(bool(modules), f"{name} has no sites that the rule knows; {looked}; {ADVICE}")
    first: dict[int, str] = {}
    for here, site in modules.items():
        other, need = first.setdefault(id(site), here), "which would need two features"
        require(other == here, f"{name}: {other} and {here} are one module, {need}; {ADVICE}")
    for path, block in blocks.items():
        chunks = f"{name}: the feed-forward of {path} runs in chunks, so it is called several times"
        todo = "call set_chunk_feed_forward(None, 0) on the blocks"
        require(getattr(block, "_chunk_size", None) is None, f"{chunks} in a forward; {todo}")
