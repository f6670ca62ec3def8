"""Checks: what a pipeline must be to be cached or tuned, and what to do where it is not.

Checked when a cache is opened and again at each walk, since compiling or another cache may have
come in between. Only what would be silent otherwise, or fail without a reason, is refused.
"""

from typing import Any

from torch import nn

from harmonica.models.sites import sites
from harmonica.values import require

TRANSFORMERS = ("transformer", "transformer_2")
"""Denoisers of a pipeline. The names of the second one's sites begin with its own."""

OTHER_CACHES = ("cache", "fbc_", "broadcast")
"""Parts of the names of hooks by which diffusers' own caches are known."""


def transformers_of(pipe: Any) -> dict[str, nn.Module]:
    """Return the denoisers of a pipeline by name."""
    return {name: m for name in TRANSFORMERS if (m := getattr(pipe, name, None)) is not None}


def sites_of(pipe: Any) -> dict[str, nn.Module]:
    """Return the sites of all denoisers of a pipeline by name."""
    own, *others = ((name, sites(model)) for name, model in transformers_of(pipe).items())
    return own[1] | {f"{name}.{site}": part for name, of in others for site, part in of.items()}


def check_pipeline(pipe: Any) -> None:
    """Raise TypeError or ValueError if a pipeline cannot be cached as it stands now."""
    for part in ("transformer", "scheduler"):
        if getattr(pipe, part, None) is None:
            kind = type(pipe).__name__
            raise TypeError(f"{kind} has no {part}; expected a diffusers pipeline that has one")
    for name, model in transformers_of(pipe).items():
        _check_not_compiled(name, model)
        noisy = "is in training mode, where features are noisy; call its eval() first"
        require(not model.training, f"pipe.{name} {noisy}")
        other, todo = _other_cache(pipe, model), "only one can decide what runs; disable that first"
        require(not other, f"pipe.{name} has another cache enabled, {other}, and {todo}")


def _check_not_compiled(name: str, model: Any) -> None:
    own = f"harmonica.models.sites.sites(pipe.{name}).values()"
    instead = f"compile its sites instead: for site in {own}: site.compile()"
    if not isinstance(model, nn.Module) or hasattr(model, "_orig_mod"):
        todo = f"Set pipe.{name} to the module that was compiled, and {instead}"
        raise TypeError(f"pipe.{name} is compiled, and compiled code cannot skip a site. {todo}")
    compiled = [path for path, part in model.named_modules() if _is_compiled(part)]
    inside = tuple(f"{site}." for site in sites(model)) if compiled else ()
    for path in compiled:
        part = f"pipe.{name}.{path}".rstrip(".")
        why = f"{part} is compiled in place, and compiled code cannot skip a site"
        require(f"{path}.".startswith(inside), f"{why}. Load the {name} again, and {instead}")


def _is_compiled(part: nn.Module) -> bool:
    """Tell whether torch.compile was given this module, in one of its three ways."""
    traced = hasattr(vars(part).get("forward"), "_torchdynamo_orig_callable")
    return traced or part._compiled_call_impl is not None or hasattr(part, "_orig_mod")


def _other_cache(pipe: Any, model: nn.Module) -> str:
    """Return the name of another cache on this transformer, empty if there is none."""
    if (config := getattr(model, "_cache_config", None)) is not None:
        return f"diffusers' {type(config).__name__}"
    for part in model.modules():
        for hook in getattr(getattr(part, "_diffusers_hook", None), "hooks", ()):
            if any(word in hook for word in OTHER_CACHES):
                return f"diffusers' hook {hook}"
    # cache-dit marks the class of the pipeline as well, but patches this transformer alone
    if "_is_cached" in vars(model) or "_is_cached" in vars(pipe):
        return "cache-dit's or one like it (_is_cached is set)"
    return ""
