"""Files: safetensors and JSON, whole or not at all.

A file is written beside its name and then renamed, so a reader sees the old one or the new one and a full disk or a
killed process leaves the old one in place. Nothing is pickled: reading a file executes nothing.

This file does not know what the tensors and the JSON mean.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

StrPath = str | os.PathLike[str]


def existing(path: StrPath) -> Path:
    """Return path as a Path.

    Raises:
        FileNotFoundError: if there is no such file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    return Path(path)


def write_whole(path: StrPath, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a file beside `path`, then rename it to `path`.

    The name beside carries the process's number: two runs that write one file do not tread on each other's half.

    Raises:
        FileNotFoundError: if the folder does not exist.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent}: no such folder; make it before writing {path.name}")
    beside = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        write(beside)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def write_json(path: StrPath, data: Mapping[str, Any]) -> None:
    """Write JSON a person can read: a line for each key, and for each key of the mappings inside."""

    def one_line(value: Any) -> str:
        return json.dumps(value, ensure_ascii=True)

    entries = []
    for key, value in data.items():
        if isinstance(value, Mapping) and value:
            inner = ",\n".join(f"  {one_line(k)}: {one_line(v)}" for k, v in value.items())
            entries.append(f" {one_line(key)}: {{\n{inner}\n }}")
        else:
            entries.append(f" {one_line(key)}: {one_line(value)}")
    text = "{\n" + ",\n".join(entries) + "\n}\n"
    write_whole(path, lambda beside: beside.write_text(text, encoding="ascii"))


def read_json(path: StrPath) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not a JSON object.
    """
    try:
        data = json.loads(existing(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds a JSON {type(data).__name__}; an object was expected")
    return data


def read_pickle(path: StrPath) -> Any:
    """Unpickle tensors, containers and argparse.Namespace, a plain bag of values; anything else is refused unread.

    Raises:
        ValueError: if there is anything else in it, or it is damaged. torch's own message would advise to run the file.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # for this call; nobody else's loads change
            return torch.load(existing(path), map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception:  # bytes that someone made up can raise anything here
        found = "is damaged, or holds more than tensors and settings"
        raise ValueError(f"{path} {found}; nothing in it was run") from None


def write_tensors(path: StrPath, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write tensors as safetensors, facts (anything JSON can say) in its metadata."""
    from safetensors.torch import save_file

    whole = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    metadata = {key: json.dumps(value) for key, value in facts.items()}
    write_whole(path, lambda beside: save_file(whole, beside, metadata))


def read_tensors(path: StrPath) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write_tensors` wrote.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not safetensors, or its facts are not JSON.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(existing(path), framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (a handle, not a dict)
            return tensors, {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
    except (SafetensorError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a safetensors file of ours: {error}") from None
