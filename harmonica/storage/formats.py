"""Formats: schedules and routers as files, ours and other people's.

    schedule       JSON: one string of T digits for each site, 1 = compute, and the schedule's other fields
    router         safetensors: logits (T−1, N); site names and `about` in the metadata; a checkpoint adds its own
    config.json    of a folder made for the Hub: a schedule, or all of a router but its logits
    SmoothCache    JSON: {"attn-0": [1, 0, …], …} for each block or {"attn": […], …} for each kind; 1 = compute
    router file    torch zip of Learning-to-Cache or HarmoniCa's authors: {"routers": {"0.prob": (N,), …}, "opt": …,
                   "args": Namespace}, or the inner dict alone; logits

Which rows of a router file may reuse, and in what order they run, differs: docs/decisions/0004.
This file does not know how tables are made or used.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harmonica.router import Router, Schedule
from harmonica.storage.files import (
    StrPath,
    existing,
    is_plain,
    read_json,
    read_pickle,
    read_tensors,
    refused,
    write_json,
    write_tensors,
)

OURS = "harmonica-schedule-1"
ROUTER = "harmonica-router-1"
LIBRARY = {"library": "harmonica"}
WIDTHS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
TRAINED = 4.5
"""A logit drawn from N(0, 1) is larger once in 150 000 times; one that training moved ends near 5
or far beyond."""

# ------------------------------------------------------------------------------------------ ours


def write_schedule(schedule: Schedule, path: StrPath) -> None:
    """Write a schedule as readable JSON: one line for each site, what all names begin with once."""
    lists = {site.partition(".")[0] for site in schedule.sites if "." in site}
    # Half of a file of diffusers' names would be "transformer_blocks.", said once for each line.
    prefix = (
        f"{lists.pop()}." if len(lists) == 1 and all("." in site for site in schedule.sites) else ""
    )
    table = zip(schedule.sites, schedule.compute.int().T.tolist(), strict=True)
    columns = {site.removeprefix(prefix): "".join(map(str, column)) for site, column in table}
    facts = {
        f.name: getattr(schedule, f.name)
        for f in fields(schedule)
        if f.name not in ("compute", "sites")
    }
    write_json(
        path,
        {
            **LIBRARY,
            "format": OURS,
            "steps": schedule.steps,
            **facts,
            "prefix": prefix,
            "compute": columns,
        },
    )


def read_schedule(path: StrPath, tau: float = 0.1) -> Schedule:
    """Read a schedule of ours or another's; the file's content tells which, its name does not.

    Args:
        path: of our JSON, our router (.safetensors), SmoothCache's JSON or a router file (.pt,
            .pth).
        tau: τ at which a router is frozen, 0 ≤ tau < 1. Learning-to-Cache runs its DiT routers at
            0.1 and its U-ViT routers at 0.9. Tables that are frozen already ignore it.

    The first step of another's table computes in any case; where that overrules the file,
    `provenance` says so.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not a schedule, says something impossible, or holds more than tensors
            and settings.
    """
    with existing(path).open("rb") as file:
        head = file.read(9)
    if (
        head.endswith(b"{") and int.from_bytes(head[:8], "little") < 2**32
    ):  # safetensors: header's length, then JSON
        return read_router(path)[0].schedule(tau)
    if head.startswith((b"PK\x03\x04", b"\x80\x02")):  # a zip, or a bare pickle of old torch
        return _router_file(path, tau)
    data = read_json(path)
    if "format" not in data and data and all(isinstance(column, list) for column in data.values()):
        return _smoothcache(path, data)
    return _our_schedule(path, data)


def read_our_schedule(path: StrPath) -> Schedule:
    """Read what `write_schedule` wrote, and nothing else; raises as `read_schedule` does."""
    return _our_schedule(path, read_json(path))


def _our_schedule(path: StrPath, data: dict[str, Any]) -> Schedule:
    if data.get("format") == ROUTER:
        raise ValueError(
            f"{path} is not a schedule but a router; use Router.from_pretrained(...).schedule(tau)"
        )
    if data.pop("format", None) != OURS:
        raise ValueError(f'{path} is not a schedule: it has no "format": "{OURS}"')
    try:
        columns = data.pop("compute")
        table = torch.tensor([_decisions(*item) for item in columns.items()]).reshape(
            len(columns), -1
        )  # (N, T)
        if data.pop("steps", table.shape[1]) != table.shape[1]:
            raise ValueError(
                f"the table has {table.shape[1]} steps, which is not what its steps say"
            )
        data.pop("library", None)
        prefix = data.pop("prefix", "")
        return Schedule(table.T, tuple(prefix + site for site in columns), **_facts(data))
    except (LookupError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise refused(path, "is not a valid schedule", error) from None


def _decisions(site: str, digits: str) -> list[bool]:
    if not isinstance(digits, str) or set(digits) - set("01"):
        raise ValueError(f"site {site:.80} has {digits!r:.40}; a string of 0 and 1 was expected")
    return [digit == "1" for digit in digits]


def _facts(data: dict[str, Any]) -> dict[str, Any]:
    """Return the fields other than the table, each of the type it must have; raise ValueError on
    what none has.
    """
    number, text = (int, float), (str,)
    strangers = sorted(
        data.keys() - {f.name for f in fields(Schedule)} | data.keys() & {"compute", "sites"}
    )
    if strangers:
        raise ValueError(f"no schedule has a field {strangers[0]!r:.40}")
    for name, types in (
        ("model", text),
        ("sampler", text),
        ("guidance", number),
        ("threshold", number),
    ):
        if data.get(name) is not None and not isinstance(data[name], types):
            raise ValueError(f"{name} is {data[name]!r:.40}")
    times = data.get("timesteps", ())
    if not isinstance(times, list | tuple) or not all(isinstance(t, number) for t in times):
        raise ValueError("timesteps must be numbers")
    if not isinstance(data.get("provenance", {}), dict):
        raise ValueError("provenance must be an object")
    return {**data, "timesteps": tuple(times)} if times else data


def _router(logits: Any, sites: Any, about: Any) -> Router:
    """Return a router of what a file says, which must be one that makes a schedule; else raise
    TypeError or ValueError.

    logits must be (T−1, N), sites N distinct names, about fields of a schedule that fit the table.
    """
    if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.dtype not in WIDTHS:
        raise ValueError("logits must be floating-point numbers, (steps − 1, sites)")
    if not isinstance(sites, list) or not all(isinstance(site, str) for site in sites):
        raise ValueError(f"sites must be a list of names, found {sites!r:.40}")
    if not isinstance(about, dict):
        raise ValueError(f"about must be an object, found {about!r:.40}")
    router = Router(len(logits) + 1, sites, logits=logits, about=_facts(about))
    router.schedule()
    return router


def write_router(
    router: Router,
    path: StrPath,
    tensors: Mapping[str, Tensor] | None = None,
    facts: Mapping[str, Any] | None = None,
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
        return (
            _router(tensors.pop("logits"), facts.pop("sites"), facts.pop("about")),
            tensors,
            facts,
        )
    except (LookupError, TypeError, ValueError) as error:
        raise refused(path, "is not a router", f"{type(error).__name__}: {error}") from None


def write_router_config(router: Router, path: StrPath) -> None:
    """Write config.json of a router's folder: all but the logits."""
    write_json(
        path,
        {**LIBRARY, "format": ROUTER, "steps": router.steps, "sites": router.sites, **router.about},
    )


