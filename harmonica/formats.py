"""Formats: schedules and routers as files.

    schedule    JSON: one string of T digits for each site, 1 = compute, and the schedule's other fields
    router      safetensors: logits (T−1, N); site names and `about` in the metadata; a checkpoint adds its own

This file does not know how tables are made or used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from harmonica.files import StrPath, read_json, read_tensors, write_json, write_tensors
from harmonica.router import Router, Schedule

OURS = "harmonica-schedule-1"


def write_schedule(schedule: Schedule, path: StrPath) -> None:
    """Write a schedule as readable JSON: one line for each site."""
    table = zip(schedule.sites, schedule.compute.int().T.tolist(), strict=True)
    columns = {site: "".join(map(str, column)) for site, column in table}
    facts = {f.name: getattr(schedule, f.name) for f in fields(schedule) if f.name not in ("compute", "sites")}
    write_json(path, {"format": OURS, **facts, "compute": columns})


def read_schedule(path: StrPath) -> Schedule:
    """Read a schedule.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not a schedule, or says something impossible.
    """
    data = read_json(path)
    if data.pop("format", None) != OURS:
        raise ValueError(f'{path} is not a schedule: it has no "format": "{OURS}"')
    try:
        columns = data.pop("compute")
        table = torch.tensor([_decisions(*item) for item in columns.items()]).reshape(len(columns), -1)  # (N, T)
        return Schedule(table.T, tuple(columns), **_facts(data))
    except (LookupError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} is not a valid schedule: {error}") from None


def _decisions(site: str, digits: str) -> list[bool]:
    if not isinstance(digits, str) or set(digits) - set("01"):
        raise ValueError(f"site {site} has {digits!r:.40}; a string of 0 and 1 was expected")
    return [digit == "1" for digit in digits]


def _facts(data: dict[str, Any]) -> dict[str, Any]:
    """Return the fields other than the table, each of the type it must have."""
    number, text = (int, float), (str,)
    for name, types in (("model", text), ("sampler", text), ("guidance", number), ("threshold", number)):
        if data.get(name) is not None and not isinstance(data[name], types):
            raise ValueError(f"{name} is {data[name]!r:.40}")
    if not all(isinstance(t, number) for t in data.get("timesteps", ())):
        raise ValueError("timesteps must be numbers")
    if not isinstance(data.get("provenance", {}), dict):
        raise ValueError("provenance must be an object")
    return data


def write_router(
    router: Router, path: StrPath, tensors: Mapping[str, Tensor] | None = None, facts: Mapping[str, Any] | None = None
) -> None:
    """Write a router, and beside it whatever tensors and facts a checkpoint carries."""
    mine = {"sites": router.sites, "about": router.about}
    write_tensors(path, {"logits": router.logits, **(tensors or {})}, {**mine, **(facts or {})})


def read_router(path: StrPath) -> tuple[Router, dict[str, Tensor], dict[str, Any]]:
    """Read a router, and the tensors and facts beside it.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not a router.
    """
    tensors, facts = read_tensors(path)
    try:
        logits = tensors.pop("logits")
        router = Router(len(logits) + 1, facts.pop("sites"), logits=logits, about=facts.pop("about"))
        return router, tensors, facts
    except (LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a router: {type(error).__name__}: {error}") from None
