"""The package's description: the README without the links and pictures that only lead somewhere in a checkout."""

import re
from pathlib import Path

from hatchling.metadata.plugin.interface import MetadataHookInterface

IMAGE = re.compile(r"!\[[^\]]*\]\((?!https?:)[^)]+\)\n*")
LINK = re.compile(r"\[([^\]]+)\]\((?!https?:)([^)]+)\)")


class ReadmeOfAWheel(MetadataHookInterface):
    """Writes relative links as the path they lead to in the source distribution."""

    def update(self, metadata: dict) -> None:
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        text = LINK.sub(r"`\2` of the source distribution", IMAGE.sub("", text))
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
