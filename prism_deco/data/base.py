"""What training data is: records, and the files on disk with the fields of LLaVA's JSON that every source ends in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prism_deco.config import load_choice
from prism_deco.config.registry import Registry
from prism_deco.config.schema import DataConfig
from prism_deco.data.images import ImageFolder, ImageSource, JoinedImages
from prism_deco.errors import UsageError

if TYPE_CHECKING:  # reading records needs the LLM libraries; naming a source does not
    from prism_deco.data.records import Records


@dataclass(frozen=True)
class Record:
    """One conversation: its id, the names of its images, and messages
    `{"role": "user" | "assistant", "content": str}`; the first may be of the role "system"."""

    id: str
    images: tuple[str, ...]
    messages: list[dict[str, str]]

    @property
    def answered(self) -> list[dict[str, str]]:
        """The messages up to the last answer; a question may follow it (see `recipe.odd_records`)."""
        return self.messages[:-1] if self.messages[-1]["role"] == "user" else self.messages


class RecordError(ValueError):
    """An entry that is no usable record; its kind is one of `validators.KINDS`."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class Source:
    """The files of a data set.

    Attributes:
        train: the training conversations: LLaVA JSON, or Parquet or Arrow files with embedded images.
        image_root: folder that the records' image paths are relative to; None if images are embedded.
        val: held-out conversations in the same format; None holds out a fraction of `train`.
        benchmarks: root folder of the benchmarks that come with this source, if any.
        mixture: sources that are trained on together, each as often as its weight says (`Records.join`); the other
            fields are not read then.
    """

    train: Path
    image_root: Path | None
    val: Path | None = None
    benchmarks: Path | None = None
    mixture: tuple[tuple[Source, float], ...] = ()

    def images(self, records: Records) -> ImageSource:
        """Where the images of its records are."""
        if self.mixture:
            pairs = zip(self.mixture, records.parts(), strict=True)
            return JoinedImages([part.images(own) for (part, _), own in pairs])
        if records.embedded is not None:
            return records.embedded
        if self.image_root is None:
            raise UsageError(f"{self.train} has no embedded images: give the folder of its image files.")
        return ImageFolder(self.image_root)


SOURCES: Registry[Callable[..., Source]] = Registry(
    "data family", also=["prism_deco.data.sources", "prism_deco.miniature.world"]
)


def build_source(choice: str | Mapping[str, Any], **options: Any) -> Source:
    """Finds the files of a data source, or makes them.

    Args:
        choice: a YAML name under `conf/data`, or the mapping such a YAML holds.
        options: replace keys of the YAML.
    """
    spec = (load_choice("data", choice) if isinstance(choice, str) else dict(choice)) | options
    # The keys that every data choice has say how records are used, not where they come from.
    shared = {field.name for field in fields(DataConfig)}
    own = {key: value for key, value in spec.items() if key not in shared}
    return SOURCES.build(spec["family"], **own)
