"""HarmoniCa: learned feature caching for diffusion transformers (ICML 2025, arXiv 2410.01723).

    paper    name              shape      meaning
    T        steps                        model predictions in one walk
    t        k = T − t                    executed step, 0 … T−1
    N        len(sites)                   cacheable modules: each attention and feed-forward
    r        router()          (T, N)     score of each step and site, 1 = compute, 0 = reuse
    τ        tau                          compute where r > τ
             schedule.compute  (T, N)     the frozen table, bool
    λ⁽ᵏ⁾     lam[k]            (T,)       what reuse at step k does to the image, `image_error`
    β        beta                         price of computing one site
    CUR      schedule.cur                 share of the table that is reused, 0 … 1
             schedule.weights  (T, N, 1 + m)  of the gates; None reuses (the paper)
    x_t      x                 (B, C, H, W)  noisy image;  x_T pure noise, x₀ the image
    y        cond                         what the image is of: labels, prompt embeddings

A router holds scores, a table decisions. λ is no error of an image: that is its mean squared
difference to the image that it should be. Read in this order: cache, router, denoise, iepo, sdt.
Importing this package costs torch only; what LAZY names is imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from harmonica.cache import Cache, Gate, blend, gated, reuse
from harmonica.check import check_denoiser
from harmonica.cost import Macs, macs
from harmonica.denoise import Denoiser, denoise, sample
from harmonica.iepo import image_error, objective
from harmonica.router import Router, Schedule
from harmonica.sdt import Update, sdt
from harmonica.training.train import train_sdt

if TYPE_CHECKING:
    from harmonica.models import load
    from harmonica.models.pipelines import cached, disable_cache, enable_cache, from_pipeline, tune
    from harmonica.search.learn import learn_weights
    from harmonica.search.references import references

_OF_PIPELINES = ("cached", "disable_cache", "enable_cache", "from_pipeline", "tune")
LAZY = dict.fromkeys(_OF_PIPELINES, "harmonica.models.pipelines") | {"load": "harmonica.models"}
LAZY |= {"learn_weights": "harmonica.search.learn", "references": "harmonica.search.references"}
"""What is imported when it is first used, and the module that it is in."""


def __getattr__(name: str) -> Any:
    if name not in LAZY:
        raise AttributeError(f"module 'harmonica' has no attribute {name!r}")
    return getattr(import_module(LAZY[name]), name)


__version__ = "0.1.0"

__all__ = [
    "Cache", "Denoiser", "Gate", "Macs", "Router", "Schedule", "Update", "blend", "cached",
    "check_denoiser", "denoise", "disable_cache", "enable_cache", "from_pipeline", "gated",
    "image_error", "learn_weights", "load", "macs", "objective", "references", "reuse", "sample",
    "sdt", "train_sdt", "tune",
]  # fmt: skip
