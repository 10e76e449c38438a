"""Builds the package description: the README without images and links that only resolve in a checkout."""

import re
from pathlib import Path

from hatchling.metadata.plugin.interface import MetadataHookInterface

IMAGE = re.compile(r"!\[[^\]]*\]\((?!https?:)[^)]+\)\n*")
LINK = re.compile(r"\[([^\]]+)\]\((?!https?:)([^)]+)\)")


class ReadmeOfAWheel(MetadataHookInterface):
    """Replaces relative links by their paths in the source distribution, and drops images with relative paths."""

    def update(self, metadata: dict) -> None:
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        text = LINK.sub(r"`\2` of the source distribution", IMAGE.sub("", text))
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
