"""Exports trained models: to one self-contained folder, or to a folder that plain transformers loads."""

from prism_deco.export.folder import SHARD_SIZE, check_empty, save_folder, whole_folder
from prism_deco.export.transformers_model import save_transformers

__all__ = ["SHARD_SIZE", "check_empty", "save_folder", "save_transformers", "whole_folder"]
