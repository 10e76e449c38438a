"""Where models and tokenizers come from: local folders, the hub's cache, and the hub."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from huggingface_hub import snapshot_download

# The HTTP library's own base class, whichever library this version of the hub uses.
from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]
from tokenizers import Regex, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from prism_deco.errors import UsageError
from prism_deco.tensors import indexed_files

log = logging.getLogger(__name__)

ASSETS = Path(__file__).parents[1] / "assets" / "tokenizers"
WEIGHTS = Path(__file__).parents[1] / "assets" / "llms"
ASSET = "asset:"
"""What a tokenizer or weights begin with where they name a file of the package."""
_TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json")
_SMALL = ["*.json", "tokenizer.model", "merges.txt"]
_SAFETENSORS = "model*.safetensors"
_BIN = "pytorch_model*.bin"
MODEL_FILES = [[*_SMALL, _SAFETENSORS], [*_SMALL, _BIN]]
"""Patterns of a model's files in a repository: pickles only if there is nothing better."""


def has_weights(folder: Path) -> bool:
    """Whether a folder holds a complete model: its configuration and all of its weights."""
    return (folder / "config.json").is_file() and bool(weight_files(folder))


def weight_files(path: Path) -> list[Path]:
    """The files that hold a model's weights: `path` itself, or a folder's safetensors, or else its PyTorch pickles.

    Empty where a folder has neither, or only some of the shards.
    """
    if path.is_file():
        return [path]
    for pattern in (_SAFETENSORS, _BIN):
        index = next(path.glob(f"{pattern}.index.json"), None)
        shards = indexed_files(index.with_name(index.name.removesuffix(".index.json"))) if index else []
        if all(shard.is_file() for shard in shards) and any(path.glob(pattern)):
            return sorted(path.glob(pattern))
    return []


def snapshot(
    repo: str,
    revision: str | None,
    complete: Callable[[Path], bool],
    attempts: Sequence[list[str]],
    hint: str,
    dry_run: bool = False,
) -> Path:
    """The local snapshot of a repository, from the cache or else from the hub.

    Args:
        complete: whether a folder holds all that is wanted.
        attempts: patterns of the files to fetch; later ones are tried where earlier ones give nothing complete.
        hint: what an error begins with.
        dry_run: ask whether the hub has what is missing, without downloading it.

    Raises:
        UsageError: the hub cannot be reached, refuses, or has no such files.
    """
    for patterns in attempts:
        with suppress(OSError):  # not in the cache
            folder = Path(snapshot_download(repo, revision=revision, allow_patterns=patterns, local_files_only=True))
            if complete(folder):
                return folder
    try:
        for patterns in attempts:
            if dry_run:
                offered = snapshot_download(repo, revision=revision, allow_patterns=patterns[-1], dry_run=True)
                if offered:
                    return Path(offered[0].local_path).parent
                continue
            log.info("Fetching %s (%s) from the Hugging Face hub", repo, ", ".join(patterns))
            folder = Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))
            if complete(folder):
                return folder
    except (OSError, HTTPError) as error:
        # The lines after the first advise on options of another library.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(f"{hint} (Hugging Face hub: {reason})") from error
    raise UsageError(f"{hint} (Hugging Face hub: {repo} holds none of {', '.join(attempts[-1])})")


def load_tokenizer(
    name: str | None, weights: str | None, hub: str | None, revision: str | None
) -> PreTrainedTokenizerBase:
    """Loads a tokenizer.

    Args:
        name: `asset:<folder of the package>`, a local folder, or a repository; None looks next to the weights, then in
            `hub`.
        weights: local weights; a GGUF file brings its own tokenizer.
        hub, revision: repository of the model, and its commit.
    """
    if name is not None:
        folder = ASSETS / name.removeprefix(ASSET) if name.startswith(ASSET) else Path(name).expanduser()
        if folder.is_dir():
            return _load(folder)
        if name.startswith(ASSET):
            shipped = ", ".join(sorted(path.name for path in ASSETS.iterdir()))
            raise UsageError(f"llm.tokenizer={name}: the package ships {shipped}.")
        return _from_hub(name, None)
    if weights is not None:
        path = Path(weights).expanduser()
        if path.suffix == ".gguf":
            return _load(path.parent, gguf_file=path.name)
        folder = path if path.is_dir() else path.parent
        if _has_tokenizer(folder):
            return _load(folder)
    if hub is None:
        raise UsageError("The LLM names no tokenizer: set llm.tokenizer to a folder or a repository.")
    return _from_hub(hub, revision)


def _from_hub(repo: str, revision: str | None) -> PreTrainedTokenizerBase:
    hint = (
        f"The tokenizer of {repo} is not in the local Hugging Face cache and could not be downloaded (a few MB). "
        "Copy its files here and point to their folder: llm.tokenizer=PATH."
    )
    return _load(snapshot(repo, revision, _has_tokenizer, [_SMALL], hint))


def _load(folder: Path, **options: Any) -> PreTrainedTokenizerBase:
    bare = (folder / "tokenizer.model").is_file() and not (folder / "tokenizer.json").is_file()
    # For a bare tokenizer.model, classes such as `LlamaTokenizer` order the merges by the pieces' ids. The generic
    # class orders them by score, as SentencePiece does, and saves the result as tokenizer.json.
    loader = PreTrainedTokenizerFast if bare and not options else AutoTokenizer
    try:
        tokenizer = loader.from_pretrained(folder, trust_remote_code=False, local_files_only=True, **options)
    except Exception as error:  # of any class, down to a bare `Exception` of the library in Rust
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UsageError(
            f"{folder} holds no tokenizer that can be read ({reason}). Point llm.tokenizer at a folder with "
            "tokenizer.json or tokenizer.model."
        ) from error
    if bare or options:
        _prefix_every_text(tokenizer)
    return tokenizer


def _prefix_every_text(tokenizer: PreTrainedTokenizerBase) -> None:
    """SentencePiece's dummy prefix also goes before a text that begins with a space, where transformers omits it."""
    backend = cast(Any, tokenizer).backend_tokenizer
    if "prepend_scheme=first" in str(backend.pre_tokenizer):
        steps = [backend.normalizer] if backend.normalizer else []
        doubled = [normalizers.Replace(" ", "▁"), normalizers.Replace(Regex(r"\A▁"), "▁▁")]
        backend.normalizer = normalizers.Sequence([*steps, *doubled])


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _TOKENIZER)
