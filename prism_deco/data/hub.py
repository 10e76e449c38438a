"""Parquet data sets on the Hugging Face hub: files are listed once, and each is on disk only while it is read."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import httpx  # the one that the hub's client uses

from prism_deco.config import cache_dir
from prism_deco.errors import UsageError
from prism_deco.files import read_json, write_json

LISTING = ".hub"
"""Suffix of the listings that `list_files` writes."""


@dataclass(frozen=True)
class HubFile:
    """A file of a data set repository, at one commit."""

    repo: str
    commit: str
    path: str
    size: int

    @property
    def suffix(self) -> str:
        return Path(self.path).suffix

    def __str__(self) -> str:
        return f"{self.repo}/{self.path} (commit {self.commit[:8]})"

    @contextmanager
    def on_disk(self) -> Iterator[Path]:
        """Downloads the file for the duration of the context."""
        with tempfile.TemporaryDirectory(dir=_folder(), prefix=".shard-") as folder:
            try:
                path = hf_hub_download(
                    self.repo, self.path, repo_type="dataset", revision=self.commit, local_dir=folder
                )
            except (OSError, httpx.HTTPError) as error:
                raise UsageError(f"{self} cannot be downloaded ({error}). The same command tries again.") from error
            yield Path(path)


def list_files(repo: str, pattern: str, revision: str) -> Path:
    """Lists the Parquet files of a repository that match a pattern, pinned to the current commit; returns the listing.

    The first call with these arguments writes it; later runs read the same files without asking the hub.
    """
    key = hashlib.sha256(json.dumps([repo, pattern, revision]).encode()).hexdigest()[:16]
    listing = _folder() / f"{repo.replace('/', '--')}-{key}{LISTING}"
    if listing.is_file():
        return listing
    api = HfApi()
    try:
        commit = api.dataset_info(repo, revision=revision).sha or revision
        entries = list(api.list_repo_tree(repo, recursive=True, revision=commit, repo_type="dataset"))
    except (OSError, ValueError, httpx.HTTPError) as error:
        raise UsageError(
            f"data.repo={repo} (revision {revision}) cannot be listed on the hub ({error}). Check its name and the "
            "network, or download it elsewhere and read the folder with data=embedded."
        ) from error
    tables = [entry for entry in entries if isinstance(entry, RepoFile) and entry.path.endswith(".parquet")]
    files = [HubFile(repo, commit, table.path, table.size) for table in tables if fnmatch(table.path, pattern)]
    files.sort(key=str)
    if not files:
        folders = sorted({str(Path(table.path).parent) for table in tables})
        there = f"There are some in {', '.join(folders[:20])}." if folders else "It has none at all."
        raise UsageError(f"data.files={pattern} matches no Parquet file of {repo}. {there}")
    write_json(listing, {"files": [asdict(file) for file in files]})
    return listing


def read_listing(path: Path) -> list[HubFile]:
    """The files in a listing of `list_files`."""
    listing = read_json(path, ["files"], hint="Delete it to list the files again.")
    return [HubFile(**file) for file in listing["files"]]


def _folder() -> Path:
    folder = cache_dir() / "hub"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