def read_router_folder(config: StrPath, weights: StrPath) -> Router:
    """Read a router from its config.json and its logits.

    Raises:
        FileNotFoundError: if one of the two is missing.
        ValueError: if config.json is not a router's, or the two do not fit.
    """
    about = read_json(config)
    if about.pop("format", None) != ROUTER:
        raise ValueError(
            f'{config} is not a router: it has no "format": "{ROUTER}"; is it a schedule?'
        )
    about.pop("library", None)
    try:
        steps, sites, logits = (
            about.pop("steps"),
            about.pop("sites"),
            read_tensors(weights)[0]["logits"],
        )
        router = _router(logits, sites, about)
        if steps != router.steps:
            raise ValueError(f"steps is {steps!r:.40}, the logits are for {router.steps}")
        return router
    except (LookupError, TypeError, ValueError) as error:
        raise refused(config, "is not a valid router", f"{type(error).__name__}: {error}") from None


# ------------------------------------------------------------------------------------------
# SmoothCache


def write_smoothcache(schedule: Schedule, path: StrPath) -> None:
    """Write a schedule as SmoothCache's JSON, one list of 0 and 1 for each site, in execution
    order.

    blocks.3.attn and transformer_blocks.3.attn1 become attn-3, .attn2 attn2-3, .mlp and .ff mlp-3.
    Read back, the table is the same; names, timesteps and the rest are not in that format.

    Raises:
        FileNotFoundError: if the folder does not exist.
        ValueError: if a site is no attention or feed-forward of a numbered block, or two would get
            one name; or if the schedule forecasts, which that format cannot say.
    """
    if schedule.order:
        raise ValueError(
            f"the schedule's order is {schedule.order}; SmoothCache's format knows reuse only, order 0"
        )
    kinds = {"attn": "attn", "attn1": "attn", "attn2": "attn2", "mlp": "mlp", "ff": "mlp"}
    columns: dict[str, list[int]] = {}
    strange = []
    for site, column in zip(schedule.sites, schedule.compute.int().T.tolist(), strict=True):
        found = re.fullmatch(r"(?:transformer_)?blocks\.([0-9]+)\.(attn|attn1|attn2|mlp|ff)", site)
        name = f"{kinds[found[2]]}-{found[1]}" if found else ""
        if not found or name in columns:
            strange.append(site)
        columns[name] = column
    if strange:
        todo = "one attention, cross-attention and feed-forward for each numbered block can be, as blocks.3.attn"
        raise ValueError(
            f"{len(strange)} sites cannot be exported: {', '.join(strange[:8])}; {todo}"
        )
    write_json(path, columns)


