"""Downloads a published data set and arranges its images in the folders that the records name."""

from __future__ import annotations

import logging
import os
import shutil
import zipfile
import zlib
from collections.abc import Collection
from dataclasses import dataclass, fields
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import hf_hub_download, hf_hub_url
from rich.console import Console
from rich.progress import DownloadColumn, Progress, TransferSpeedColumn
from rich.table import Table
from rich.text import Text

from prism_deco.config import cache_dir, load_choice
from prism_deco.data.download import download
from prism_deco.data.images import ImageFolder
from prism_deco.data.records import open_records
from prism_deco.errors import UsageError
from prism_deco.files import nearest_existing

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Archive:
    """A ZIP archive of images."""

    url: str
    into: str  # folder of its images, relative to the image root; "." is the root itself
    gigabytes: float

    @property
    def file_name(self) -> str:
        """Its name on disk, until its images are extracted."""
        return f"{self.into.replace('/', '-')}-{self.url.rpartition('/')[2]}"


@dataclass(frozen=True)
class Dataset:
    """A data set that can be downloaded (`conf/data`, family `published`)."""

    name: str
    repo: str  # data set repository of the records on the Hugging Face hub
    json: str  # the records' file in the repository
    json_gigabytes: float
    image_root: str  # folder of the images, relative to the data set's
    archives: tuple[Archive, ...]
    revision: str = "main"  # commit, branch or tag of the repository
    endpoint: str | None = None  # URL of a mirror of the hub; None is HF_ENDPOINT, or the hub itself


@dataclass(frozen=True)
class DownloadPlan:
    """What is left to download, and the disk space it needs, in gigabytes."""

    root: Path
    downloads: dict[str, float]  # size of each file
    needed: float  # peak disk space; archives are deleted once their images are extracted
    free: float  # disk space

    def render(self) -> Table:
        """The plan as a rich table."""
        table = Table(title=Text(f"To download into {self.root}", "table.title"), show_footer=True)
        table.add_column("file", f"disk space needed: {self.needed:.2f} GB, free: {self.free:.2f} GB")
        table.add_column("size", f"{sum(self.downloads.values()):.2f} GB", justify="right")
        for name, size in self.downloads.items():
            table.add_row(Text(name), f"{size:.2f} GB")
        return table


def read_dataset(name: str) -> Dataset:
    """The data set of a YAML under `conf/data`; `UsageError` if it has nothing to download."""
    content = load_choice("data", name)
    if "archives" not in content:
        raise UsageError(f"data={name} has nothing to download: its files are your own, or rendered.")
    known = {field.name for field in fields(Dataset)}
    settings: dict[str, Any] = {key: value for key, value in content.items() if key in known}
    settings["archives"] = tuple(Archive(**archive) for archive in content["archives"])
    return Dataset(**settings)


def plan_download(dataset: Dataset, root: Path) -> DownloadPlan:
    """What `download_dataset` would download now: all archives if the records are missing."""
    archives = dataset.archives
    downloads = {}
    if (root / dataset.json).is_file():
        missing = _missing_images(dataset, root)
        archives = [archive for archive in archives if missing[archive.into]]
    else:
        downloads[dataset.json] = dataset.json_gigabytes
    downloads |= {archive.url: archive.gigabytes for archive in archives}
    # Photographs hardly compress: during extraction, an archive and its images take twice its size.
    needed = sum(downloads.values()) + max((archive.gigabytes for archive in archives), default=0)
    for archive in archives:
        for file in (root / archive.file_name, root / f"{archive.file_name}.part"):
            needed -= file.stat().st_size / 1e9 if file.is_file() else 0
    free = shutil.disk_usage(nearest_existing(root.absolute())).free
    return DownloadPlan(root, downloads, needed, free / 1e9)


