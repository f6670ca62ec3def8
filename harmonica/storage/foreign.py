"""Foreign: tables that other people's programs wrote, as the fields of a schedule.

    SmoothCache    JSON: {"attn-0": [1, 0, …], …} for each block or {"attn": […], …} for each kind
                   of site; 1 = compute
    InvarDiff      JSON of its DiT or Flux: {"step_cache_book": [T], "msa_cache_book": [T][N], …};
                   there true = reuse; a step that is true reuses all
    router file    torch's zip, by Learning-to-Cache or HarmoniCa's authors: {"routers": {"0.prob":
                   (N,), …}, "opt": …, "args": Namespace}, or the inner dict alone; logits

Which rows of a router file may reuse, and in what order they run, differs:
docs/decisions/0004-files-of-other-people.md. A first step that would reuse is made to compute, and
`provenance` says so. This file does not know how tables are used.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harmonica.site_names import block_and_word
from harmonica.storage.files import StrPath, is_plain, read_pickle, write_json

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
TRAINED = 4.5
"""A logit drawn from N(0, 1) is larger once in 150 000 times; one that training moved ends near 5
or far beyond."""


def _fields(path: StrPath, table: Tensor, sites: Sequence[str], source: str) -> dict[str, Any]:
    """Return the fields of a schedule for a table (T, N) bool, its first step made to compute."""
    provenance: dict[str, str | float] = {"format": source, "file": Path(path).name}
    count = int((~table[:1]).sum())
    if count:
        some = f"{count} of its {table.shape[1]} sites"
        provenance["first_step"] = f"computes, although the file lets {some} reuse"
        table[0] = True
    return {"compute": table, "sites": sites, "provenance": provenance}


# ------------------------------------------------------------------------------------------
# SmoothCache


def write_smoothcache(path: StrPath, sites: Sequence[str], compute: Tensor) -> None:
    """Write a table (T, N) as SmoothCache's JSON, one list of 0 and 1 for each site.

    blocks.3.attn and transformer_blocks.3.attn1 become attn-3, .attn2 attn2-3, .mlp and .ff mlp-3.
    Read back, the table is the same; names, timesteps and the rest are not in that format.

    Raises:
        FileNotFoundError: if the folder does not exist.
        ValueError: naming the sites that are no attention or feed-forward of a numbered block, or
            would get the name of another.
    """
    columns: dict[str, list[int]] = {}
    strange = []
    for site, column in zip(sites, compute.int().T.tolist(), strict=True):
        block, word = block_and_word(site) or (0, "")
        name = f"{word}-{block}"
        if word not in ("attn", "attn2", "mlp") or name in columns:
            strange.append(site)
        columns[name] = column
    if strange:
        expected = "one attention, cross-attention and feed-forward for each numbered block"
        raise ValueError(
            f"{len(strange)} sites cannot be exported: {', '.join(strange[:8])}; "
            f"{expected} can be, as blocks.3.attn"
        )
    write_json(path, columns)


def read_smoothcache(path: StrPath, data: Mapping[str, list[Any]]) -> dict[str, Any]:
    """Return the fields of the schedule in SmoothCache's JSON, sorted by block, attention first.

    Raises ValueError naming the file if the lists differ in length or hold other than 0 and 1, or
    if names of single sites and of kinds are mixed.
    """
    parsed = [(re.fullmatch(r"(.+)-([0-9]{1,6})", name), name) for name in data]
    numbered = all(match for match, _ in parsed)
    if not numbered and any(match for match, _ in parsed):
        names = ", ".join(data)
        raise ValueError(f"{path} mixes sites of one block (attn-0) with kinds (attn): {names:.80}")
    if len({len(column) for column in data.values()}) != 1:
        lengths = ", ".join(f"{name:.20} {len(column)}" for name, column in data.items())
        raise ValueError(
            f"{path} has lists of different lengths, one entry for each step was expected: "
            f"{lengths:.80}"
        )
    columns: list[tuple[int, bool, str, list[bool]]] = []
    for match, name in parsed:
        if not all(isinstance(entry, int) and entry in (0, 1) for entry in data[name]):
            raise ValueError(
                f"{path} has {name:.40} with entries other than 0 and 1, true and false"
            )
        kind, block = (match[1], int(match[2])) if match else (name, 0)
        site = f"blocks.{block}.{kind}" if match else kind
        columns.append((block, "attn" not in kind, site, [entry == 1 for entry in data[name]]))
    columns.sort(key=lambda column: column[:2])
    table = torch.tensor([column for *_, column in columns], dtype=torch.bool).T  # (T, N)
    shape = "per block" if numbered else "per kind"
    return _fields(path, table, [site for _, _, site, _ in columns], f"SmoothCache, {shape}")


# ------------------------------------------------------------------------------------------
# InvarDiff

BOOKS: Mapping[str, Mapping[str, str]] = {
    "msa_cache_book": {"": "blocks.{}.attn"},
    "mlp_cache_book": {"": "blocks.{}.mlp"},
    "transformer_cache_book": {
        "attn": "transformer_blocks.{}.attn",
        "context_attn": "transformer_blocks.{}.attn",
        "ff": "transformer_blocks.{}.ff",
        "context_ff": "transformer_blocks.{}.ff_context",
    },
    "single_transformer_cache_book": {
        "attn": "single_transformer_blocks.{}.attn",
        "mlp": "single_transformer_blocks.{}.proj_mlp",
    },
}
"""Which of our sites an entry of a plan decides; where two decide one, it computes if either does.
The projection that ends a single block reads both, and computes if either does."""


def read_invardiff(path: StrPath, data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of the schedule in InvarDiff's plan, sorted by block.

    Raises ValueError naming the file if it lacks a book, or a book is not (T, blocks) of true and
    false.
    """
    steps = _plan(path, "step_cache_book", [data["step_cache_book"]]).T  # (T, 1), true = reuse
    columns: dict[str, Tensor] = {}
    for book, kinds in BOOKS.items():
        for kind, name in kinds.items():
            entries = data.get(book) if not kind else (data.get(book) or {}).get(kind)
            if entries is None:
                continue
            plan = _plan(path, f"{book} {kind}".strip(), entries)
            if len(plan) != len(steps):
                found = f"{book} has {len(plan)} steps and step_cache_book {len(steps)}"
                raise ValueError(f"{path}: {found}; they must be the same")
            for block, reuses in enumerate((plan | steps).T):
                sites = [name.format(block)]
                if sites[0].startswith("single"):
                    sites.append(f"single_transformer_blocks.{block}.proj_out")
                for site in sites:
                    columns[site] = columns.get(site, torch.zeros(len(steps)).bool()) | ~reuses
    if not columns:
        raise ValueError(f"{path} has no book of sites; expected one of {', '.join(BOOKS)}")
    order = {site: (site.startswith("single"), int(site.split(".")[1])) for site in columns}
    sites = sorted(columns, key=lambda site: order[site])  # stable: attention first
    return _fields(path, torch.stack([columns[site] for site in sites], 1), sites, "InvarDiff")


