"""Training data: one conversation is a `Record`; a `Source` says which files the records and images are in."""

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

if TYPE_CHECKING:  # `records` imports the LLM libraries, which building a source does not need
    from prism_deco.data.records import Records


@dataclass(frozen=True)
class Record:
    """One conversation: its id, the names of its images, and messages
    `{"role": "user" | "assistant", "content": str}`; the first message may have the role "system"."""

    id: str
    images: tuple[str, ...]
    messages: list[dict[str, str]]

    @property
    def answered(self) -> list[dict[str, str]]:
        """The messages without an unanswered last question (see `recipe.odd_records`)."""
        return self.messages[:-1] if self.messages[-1]["role"] == "user" else self.messages


class RecordError(ValueError):
    """An entry cannot be used as a record; `kind` is one of `validators.KINDS`."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class Source:
    """The files of a data set.

    Attributes:
        train: the training conversations: LLaVA JSON, or Parquet or Arrow files with embedded images.
        image_root: folder that the records' image paths are relative to; None if images are embedded.
        val: validation conversations in the same format; None holds out a fraction of `train`.
        benchmarks: root folder of the benchmarks that come with this source, if any.
        mixture: (source, weight) pairs to train on together (`Records.join`); the other fields are then ignored.
    """

    train: Path
    image_root: Path | None
    val: Path | None = None
    benchmarks: Path | None = None
    mixture: tuple[tuple[Source, float], ...] = ()

    def images(self, records: Records) -> ImageSource:
        """The images that the records of this source name."""
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
    """Finds the files of a data source, or renders them.

    Args:
        choice: name of a YAML under `conf/data`, or the content of one.
        options: override keys of the YAML.
    """
    spec = (load_choice("data", choice) if isinstance(choice, str) else dict(choice)) | options
    # The keys of `DataConfig` say how records are used, not where they come from.
    shared = {field.name for field in fields(DataConfig)}
    own = {key: value for key, value in spec.items() if key not in shared}
    return SOURCES.build(spec["family"], **own)