def _smoothcache(path: StrPath, data: dict[str, list[Any]]) -> Schedule:
    """Return the schedule in SmoothCache's JSON: block by block, attention first, else in the
    file's order.
    """
    parsed = {name: re.fullmatch(r"(.+)-([0-9]{1,6})", name) for name in data}
    numbered = all(parsed.values())
    if not numbered and any(parsed.values()):
        raise ValueError(
            f"{path} mixes sites of one block (attn-0) with kinds (attn): {', '.join(data):.80}"
        )
    if len({len(column) for column in data.values()}) != 1:
        found = ", ".join(f"{name:.20} {len(column)}" for name, column in data.items())
        raise ValueError(
            f"{path} has lists of different lengths, one entry for each step was expected: {found:.80}"
        )
    columns: list[tuple[int, bool, str, list[bool]]] = []
    for name, column in data.items():
        if not all(
            isinstance(entry, int) and entry in (0, 1) for entry in column
        ):  # a bool is an int
            raise ValueError(
                f"{path} has {name:.40} with entries other than 0 and 1, true and false"
            )
        match = parsed[name]
        kind, block = (match[1], int(match[2])) if match else (name, 0)
        site = f"blocks.{block}.{kind}" if match else kind
        columns.append((block, "attn" not in kind, site, [bool(entry) for entry in column]))
    columns.sort(key=lambda column: column[:2])
    table = torch.tensor([column for *_, column in columns]).T  # (T, N)
    shape = "per block" if numbered else "per kind"
    provenance: dict[str, str | float] = {
        "format": f"SmoothCache, {shape}",
        "file": Path(path).name,
    }
    return _started(path, table, tuple(site for _, _, site, _ in columns), None, provenance)


# ------------------------------------------------------------------------------------------ router
# files


def _router_file(path: StrPath, tau: float) -> Schedule:
    """Return the schedule of a router file of Learning-to-Cache or HarmoniCa's authors, frozen at
    tau.
    """
    data = read_pickle(path)
    data = data if isinstance(data, dict) else {}
    args = data.get("args")
    told = vars(args) if isinstance(args, argparse.Namespace) else {}
    method, logits, may_reuse = _in_execution_order(_rows(path, data.get("routers", data)), told)
    if not 0.0 <= tau < 1.0:
        raise ValueError(
            f"tau is {tau}; it must be at least 0 (compute all) and below 1 (where nothing computes)"
        )
    compute = (logits.sigmoid() > tau) | ~may_reuse[:, None]  # (T, N)
    provenance: dict[str, str | float] = {
        "format": f"{method} router file",
        "file": Path(path).name,
        "tau": tau,
    }
    model = told.get("model")
    return _started(
        path,
        compute,
        _columns(logits.shape[1]),
        tau,
        provenance,
        model if isinstance(model, str) else "",
    )


