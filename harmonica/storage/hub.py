"""Hub: folders of the Hugging Face Hub, here and there: what is written, published and fetched.

    a router's folder      router.safetensors and a model card, README.md
    a schedule's folder    schedule.json and a model card, README.md
    a model's folder       as diffusers writes it; only read (harmonica.models.weights)

The table is the same file that `save` writes. The Hub's client is imported when it is needed. This
file does not know what stands in a table.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from harmonica.storage.files import StrPath, write_whole

FILES = {"Router": "router.safetensors", "Schedule": "schedule.json"}
CARD = """---
library_name: harmonica
tags:
- harmonica
- feature-caching
- diffusion
---

# {kind} for {model}

Which layer of a diffusion transformer computes at which step, and which one reuses its last output.
Made with HarmoniCa, learned feature caching for diffusion transformers (ICML 2025, arXiv 2410.01723).

```python
from harmonica import {kind}

schedule = {kind}.from_pretrained("{name}"){freeze}
```

```
{drawing}
```
"""


class Card(NamedTuple):
    """What a folder's README.md says.

    Attributes:
        kind: "Router" or "Schedule".
        model: name of the model that the table is for, may be empty.
        drawing: the schedule as text.
    """

    kind: str
    model: str
    drawing: str

    def text(self, name: str) -> str:
        """Return the page of a repository or a folder of this name."""
        freeze = ".schedule(tau=0.1)" if self.kind == "Router" else ""
        fields = {**self._asdict(), "model": self.model or "an unnamed model"}
        return CARD.format(**fields, name=name, freeze=freeze)


def write_folder(folder: StrPath, save: Callable[[Path], None], card: Card, name: str = "") -> None:
    """Write the folder of a router or a schedule: its table, then the card.

    Each file is whole or not there; files of the same names are replaced, others stay.

    Args:
        folder: made if it is new.
        save: writes the table to a path.
        card: what README.md says.
        name: of the repository; the folder's own name if empty.

    Raises:
        FileNotFoundError: if the folder that this one is in does not exist.
        FileExistsError: if there is a file of that name.
    """
    folder = Path(folder).absolute()
    if not folder.parent.is_dir():
        raise FileNotFoundError(
            f"{folder.parent}: no such folder; make it before writing {folder.name}"
        )
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(
            f"{folder} is a file; save_pretrained writes a folder, choose another name"
        )
    folder.mkdir(exist_ok=True)
    try:
        save(folder / FILES[card.kind])
        text = card.text(name or folder.name)
        write_whole(folder / "README.md", lambda beside: beside.write_text(text, encoding="utf-8"))
    finally:
        with suppress(OSError):  # a folder with something in it stays
            folder.rmdir()


def push(
    repo_id: str,
    save: Callable[[Path], None],
    card: Card,
    private: bool = False,
    token: str | None = None,
) -> str:
    """Upload the folder that `write_folder` writes as one commit; return the repository's address.

    Args:
        repo_id: owner/name, or a name among one's own; made if it is new.
        save: writes the table to a path.
        card: what README.md says.
        private: of a new repository; an old one stays as it is.
        token: one that may write; the one that is logged in if None.

    Errors of the Hub's client (no token, no right to write, no network) are passed on as they are.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    address = api.create_repo(repo_id, private=private, exist_ok=True)
    name = repo_id if "/" in repo_id else address.repo_id
    message = f"Upload a {card.kind.lower()} made with HarmoniCa"
    with tempfile.TemporaryDirectory() as folder:
        write_folder(folder, save, card, name)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message=message)
    return str(address)


def table_file(source: StrPath, kind: str, revision: str | None, token: str | None) -> Path:
    """Return the file of a table, from a folder here or a repository on the Hub.

    Args:
        source: a folder, or owner/name; a folder of that name comes before a repository.
        kind: "Router" or "Schedule".
        revision: branch, tag or commit of a repository; the main branch if None.
        token: for a private repository; the one that is logged in if None.

    Raises:
        FileNotFoundError: if there is no such folder or repository, or it is out of reach, or holds
            no table of this kind.
        ValueError: if the name cannot be a repository's.
    """
    folder = Path(source)
    if not folder.is_dir():
        name = os.fspath(source)
        folder = download(name, list(FILES.values()), revision=revision, token=token)
    for other, file in FILES.items():
        if other != kind and (folder / file).is_file() and not (folder / FILES[kind]).is_file():
            raise ValueError(f"{source} holds a {other.lower()}; use {other}.from_pretrained(...)")
    return folder / FILES[kind]


def download(
    repo_id: str,
    patterns: Sequence[str],
    *,
    revision: str | None = None,
    token: str | None = None,
    otherwise: str = "pass a folder",
) -> Path:
    """Return the local copy of a repository's files, downloaded if need be.

    Args:
        repo_id: such as facebook/DiT-XL-2-256.
        patterns: files wanted, such as transformer/*.
        revision: branch, tag or commit; the main branch if None.
        token: for a private repository; the one that is logged in if None.
        otherwise: what else the user can do, for the error.

    Raises:
        FileNotFoundError: if there is no such repository or revision, or it is neither on this
            machine nor in reach.
        ValueError: if repo_id cannot be the name of a repository.
    """
    from huggingface_hub import errors, snapshot_download

    files = list(patterns)
    try:
        return Path(
            snapshot_download(repo_id, revision=revision, token=token, allow_patterns=files)
        )
    except errors.HFValidationError:
        problem = (
            "is no folder here, and not the name of a repository on the Hub, which is owner/name"
        )
        raise ValueError(f"{repo_id} {problem}") from None
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
        place = f"the Hub shows no {repo_id} at {revision or 'main'}"
        raise FileNotFoundError(
            f"{place}, and there is no such folder; if it is private, pass token="
        ) from None
    except (OSError, errors.HfHubHTTPError, errors.LocalEntryNotFoundError) as error:
        problem = f"is not on this machine and cannot be fetched ({type(error).__name__})"
        raise FileNotFoundError(
            f"{repo_id} {problem}; connect to the Hub once, or {otherwise}"
        ) from None