def _plan(path: StrPath, book: str, entries: Any) -> Tensor:
    """Return a book as (T, blocks) bool."""
    rows = entries if isinstance(entries, list) else []
    widths = {len(row) if isinstance(row, list) else 0 for row in rows}
    if len(widths) != 1 or 0 in widths or not all(type(e) is bool for row in rows for e in row):
        raise ValueError(
            f"{path}: {book} is not a list of steps with true and false for each block"
        )
    return torch.tensor(rows)


# ------------------------------------------------------------------------------------------
# router files


def read_router_file(path: StrPath, tau: float) -> dict[str, Any]:
    """Return the fields of the schedule that a router file of Learning-to-Cache or of HarmoniCa's
    authors gives at τ.

    Raises ValueError if tau is not in [0, 1), or the file is not such a file or not whole.
    """
    data = read_pickle(path)
    data = data if isinstance(data, dict) else {}
    args = data.get("args")
    settings = vars(args) if isinstance(args, argparse.Namespace) else {}
    method, logits, may_reuse = _in_execution_order(
        _rows(path, data.get("routers", data)), settings
    )
    if not 0.0 <= tau < 1.0:
        limits = "at least 0 (compute all) and below 1 (where nothing computes)"
        raise ValueError(f"tau is {tau}; it must be {limits}")
    compute = (logits.sigmoid() > tau) | ~may_reuse[:, None]  # (T, N)
    fields = _fields(path, compute, _site_names(logits.shape[1]), f"{method} router file")
    fields["provenance"]["tau"] = tau
    model = settings.get("model")
    return {**fields, "threshold": tau, "model": model if isinstance(model, str) else ""}


def _rows(path: StrPath, routers: Any) -> Tensor:
    """Return the logits (T, N) in the file's order, from {"0.prob": (N,), …}."""
    routers = routers if isinstance(routers, dict) else {}
    rows = {}
    for key, row in routers.items():
        match = re.fullmatch(r"([0-9]{1,6})\.prob", key) if isinstance(key, str) else None
        if match:
            rows[int(match[1])] = row
    if not rows or len(rows) != len(routers):
        names = ", ".join(map(str, list(routers)[:9]))
        expected = '"0.prob", "1.prob", … expected'
        raise ValueError(f"{path} is not a router file: {expected}, found {names:.60}")
    missing = [k for k in range(max(rows) + 1) if k not in rows]
    if missing:
        more = f", and {len(missing) - 1} more" if missing[1:] else ""
        lack = f"row {missing[0]} is missing{more}"
        raise ValueError(f"{path} is not whole: of rows 0 to {max(rows)}, {lack}")
    for k, row in rows.items():
        fits = is_plain(row) and row.dtype in FLOATS and row.dim() == 1
        if not fits or len(row) != len(rows[0]) or not len(row) or not bool(row.isfinite().all()):
            expected = "finite numbers, one for each site, as many as in row 0"
            raise ValueError(f"{path} has a row {k} that is not {expected}")
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
    if width == 56:
        blocks = [f"blocks.{i}" for i in range(28)]
    elif width == 58:
        blocks = [f"in_blocks.{i}" for i in range(14)] + ["mid_block"]
        blocks += [f"out_blocks.{i}" for i in range(14)]
    else:
        return ()
    return tuple(f"{block}.{kind}" for block in blocks for kind in ("attn", "mlp"))