def download_dataset(dataset: Dataset, root: Path) -> None:
    """Downloads the missing parts of a data set: an archive only if images of its folder are missing.

    It can be interrupted at any time; the next call resumes.
    """
    todo = plan_download(dataset, root)
    log.info("%s needs %.2f GB on disk; %.2f GB are free", dataset.name, todo.needed, todo.free)
    if todo.needed > todo.free:
        raise UsageError(
            f"{root} has {todo.free:.2f} GB free, but {dataset.name} needs {todo.needed:.2f} GB: choose another --root."
        )
    root.mkdir(parents=True, exist_ok=True)
    if not (root / dataset.json).is_file():
        _download_json(dataset, root)
    image_root = root / dataset.image_root
    missing = _missing_images(dataset, root)
    for archive in dataset.archives:
        if missing[archive.into]:
            _fetch_images(archive, root, image_root, missing[archive.into])
    lost = [name for names in _missing_images(dataset, root).values() for name in names]
    if lost:
        raise UsageError(
            f"{len(lost)} images are in none of the archives, for example {lost[0]}. Put them under {image_root}, or "
            "train without them: data.on_bad_image=skip"
        )
    log.info("%s is complete: data=%s data.root=%s", dataset.name, dataset.name, root)


def _missing_images(dataset: Dataset, root: Path) -> dict[str, list[str]]:
    """The names of missing images by `Archive.into`; the records must have been downloaded."""
    image_root = root / dataset.image_root
    records = open_records(root / dataset.json, cache_dir(), image_root=image_root, allow_faults=True)
    names = dict.fromkeys(name for record in records for name in record.images)
    missing: dict[str, list[str]] = {archive.into: [] for archive in dataset.archives}
    for name in ImageFolder(image_root).missing(names):
        folder = next((into for into in missing if into == "." or name.startswith(f"{into}/")), None)
        if folder is None:
            raise UsageError(f"No archive of {dataset.name} contains {name}: its records are of another version.")
        missing[folder].append(name)
    return missing


def _download_json(dataset: Dataset, root: Path) -> None:
    log.info("Downloading %s from %s", dataset.json, dataset.repo)
    place = {"repo_type": "dataset", "revision": dataset.revision, "endpoint": dataset.endpoint}
    try:
        hf_hub_download(dataset.repo, dataset.json, local_dir=root, **place)
    except Exception as error:  # the hub's client lets any exception of its HTTP library through
        raise UsageError(f"Cannot download {hf_hub_url(dataset.repo, dataset.json, **place)} ({error}).") from error


def _fetch_images(archive: Archive, root: Path, image_root: Path, names: list[str]) -> None:
    file = root / archive.file_name
    if not file.is_file():
        columns = (*Progress.get_default_columns(), DownloadColumn(), TransferSpeedColumn())
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(archive.into)
            download(archive.url, file, progress=lambda done, size: bar.update(task, completed=done, total=size))
    log.info("Extracting %d images from %s", len(names), file)
    prefix = f"{archive.into}/" if archive.into != "." else ""
    found = extract(file, image_root / archive.into, [name.removeprefix(prefix) for name in names])
    log.info("Extracted %d of %d images of %s", found, len(names), archive.into)
    file.unlink()


def extract(archive: Path, folder: Path, wanted: Collection[str]) -> int:
    """Extracts the wanted files of a ZIP archive; returns how many of them it had.

    Archives put the same files under different folders, so a member is matched to the wanted file that its path ends
    with. Nothing else is written. A file appears only when it is complete; ZIP's checksums are verified. Wanted paths
    are relative to `folder`.
    """
    left = set(wanted)
    try:
        with zipfile.ZipFile(archive) as content:
            for member in content.infolist():
                parts = PurePosixPath(member.filename).parts
                endings = ("/".join(parts[start:]) for start in range(len(parts)))
                name = next((ending for ending in endings if ending in left), None)
                if name is None or member.is_dir():
                    continue
                left.discard(name)
                target = folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                temporary = target.with_name(f".{target.name}.part")
                with content.open(member) as source, temporary.open("wb") as file:
                    shutil.copyfileobj(source, file)
                os.replace(temporary, target)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise UsageError(f"{archive} is damaged ({error}): delete it and run the command again.") from error
    return len(set(wanted)) - len(left)
