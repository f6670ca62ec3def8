"""Foreign: tables that other people's programs wrote, as the fields of a schedule.

    SmoothCache    JSON: {"attn-0": [1, 0, …], …} for each block or {"attn": […], …} for each kind
                   of site; 1 = compute
    InvarDiff      JSON of its DiT or Flux: {"step_cache_book": [T], "msa_cache_book": [T][N], …};
                   there true = reuse; a step that is true reuses all
    router file    torch's zip, by Learning-to-Cache or HarmoniCa's authors: {"routers": {"0.prob":
                   (N,), …}, "opt": …, "args": Namespace}, or the inner dict alone; logits

Which rows of a router file may reuse, and in what order they run, differs:
docs/decisions/0004-files-of-other-people.md. A first step that would reuse is made to compute, and
`provenance` says so. What is no such file, or not whole, is a ValueError, to which
`read_schedule` adds the file's name. This file does not know how tables are used.
"""

import argparse
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from harmonica.site_names import block_and_word
from harmonica.storage.files import FLOATS, is_plain, write_json
from harmonica.values import StrPath, require

TRAINED = 4.5  # one in 150 000 logits of N(0, 1) is larger; training ends near 5 or far beyond


def _fields(table: Tensor, names: Sequence[str], source: str) -> dict[str, Any]:
    """Return the fields of a schedule for a table (T, N) bool, its first step made to compute."""
    provenance: dict[str, str | float] = {"format": source}
    count = int((~table[:1]).sum())
    if count:
        some = f"{count} of its {table.shape[1]} sites"
        provenance["first_step"] = f"computes, although the file lets {some} reuse"
        table[0] = True
    return {"compute": table, "sites": names, "provenance": provenance}


def write_smoothcache(path: StrPath, schedule: Any) -> None:
    """Write a `Schedule` as SmoothCache's JSON, one list of 0 and 1 for each site.

    blocks.3.attn and transformer_blocks.3.attn1 become attn-3, .attn2 attn2-3, .mlp and .ff mlp-3.
    Read back, the table is the same; names, timesteps and the rest are not in that format. Raises
    ValueError for a table with weights or an order, which that format does not know, and for sites
    that are no attention or feed-forward of a numbered block, or would get the name of another.
    """
    reuses = schedule.gate_weights is None
    require(reuses, "this schedule has weights or an order; SmoothCache's format only reuses")
    columns: dict[str, list[int]] = {}
    strange = []
    for site, column in zip(schedule.sites, schedule.compute.int().T.tolist(), strict=True):
        block, word = block_and_word(site) or (0, "")
        name = f"{word}-{block}"
        if word not in ("attn", "attn2", "mlp") or name in columns:
            strange.append(site)
        columns[name] = column
    which = f"{len(strange)} sites cannot be exported: {', '.join(strange[:8])}"
    rule = "one attention, cross-attention and feed-forward for each numbered block can be"
    require(not strange, f"{which}; {rule}, as blocks.3.attn")
    write_json(path, columns)


def read_smoothcache(data: Mapping[str, list[Any]]) -> dict[str, Any]:
    """Return the fields of the schedule in SmoothCache's JSON, sorted by block, attention first."""
    matches = {name: re.fullmatch(r"(.+)-([0-9]{1,6})", name) for name in data}
    numbered, names = all(matches.values()), ", ".join(data)
    mixed = f"it mixes sites of one block (attn-0) with kinds (attn): {names:.80}"
    require(numbered or not any(matches.values()), mixed)
    lengths = ", ".join(f"{name:.20} {len(column)}" for name, column in data.items())
    uneven = f"it has lists of different lengths, not one entry for each step: {lengths:.80}"
    require(len(set(map(len, data.values()))) == 1, uneven)
    columns = []
    for name, match in matches.items():
        binary = all(isinstance(entry, int) and entry in (0, 1) for entry in data[name])
        require(binary, f"it has {name:.40} with entries other than 0 and 1, true and false")
        kind, block = (match[1], int(match[2])) if match else (name, 0)
        site = f"blocks.{block}.{kind}" if match else kind
        columns.append((block, "attn" not in kind, site, [entry == 1 for entry in data[name]]))
    columns.sort(key=lambda column: column[:2])
    table = torch.tensor([column for *_, column in columns], dtype=torch.bool).T  # (T, N)
    shape = "per block" if numbered else "per kind"
    return _fields(table, [site for _, _, site, _ in columns], f"SmoothCache, {shape}")


_DOUBLE, _SINGLE = "transformer_blocks.{}.", "single_transformer_blocks.{}."
BOOKS = {
    ("msa_cache_book", ""): ["blocks.{}.attn"],
    ("mlp_cache_book", ""): ["blocks.{}.mlp"],
    ("transformer_cache_book", "attn"): [f"{_DOUBLE}attn"],
    ("transformer_cache_book", "context_attn"): [f"{_DOUBLE}attn"],
    ("transformer_cache_book", "ff"): [f"{_DOUBLE}ff"],
    ("transformer_cache_book", "context_ff"): [f"{_DOUBLE}ff_context"],
    ("single_transformer_cache_book", "attn"): [f"{_SINGLE}attn", f"{_SINGLE}proj_out"],
    ("single_transformer_cache_book", "mlp"): [f"{_SINGLE}proj_mlp", f"{_SINGLE}proj_out"],
}
"""Which of our sites a book of a plan decides; where two decide one, it computes if either does."""


