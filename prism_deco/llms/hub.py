"""Locates models and tokenizers: in local folders, the hub's cache, or the hub."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from huggingface_hub import snapshot_download

# The base class of the HTTP library that this version of huggingface_hub uses.
from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]
from tokenizers import Regex, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from prism_deco.errors import UsageError
from prism_deco.llms.spec import LLMSpec
from prism_deco.tensors import indexed_files

log = logging.getLogger(__name__)

ASSETS = Path(__file__).parents[1] / "assets" / "tokenizers"
WEIGHTS = Path(__file__).parents[1] / "assets" / "llms"
ASSET = "asset:"
"""Prefix of a `tokenizer` or `weights` value that names a file of the package."""
_TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json")
_SMALL = ["*.json", "tokenizer.model", "merges.txt"]
_SAFETENSORS = "model*.safetensors"
_BIN = "pytorch_model*.bin"
MODEL_FILES = [[*_SMALL, _SAFETENSORS], [*_SMALL, _BIN]]
"""Patterns of a model's files in a repository, in order of preference: pickles last."""


def has_weights(folder: Path) -> bool:
    """Whether a folder holds a complete model: its configuration and all its weights."""
    return (folder / "config.json").is_file() and bool(weight_files(folder))


def weight_files(path: Path) -> list[Path]:
    """A model's weight files: `path` itself, or a folder's safetensors, or else its PyTorch pickles.

    Empty if a folder has neither, or lacks some of the shards.
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
        complete: whether a folder holds everything needed.
        attempts: lists of file patterns, tried in order until a snapshot is `complete`.
        hint: start of error messages.
        dry_run: only check that the hub has the files.

    Raises:
        UsageError: the hub cannot be reached, refuses access, or has no such files.
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
        # Lines after the first suggest options of huggingface_hub.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(f"{hint} (Hugging Face hub: {reason})") from error
    raise UsageError(f"{hint} (Hugging Face hub: {repo} holds none of {', '.join(attempts[-1])})")


def load_tokenizer(spec: LLMSpec) -> PreTrainedTokenizerBase:
    """The tokenizer of `spec.tokenizer`, or the one in or next to the local weights, or the one in `spec.hub`."""
    name = spec.tokenizer
    if name is not None:
        folder = ASSETS / name.removeprefix(ASSET) if name.startswith(ASSET) else Path(name).expanduser()
        if folder.is_dir():
            return _load(folder)
        if name.startswith(ASSET):
            shipped = ", ".join(sorted(path.name for path in ASSETS.iterdir()))
            raise UsageError(f"llm.tokenizer={name}: the package ships {shipped}.")
        return _from_hub(name, None)
    if spec.weights is not None:
        path = Path(spec.weights).expanduser()
        if path.suffix == ".gguf":
            return _load(path.parent, gguf_file=path.name)
        folder = path if path.is_dir() else path.parent
        if _has_tokenizer(folder):
            return _load(folder)
    if spec.hub is None:
        raise UsageError("The LLM names no tokenizer: set llm.tokenizer to a folder or a repository.")
    return _from_hub(spec.hub, spec.revision)


def _from_hub(repo: str, revision: str | None) -> PreTrainedTokenizerBase:
    hint = (
        f"The tokenizer of {repo} is not in the local Hugging Face cache and could not be downloaded (a few MB). "
        "Copy its files here and set llm.tokenizer=PATH to their folder."
    )
    return _load(snapshot(repo, revision, _has_tokenizer, [_SMALL], hint))


def _load(folder: Path, **options: Any) -> PreTrainedTokenizerBase:
    bare = (folder / "tokenizer.model").is_file() and not (folder / "tokenizer.json").is_file()
    # From a bare tokenizer.model, classes such as `LlamaTokenizer` order the merges by the pieces' ids. The generic
    # class orders them by score, as SentencePiece does, and saves the result as tokenizer.json.
    loader = PreTrainedTokenizerFast if bare and not options else AutoTokenizer
    try:
        tokenizer = loader.from_pretrained(folder, trust_remote_code=False, local_files_only=True, **options)
    except Exception as error:  # the library in Rust raises bare `Exception`s
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UsageError(
            f"{folder} holds no tokenizer that can be read ({reason}). Point llm.tokenizer at a folder with "
            "tokenizer.json or tokenizer.model."
        ) from error
    if bare or options:
        _prefix_every_text(tokenizer)
    return tokenizer


def _prefix_every_text(tokenizer: PreTrainedTokenizerBase) -> None:
    """Adds SentencePiece's dummy prefix to texts that begin with a space, too, where transformers omits it."""
    backend = cast(Any, tokenizer).backend_tokenizer
    if "prepend_scheme=first" in str(backend.pre_tokenizer):
        steps = [backend.normalizer] if backend.normalizer else []
        doubled = [normalizers.Replace(" ", "▁"), normalizers.Replace(Regex(r"\A▁"), "▁▁")]
        backend.normalizer = normalizers.Sequence([*steps, *doubled])


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _TOKENIZER)
