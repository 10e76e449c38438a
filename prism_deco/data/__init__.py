"""Conversations and images: LLaVA JSON -> records -> examples -> batches."""

from prism_deco.data.base import SOURCES, Source, build_source

__all__ = ["SOURCES", "Source", "build_source"]
