"""Pipelines: stock diffusers pipelines under a schedule, and as a `Denoiser` to make one for."""

from harmonica.models.pipelines.caching import cached, disable_cache, enable_cache
from harmonica.models.pipelines.follow import from_pipeline
from harmonica.models.pipelines.tune import tune

__all__ = ["cached", "disable_cache", "enable_cache", "from_pipeline", "tune"]