def _rows(path: StrPath, routers: Any) -> Tensor:
    """Return the logits (T, N) in the file's order, from {"0.prob": (N,), …}."""
    routers = routers if isinstance(routers, dict) else {}
    found = {
        key: re.fullmatch(r"([0-9]{1,6})\.prob", key) if isinstance(key, str) else None
        for key in routers
    }
    rows = {int(match[1]): routers[key] for key, match in found.items() if match}
    if not rows or len(rows) != len(found):
        names = ", ".join(map(str, list(found)[:9]))
        raise ValueError(
            f'{path} is not a router file: "0.prob", "1.prob", … expected, found {names:.60}'
        )
    missing = [k for k in range(max(rows) + 1) if k not in rows]
    if missing:
        lacks = f"row {missing[0]} is missing" + (
            f", and {len(missing) - 1} more" if missing[1:] else ""
        )
        raise ValueError(f"{path} is not whole: of rows 0 to {max(rows)}, {lacks}")
    for k, row in rows.items():
        fits = is_plain(row) and row.dtype in WIDTHS and row.dim() == 1
        if not fits or len(row) != len(rows[0]) or not len(row) or not bool(row.isfinite().all()):
            raise ValueError(
                f"{path} has a row {k} that is not finite numbers, one for each site, as many as in row 0"
            )
    return torch.stack([rows[k].detach().float() for k in range(len(rows))])


def _in_execution_order(rows: Tensor, args: Mapping[str, Any]) -> tuple[str, Tensor, Tensor]:
    """Return who made a router file, its logits in execution order (T, N), and which steps may
    reuse (T,) bool.

    `args` are the settings in the file, if any: only HarmoniCa's have lambda_c and cfg_scale, only
    Learning-to-Cache,
    which trains on images, needs a data_path. Without them the values tell: what was never trained
    is still N(0, 1).
    """
    steps, width = rows.shape
    k = torch.arange(steps)
    trained = rows.abs().amax(1) > TRAINED  # (T,)
    odd, pair = k % 2 == 1, (k > 0) & (k < steps // 2)
    if width == 58 and not args and bool(trained[pair].any()) and torch.equal(trained, pair):
        # U-ViT runs a solver of two predictions a step: row i is for prediction 2i, in execution
        # order
        walk = torch.zeros_like(rows)
        walk[2 * k[pair]] = rows[pair]
        return "Learning-to-Cache U-ViT", walk, torch.isin(k, 2 * k[pair])
    if "lambda_c" in args or "cfg_scale" in args:
        return "HarmoniCa", rows.flip(0), torch.ones_like(odd)
    if "data_path" in args or (bool(trained[~odd].any()) and not bool(trained[odd].any())):
        return "Learning-to-Cache", rows.flip(0), ~odd.flip(0)
    return "HarmoniCa", rows.flip(0), torch.ones_like(odd)


def _columns(width: int) -> tuple[str, ...]:
    """Return the site names of a table of DiT-XL/2 (56) or U-ViT-H/2 (58), else none: a schedule's
    own names.
    """
    blocks = {
        56: [f"blocks.{i}" for i in range(28)],
        58: [f"in_blocks.{i}" for i in range(14)],
    }.get(width, [])
    if width == 58:
        blocks += ["mid_block", *(f"out_blocks.{i}" for i in range(14))]
    return tuple(f"{block}.{kind}" for block in blocks for kind in ("attn", "mlp"))


def _started(
    path: StrPath,
    table: Tensor,
    sites: tuple[str, ...],
    tau: float | None,
    provenance: dict[str, str | float],
    model: str = "",
) -> Schedule:
    """Return a schedule whose first step computes, noting where the table (T, N) let it reuse."""
    if len(table) and not bool(table[0].all()):
        count = int((~table[0]).sum())
        provenance["first_step"] = (
            f"computes, although the file lets {count} of its {table.shape[1]} sites reuse"
        )
        table[0] = True
    try:
        return Schedule(table, sites, model=model, threshold=tau, provenance=provenance)
    except ValueError as error:
        raise refused(path, "is not a valid schedule", error) from None
