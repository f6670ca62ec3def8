"""Formats: a schedule and a router as files of this library, and as plain dicts in memory.

    schedule   JSON: the fields of `Schedule`; its table as one string of T digits for each site,
               1 = compute; weights, if there are any, as base64 of (T, 1 + m) little-endian
               float32 for each site
    router     safetensors: logits (T−1, N); site names and `about` in the metadata; a checkpoint of
               training holds more tensors and facts beside them

A dict has the names and types that the constructor of `Schedule` or `Router` takes, so that
`Schedule(**read_schedule(path))` is the schedule. This file knows neither class. Tables of other
people are read by harmonica.storage.foreign.
"""

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from harmonica.schedule_fields import FACTS, checked_facts
from harmonica.storage import files, foreign
from harmonica.storage.files import FLOATS, decoding, existing
from harmonica.values import StrPath, require

FORMAT = "harmonica-schedule-1"
T = TypeVar("T")


def build(cls: type[T], path: StrPath, fields: Mapping[str, Any]) -> T:
    """Return cls(**fields); raise ValueError naming the file they are of if they do not fit."""
    with decoding(path, f"is not a valid {cls.__name__.lower()}"):
        return cls(**fields)


def is_router(path: StrPath) -> bool:
    """Say whether a file is safetensors, which begin with the length of a JSON header."""
    with existing(path).open("rb") as file:
        head = file.read(9)
    return head.endswith(b"{") and int.from_bytes(head[:8], "little") < 2**32


def write_schedule(path: StrPath, fields: Mapping[str, Any]) -> None:
    """Write the fields of a schedule as readable JSON, one line for each site."""
    facts = {name: fields[name] for name in FACTS}
    digits = ["".join(map(str, column)) for column in fields["compute"].int().T.tolist()]
    columns = dict(zip(fields["sites"], digits, strict=True))
    if fields["weights"] is not None:
        columns_of_weights = fields["weights"].numpy().astype("<f4").swapaxes(0, 1)
        facts["weights"] = [base64.b64encode(c.tobytes()).decode() for c in columns_of_weights]
    files.write_json(path, {"format": FORMAT, **facts, "compute": columns})


def read_schedule(path: StrPath, tau: float = 0.1) -> dict[str, Any]:
    """Read the fields of a schedule; the file's content tells its format, its name does not.

    It may be our JSON, SmoothCache's or InvarDiff's, or a router file (.pt, .pth) of
    Learning-to-Cache or of HarmoniCa's authors, which is frozen at τ, 0 ≤ tau < 1. That is 0.1
    for Learning-to-Cache's DiT routers and 0.9 for its U-ViT routers.

    Raises FileNotFoundError, or ValueError if the file is none of these, says something impossible,
    or holds more than tensors and settings; code in it is never run.
    """
    with existing(path).open("rb") as file:
        pickled = file.read(4).startswith((b"PK\x03\x04", b"\x80\x02"))  # a zip, or bare
    data = files.read_pickle(path) if pickled else files.read_json(path)
    with decoding(path, "is not a valid schedule"):
        if not pickled and "format" in data:
            return _ours(data)
        if pickled:
            fields = foreign.read_router_file(data, tau)
        elif "step_cache_book" in data:
            fields = foreign.read_invardiff(data)
        else:
            lists = bool(data) and all(isinstance(column, list) for column in data.values())
            require(lists, f'it has no "format": "{FORMAT}"')
            fields = foreign.read_smoothcache(data)
        fields["provenance"]["file"] = Path(path).name
        return fields


def _ours(data: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a schedule that `write_schedule` wrote; raise ValueError or KeyError."""
    name = data.pop("format")
    require(name == FORMAT, f'its format is {name!r:.40}; expected "{FORMAT}", is it newer?')
    columns, packed = data.pop("compute"), data.pop("weights", None)
    rule = "expected a string of 0 and 1 for each site, all of one length"
    require(isinstance(columns, dict) and columns != {}, f"compute is {columns!r:.40}; {rule}")
    for site, digits in columns.items():
        binary = isinstance(digits, str) and not set(digits) - set("01")
        require(binary, f"site {site:.80} has {digits!r:.40}; {rule}")
    lengths = sorted(set(map(len, columns.values())))
    require(len(lengths) == 1, f"its sites have {lengths} digits; {rule}")
    table = [[digit == "1" for digit in digits] for digits in columns.values()]  # (N, T)
    fields = {"sites": tuple(columns), **checked_facts(data)}
    fields["compute"] = torch.tensor(table, dtype=torch.bool).reshape(len(table), -1).T
    if packed is not None:
        fields["weights"] = _weights(packed, len(table), len(table[0]))
    return fields


def _weights(texts: Any, n_sites: int, steps: int) -> Tensor:
    """Return the weights (T, N, 1 + m) that a file holds as one text for each site."""
    what = f"weights must be a list of {n_sites} texts in base64, one for each site"
    try:
        columns = [base64.b64decode(text, validate=True) for text in texts]
    except (TypeError, ValueError):  # the decoder's own words say neither what nor where
        columns = []
    require(isinstance(texts, list) and len(columns) == n_sites, what)
    lengths, unit = sorted({len(column) for column in columns}), 4 * steps
    rule = f"the same number, a multiple of {unit} (float32 for {steps} steps)"
    whole = len(lengths) == 1 and lengths[0] > 0 and lengths[0] % unit == 0
    require(whole, f"the weights of the sites hold {lengths} bytes; each site needs {rule}")
    numbers = [np.frombuffer(column, "<f4").astype("=f4").reshape(steps, -1) for column in columns]
    return torch.from_numpy(np.stack(numbers, axis=1))


def write_router(
    path: StrPath, fields: Mapping[str, Any], beside: tuple[Mapping[str, Tensor], Any] = ({}, {})
) -> None:
    """Write logits, sites and `about` of a router, and tensors and facts of its training."""
    own = {"sites": fields["sites"], "about": fields["about"]}
    files.write_tensors(path, {"logits": fields["logits"], **beside[0]}, {**own, **beside[1]})


def read_router(path: StrPath) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Any]]:
    """Read a router's fields, and tensors and facts beside it; ValueError for another file."""
    tensors, facts = files.read_tensors(path)
    with decoding(path, "is not a valid router"):
        logits, names, about = tensors.pop("logits"), facts.pop("sites"), facts.pop("about")
        numbers = logits.dim() == 2 and logits.dtype in FLOATS
        require(numbers, "logits must be floating-point numbers, (steps − 1, sites)")
        named = isinstance(names, list) and all(isinstance(site, str) for site in names)
        require(named, f"sites must be a list of names, and is {names!r:.40}")
        described = isinstance(about, dict) and set(about) <= set(FACTS)
        require(described, f"about must be an object of {', '.join(FACTS)}, and is {about!r:.40}")
        fields = {"steps": len(logits) + 1, "sites": names, "logits": logits, "about": about}
    return fields, tensors, facts
