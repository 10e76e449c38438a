"""Files of models and tokenizers in folders, in the hub's cache, and on the hub."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from huggingface_hub import snapshot_download

# The HTTP library's own base class, whichever library this version of the hub uses.
from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]

from prism_deco.errors import UsageError
from prism_deco.tensors import indexed_files

log = logging.getLogger(__name__)

_TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json")
_SMALL = ("*.json", "tokenizer.model", "merges.txt")
_SAFETENSORS = "model*.safetensors"
_BIN = "pytorch_model*.bin"


def has_weights(folder: Path) -> bool:
    """Whether a folder holds a complete model: its configuration, and one file or all shards."""
    return (folder / "config.json").is_file() and (has_safetensors(folder) or _is_complete(folder, _BIN))


def has_safetensors(folder: Path) -> bool:
    """Whether a folder holds a model's safetensors, all shards of it."""
    return _is_complete(folder, _SAFETENSORS)


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer."""
    return any((folder / name).is_file() for name in _TOKENIZER)


def bin_shards(folder: Path) -> list[Path]:
    """The PyTorch pickles of a folder's model."""
    return sorted(folder.glob(_BIN))


def weight_files(path: Path) -> list[Path]:
    """The files that hold a model's weights: one file, or what is loaded from a folder."""
    if path.is_file():
        return [path]
    return sorted(path.glob(_SAFETENSORS)) if has_safetensors(path) else bin_shards(path)


def model_folder(repo: str, revision: str | None, hint: str, *, dry_run: bool = False) -> Path:
    """The local snapshot of a repository with a complete model; downloads what is missing.

    Args:
        hint: what an error begins with.
        dry_run: ask whether the hub has what is missing, without downloading it.

    Raises:
        UsageError: the hub cannot be reached or refuses.
    """
    # Pickles only where there is nothing better.
    return _snapshot(repo, revision, has_weights, [(*_SMALL, _SAFETENSORS), (*_SMALL, _BIN)], hint, dry_run)


def tokenizer_folder(repo: str, revision: str | None, hint: str) -> Path:
    """The local snapshot of a repository with its tokenizer; like `model_folder`."""
    return _snapshot(repo, revision, has_tokenizer, [_SMALL], hint)


def _snapshot(
    repo: str,
    revision: str | None,
    complete: Callable[[Path], bool],
    attempts: Sequence[Sequence[str]],
    hint: str,
    dry_run: bool = False,
) -> Path:
    reason = f"{repo} holds none of {', '.join(attempts[-1])}"
    for local in (True, False):
        for patterns in attempts:
            if not local and not dry_run:
                log.info("Fetching %s (%s) from the Hugging Face hub", repo, ", ".join(patterns))
            try:
                if not local and dry_run:
                    offered = snapshot_download(repo, revision=revision, allow_patterns=patterns[-1], dry_run=True)
                    if offered:
                        return Path(offered[0].local_path).parent
                    continue
                folder = Path(
                    snapshot_download(repo, revision=revision, allow_patterns=list(patterns), local_files_only=local)
                )
            except (OSError, HTTPError) as error:
                # The first line tells; what follows it is advice about another library's options.
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                if not local:
                    raise UsageError(f"{hint} (Hugging Face hub: {reason})") from error
                continue
            if complete(folder):
                return folder
    raise UsageError(f"{hint} (Hugging Face hub: {reason})")


def _is_complete(folder: Path, pattern: str) -> bool:
    index = next(folder.glob(f"{pattern}.index.json"), None)
    if index is None:
        return any(folder.glob(pattern))
    return all(file.is_file() for file in indexed_files(index.with_name(index.name.removesuffix(".index.json"))))
