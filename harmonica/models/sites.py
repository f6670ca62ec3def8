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

import re
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from harmonica.cost import Macs
from harmonica.values import require

Modules = Mapping[str, nn.Module]  # by name
ADVICE = "give the modules yourself, as cached(pipe, schedule, sites={name: module, …})"
# One word of a module's name, such as those of img_mlp.
_SITE = re.compile(
    r"\w*(attn|attention)\d*|mhb?a|ffn?\d*|mlp\d*|feedforward|densereludense|transition"
)
_NOT_A_SITE = re.compile(r"\w*norm\d*|adaln\w*|act|mod(ulation)?|drop(out)?|(emb|time|film)\w*")
_INLINED = ("gate_proj", "up_proj", "down_proj")
_NOT_THE_DENOISER = re.compile(
    r"refine|embed|encoder|extractor|projection|projector|fus(ion|er)|perceiver$"
    r"|^(text|txt|context|caption)_"
)
CALLED_TWICE = {"EasyAnimateTransformerBlock": ("ff", "txt_ff")}
CALLED_TWICE |= {f"{model}TransformerBlock": ("ff", "") for model in ("CogView4", "GlmImage")}
"""By class of a block: (a module that it calls on the image's tokens and then on the text's, the
module that it calls on the text's instead where it has one). What is called twice is no site."""


def sites(transformer: nn.Module) -> dict[str, nn.Module]:
    """Return the sites of a transformer by name, found by the rule of this module: the columns of a
    table, in their order.

    Its blocks stand in lists and name their parts. Raises ValueError if it is not a module, has no
    sites, has a module at two sites, or chunks its feed-forwards.

    >>> block = nn.ModuleDict({"attn": nn.Linear(4, 4), "norm": nn.LayerNorm(4)})
    >>> list(sites(nn.ModuleDict({"blocks": nn.ModuleList([block])})))
    ['blocks.0.attn']
    """
    takes = "sites() takes the transformer of a pipeline, a torch module"
    require(isinstance(transformer, nn.Module), f"{takes}; found {type(transformer)}")
    blocks = dict(_blocks(transformer, ""))
    names = [name for path, block in blocks.items() for name in _inside(block, path)]
    modules = {name: transformer.get_submodule(name) for name in names}
    _check_cacheable(type(transformer).__name__, blocks, modules)
    return modules


def macs_per_token(transformer: nn.Module, modules: Modules) -> Macs:
    """Estimate MACs per token: one for each entry of a matrix in the blocks that hold sites, but
    for modulation, normalisation and embedding, which run for an image and not for each token.
    Attention products are left out, and every expert of a mixture counts.
    """
    sizes, rest = dict.fromkeys(modules, 0.0), 0.0
    for path, block in _blocks(transformer, ""):
        inside = [site for site in modules if f"{site}.".startswith(f"{path}.")]
        for name, part in block.named_modules(prefix=path) if inside else ():
            size = sum(p.numel() for p in part.parameters(recurse=False) if p.dim() > 1)
            site = next((site for site in inside if f"{name}.".startswith(f"{site}.")), None)
            words = re.split(r"[._]", name.lower())
            if site is not None:
                sizes[site] += size
            elif part is not block and not any(map(_NOT_A_SITE.fullmatch, words)):
                rest += size
    return Macs(torch.tensor([*sizes.values()], dtype=torch.float64), rest)


def is_site(name: str) -> bool:
    """Say whether a module of this name is attention or feed-forward.

    >>> is_site("img_mlp"), is_site("attn2"), is_site("ff_norm")
    (True, True, False)
    """
    words = name.lower().replace("feed_forward", "feedforward").split("_")
    return any(map(_SITE.fullmatch, words)) and not any(map(_NOT_A_SITE.fullmatch, words))


def _blocks(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield the blocks under a module, outside of what is not the denoiser."""
    for name, child in module.named_children():
        if _NOT_THE_DENOISER.search(name):
            continue
        if isinstance(child, nn.ModuleList):
            yield from ((f"{path}{name}.{i}", block) for i, block in child.named_children())
        else:
            yield from _blocks(child, f"{path}{name}.")


def _inside(block: nn.Module, path: str) -> Iterator[str]:
    """Yield the names of the sites of a block: outermost matches, in their order."""
    if is_site(path.split(".")[-2]):  # a list of attentions, each of them a site
        yield path
        return
    children = dict(block.named_children())
    twice, of_text = CALLED_TWICE.get(type(block).__name__, ("", ""))
    if of_text not in children:
        children.pop(twice, None)
    both = {"proj_mlp", "proj_out"}
    linear = {*_INLINED, *(both if both <= children.keys() else ())}
    for name, child in children.items():
        if name in linear or is_site(name):
            yield f"{path}.{name}"
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
