"""Hub: how routers and schedules are saved, loaded, published and fetched; the base classes of
both.

    a router's folder      config.json (steps, sites, what it was made for), model.safetensors (logits), README.md
    a schedule's folder    config.json (the readable table itself), README.md

The same folder is a repository on the Hugging Face Hub. The Hub's client is imported when it is
needed. What stands inside a file is harmonica.storage.formats' to say; this file does not know how
tables are made.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, TypeVar, cast

from harmonica.storage.files import StrPath

if TYPE_CHECKING:
    from harmonica.router import Router, Schedule

CARD = """---
library_name: harmonica
tags:
- harmonica
- feature-caching
- diffusion
---

# {kind} for {model}

{summary}. Made with HarmoniCa, learned feature caching for diffusion transformers (ICML 2025, arXiv 2410.01723).

```python
from harmonica import {kind}

{use}
print(schedule)  # which step computes which site, and which one it reuses
```

What it was made for and how: config.json.
"""
"""The model card; braces are filled in by `card`."""

T = TypeVar("T", bound="HubFiles")


class HubFiles:
    """What a router and a schedule share: a folder of files, here or on the Hub."""

    PARTS: ClassVar[tuple[str, ...]] = ("config.json",)

    def save_pretrained(self, folder: StrPath) -> None:
        """Write the folder: all files are built beside it, then each is renamed into place,
        config.json last.

        Files of the same names are replaced, README.md too; others in the folder stay.

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
        beside = folder.with_name(f"{folder.name}.{uuid.uuid4().hex[:8]}.part")
        try:
            beside.mkdir()
            self._write(beside, folder.name)
            folder.mkdir(exist_ok=True)
            for part in ("README.md", *reversed(self.PARTS)):
                (beside / part).replace(folder / part)
        finally:
            shutil.rmtree(beside, ignore_errors=True)

    @classmethod
    def from_pretrained(
        cls: type[T],
        folder_or_repo_id: StrPath,
        *,
        revision: str | None = None,
        token: str | None = None,
        cache_dir: StrPath | None = None,
        local_files_only: bool = False,
    ) -> T:
        """Read what `save_pretrained` or `push_to_hub` wrote; a folder of that name comes before a
        repository.

        Args:
            folder_or_repo_id: a folder, or owner/name on the Hub.
            revision: branch, tag or commit; the main branch if None.
            token: for a private repository; the one that is logged in if None.
            cache_dir: where downloads are kept; the Hub client's own place if None.
            local_files_only: use the cache, never the network.

        Raises:
            FileNotFoundError: if there is no such folder or repository, or it is out of reach, or
                lacks a file.
            ValueError: if the name cannot be a repository's, or the files are not what was asked
                for.
        """
        folder = Path(folder_or_repo_id)
        if not folder.is_dir():
            name = os.fspath(folder_or_repo_id)
            folder = download(name, cls.PARTS, revision, token, cache_dir, local_files_only)
        return cast(T, cls._read(folder))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = False,
        token: str | None = None,
        commit_message: str = "Upload a table made with HarmoniCa",
        revision: str | None = None,
    ) -> str:
        """Upload the folder as one commit, making the repository if it is new; return its address.

        Args:
            repo_id: owner/name, or a name among one's own.
            private: of a new repository; an old one stays as it is.
            token: one that may write; the one that is logged in if None.
            commit_message: what the commit says.
            revision: branch to commit to, made if it is new; the main branch if None.

        Errors of the Hub's client (no token, no right to write, no network) are passed on as they
        are.
        """
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        name = repo_id if "/" in repo_id else address.repo_id
        if revision is not None:
            api.create_branch(name, branch=revision, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self._write(Path(folder), name)
            api.upload_folder(
                repo_id=name, folder_path=folder, commit_message=commit_message, revision=revision
            )
        return str(address)

    def _write(self, folder: Path, name: str) -> None:
        raise NotImplementedError

    @classmethod
    def _read(cls, folder: Path) -> HubFiles:
        raise NotImplementedError


def download(
    repo_id: str,
    parts: tuple[str, ...],
    revision: str | None,
    token: str | None,
    cache_dir: StrPath | None,
    local_files_only: bool,
) -> Path:
    """Return the folder in the cache that holds `parts` of a repository, all of the same commit.

    Raises:
        FileNotFoundError: if there is no such repository or revision, or it is neither cached nor
            in reach.
        ValueError: if repo_id cannot be the name of a repository.
    """
    from huggingface_hub import errors, snapshot_download

    where = f"{repo_id}: no such folder here, and"
    try:
        found = snapshot_download(
            repo_id,
            revision=revision,
            token=token,
            cache_dir=None if cache_dir is None else Path(cache_dir),
            local_files_only=local_files_only,
            allow_patterns=list(parts),
        )
    except errors.HFValidationError:
        raise ValueError(
            f"{where} not the name of a repository on the Hub, which is owner/name"
        ) from None
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
        asked = f"{repo_id} at {revision or 'main'}"
        raise FileNotFoundError(
            f"{where} the Hub shows no {asked}; if it is private, pass token="
        ) from None
    except errors.LocalEntryNotFoundError:
        todo = "pass a folder, or go online once without local_files_only"
        raise FileNotFoundError(
            f"{where} the repository is neither cached nor in reach; {todo}"
        ) from None
    return Path(found)


class ScheduleFiles(HubFiles):
    """The files of a schedule; base of `Schedule`."""

    def save(self, path: StrPath) -> None:
        """Write readable JSON: for each site one string of T digits, 1 = compute."""
        from harmonica.storage.formats import write_schedule

        write_schedule(cast("Schedule", self), path)

    @classmethod
    def load(cls, path: StrPath, tau: float = 0.1) -> Schedule:
        """Read a schedule, or someone else's table; see `harmonica.storage.formats.read_schedule`.

        What the file is shows in its content: our JSON, a router of ours (.safetensors),
            SmoothCache's JSON, or a
        router file (.pt, .pth) of Learning-to-Cache or of HarmoniCa's authors. Routers are frozen
        at `tau`; others ignore it.
        Where another's first step would reuse, it is made to compute, and `provenance` says so.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is none of these, or damaged, or holds code; code is never run.
        """
        from harmonica.storage.formats import read_schedule

        return read_schedule(path, tau)

    def export_smoothcache(self, path: StrPath) -> None:
        """Write the table as SmoothCache's JSON, one list of 0 and 1 for each attention and
        feed-forward.

        Raises ValueError naming the sites that are not one of these in a numbered block.
        """
        from harmonica.storage.formats import write_smoothcache

        write_smoothcache(cast("Schedule", self), path)

    def _write(self, folder: Path, name: str) -> None:
        schedule = cast("Schedule", self)
        schedule.save(folder / "config.json")
        summary = f"{schedule.steps} steps × {len(schedule.sites)} sites, {100 * schedule.cur:.1f} % of them reused"
        use = f'schedule = Schedule.from_pretrained("{name}")'
        card = CARD.format(
            kind="Schedule", model=schedule.model or "an unnamed model", summary=summary, use=use
        )
        (folder / "README.md").write_text(card, encoding="utf-8")

    @classmethod
    def _read(cls, folder: Path) -> Schedule:
        from harmonica.storage.formats import read_our_schedule

        return read_our_schedule(folder / "config.json")


class RouterFiles(HubFiles):
    """The files of a router; base of `Router`."""

    PARTS = ("config.json", "model.safetensors")

    def save(self, path: StrPath) -> None:
        """Write logits, site names and `about` as safetensors."""
        from harmonica.storage.formats import write_router

        write_router(cast("Router", self), path)

    @classmethod
    def load(cls, path: StrPath) -> Router:
        """Read a router, or the one in a checkpoint; raises FileNotFoundError, or ValueError if the
        file is not one.
        """
        from harmonica.storage.formats import read_router

        return read_router(path)[0]

    def _write(self, folder: Path, name: str) -> None:
        from harmonica.storage.formats import write_router_config

        router = cast("Router", self)
        write_router_config(router, folder / "config.json")
        router.save(folder / "model.safetensors")
        summary = f"A learned table of {router.steps} steps × {len(router.sites)} sites"
        use = f'schedule = Router.from_pretrained("{name}").schedule(tau=0.1)'
        model = str(router.about.get("model") or "an unnamed model")
        card = CARD.format(kind="Router", model=model, summary=summary, use=use)
        (folder / "README.md").write_text(card, encoding="utf-8")

    @classmethod
    def _read(cls, folder: Path) -> Router:
        from harmonica.storage.formats import read_router_folder

        return read_router_folder(folder / "config.json", folder / "model.safetensors")