def read_invardiff(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of the schedule in InvarDiff's plan, sorted by block."""
    steps = _plan("step_cache_book", [data["step_cache_book"]]).T  # (T, 1), true = reuse
    columns: dict[str, Tensor] = {}
    for (book, kind), sites in BOOKS.items():
        entries = data.get(book)
        if kind and entries is not None:
            by_kind = isinstance(entries, dict)
            require(by_kind, f"{book} is {entries!r:.40}; expected a plan for each kind of site")
            entries = entries.get(kind)
        if entries is None:
            continue
        plan = _plan(f"{book} {kind}".strip(), entries)
        uneven = f"{book} has {len(plan)} steps and step_cache_book {len(steps)}"
        require(len(plan) == len(steps), uneven)
        for block, reuses in enumerate((plan | steps).T):
            for site in (name.format(block) for name in sites):
                columns[site] = columns.get(site, torch.zeros(len(steps)).bool()) | ~reuses
    books = ", ".join(dict.fromkeys(book for book, _ in BOOKS))
    require(bool(columns), f"it has no book of sites; expected one of {books}")
    order = {site: (site.startswith("single"), int(site.split(".")[1])) for site in columns}
    names = sorted(columns, key=lambda site: order[site])  # stable: attention first
    return _fields(torch.stack([columns[site] for site in names], 1), names, "InvarDiff")


def _plan(book: str, entries: Any) -> Tensor:
    """Return a book as (T, blocks) bool."""
    rows = entries if isinstance(entries, list) else []
    widths = {len(row) if isinstance(row, list) else 0 for row in rows}
    plan = len(widths) == 1 and 0 not in widths and all(type(e) is bool for r in rows for e in r)
    require(plan, f"{book} is not a list of steps with true and false for each block")
    return torch.tensor(rows)


def read_router_file(data: Any, tau: float) -> dict[str, Any]:
    """Return the fields of the schedule that another project's router file gives at τ."""
    data = data if isinstance(data, dict) else {}
    args = data.get("args")
    settings = vars(args) if isinstance(args, argparse.Namespace) else {}
    method, logits, may_reuse = _in_execution_order(_rows(data.get("routers", data)), settings)
    require(0.0 <= tau < 1.0, f"tau is {tau}; it must be 0 (compute all) or more, and below 1")
    compute = (logits.sigmoid() > tau) | ~may_reuse[:, None]  # (T, N)
    fields = _fields(compute, _site_names(logits.shape[1]), f"{method} router file")
    fields["provenance"]["tau"] = tau
    model = settings.get("model")
    return {**fields, "threshold": tau, "model": model if isinstance(model, str) else ""}


def _rows(routers: Any) -> Tensor:
    """Return the logits (T, N) in the file's order, from {"0.prob": (N,), …}."""
    routers = routers if isinstance(routers, dict) else {}
    matches = {key: re.fullmatch(r"([0-9]{1,6})\.prob", str(key)) for key in routers}
    rows = {int(match[1]): routers[key] for key, match in matches.items() if match}
    has = f"it has {', '.join(map(str, list(routers)[:9])):.60}"
    strange = f'it is no router file: {has} where "0.prob", "1.prob", … are expected'
    require(0 < len(rows) == len(routers), strange)
    missing = [k for k in range(max(rows) + 1) if k not in rows]
    require(not missing, f"it is not whole: of rows 0 to {max(rows)}, {missing[:8]} are missing")
    for k, row in rows.items():
        fits = is_plain(row) and row.dtype in FLOATS and row.dim() == 1
        fits = fits and 0 < len(row) == len(rows[0]) and bool(row.isfinite().all())
        require(fits, f"it has a row {k} that is not finite numbers, as many as in row 0")
    return torch.stack([rows[k].detach().float() for k in range(len(rows))])


def _in_execution_order(rows: Tensor, args: Mapping[str, Any]) -> tuple[str, Tensor, Tensor]:
    """Return who made a router file, its logits in execution order (T, N), and which steps may
    reuse (T,) bool.

    `args` are the settings in the file, if any: only HarmoniCa's have lambda_c and cfg_scale, only
    those of Learning-to-Cache, which trains on images, have a data_path. Without them the values
    tell: a row that was never trained is still N(0, 1).
    """
    steps, width = rows.shape
    k = torch.arange(steps)
    trained = rows.abs().amax(1) > TRAINED  # (T,)
    odd, pair = k % 2 == 1, (k > 0) & (k < steps // 2)
    if width == 58 and not args and bool(trained[pair].any()) and torch.equal(trained, pair):
        # U-ViT runs a solver of two predictions a step: row i is for prediction 2i, as executed
        walk = torch.zeros_like(rows)
        walk[2 * k[pair]] = rows[pair]
        return "Learning-to-Cache U-ViT", walk, torch.isin(k, 2 * k[pair])
    ours = "lambda_c" in args or "cfg_scale" in args
    every_other = bool(trained[~odd].any()) and not bool(trained[odd].any())
    if not ours and ("data_path" in args or every_other):
        return "Learning-to-Cache", rows.flip(0), ~odd.flip(0)
    return "HarmoniCa", rows.flip(0), torch.ones_like(odd)


def _site_names(width: int) -> tuple[str, ...]:
    """Return the site names of DiT-XL/2 for 56 columns, of U-ViT-H/2 for 58, else none."""
    halves = [[f"{half}_blocks.{i}" for i in range(14)] for half in ("in", "out")]
    uvit = [*halves[0], "mid_block", *halves[1]]
    blocks = {56: [f"blocks.{i}" for i in range(28)], 58: uvit}.get(width, [])
    return tuple(f"{block}.{kind}" for block in blocks for kind in ("attn", "mlp"))
