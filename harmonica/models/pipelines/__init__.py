"""Pipelines: stock diffusers pipelines under a schedule, and as a `Denoiser` to make one for.

    cached          caching.py        a call of the pipeline becomes a walk of its session
                    session.py        holds the tables, begins and ends walks, counts what happened
                    taps.py           lets the scheduler tell a walk what it is called for
                    tracker.py        decides at each site whether to reuse or compute
    from_pipeline   follow.py         the function
                    denoiser.py       predict and step, made of many runs of the pipeline
                    pipeline_run.py   one of these runs: skips to a step, and stops there
                    facts.py          what a whole run shows
    tune            tune.py           a table, by the methods of the library
    all of them     checks.py, inputs.py, schedulers.py

`cached` leaves a run of the pipeline as it is, and answers for its sites. `from_pipeline` runs
copies of the pipeline, and answers for all their models and for the scheduler.
"""

from harmonica.models.pipelines.caching import cached, disable_cache, enable_cache
from harmonica.models.pipelines.follow import from_pipeline
from harmonica.models.pipelines.tune import tune

__all__ = ["cached", "disable_cache", "enable_cache", "from_pipeline", "tune"]
