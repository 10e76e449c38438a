"""Where models and tokenizers come from: local folders, the hub's cache, and the hub."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
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
_ASSET = "asset:"
_TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json")
_SMALL = ("*.json", "tokenizer.model", "merges.txt")
_SAFETENSORS = "model*.safetensors"
_BIN = "pytorch_model*.bin"


def has_weights(folder: Path) -> bool:
    """Whether a folder holds a complete model: its configuration, and one weight file or all shards."""
    return (folder / "config.json").is_file() and (has_safetensors(folder) or _is_complete(folder, _BIN))


def has_safetensors(folder: Path) -> bool:
    """Whether a folder holds a model's safetensors, including all shards."""
    return _is_complete(folder, _SAFETENSORS)


def bin_shards(folder: Path) -> list[Path]:
    """The PyTorch pickles of a folder's model."""
    return sorted(folder.glob(_BIN))


def weight_files(path: Path) -> list[Path]:
    """The files that hold a model's weights: `path` itself, or what is loaded from a folder."""
    if path.is_file():
        return [path]
    return sorted(path.glob(_SAFETENSORS)) if has_safetensors(path) else bin_shards(path)


def snapshot_folder(repo: str, revision: str | None, hint: str, *, dry_run: bool = False) -> Path:
    """The local snapshot of a repository with a complete model; downloads what is missing.

    Args:
        hint: what an error begins with.
        dry_run: ask whether the hub has what is missing, without downloading it.

    Raises:
        UsageError: the hub cannot be reached or refuses.
    """
    # Pickles only if there is nothing better.
    return _snapshot(repo, revision, has_weights, [(*_SMALL, _SAFETENSORS), (*_SMALL, _BIN)], hint, dry_run)


def load_tokenizer(
    name: str | None, weights: str | None, hub: str | None, revision: str | None
) -> PreTrainedTokenizerBase:
    """Loads a tokenizer.

    Args:
        name: `asset:<folder of the package>`, a local folder, or a repository; None looks next to the
            weights and then in `hub`.
        weights: local weights; a GGUF file brings its own tokenizer.
        hub: repository of the model.
        revision: commit of `hub`.
    """
    if name is None and weights is not None:
        path = Path(weights).expanduser()
        if path.suffix == ".gguf":
            return _load(path.parent, gguf_file=path.name)
        folder = path if path.is_dir() else path.parent
        if _has_tokenizer(folder):
            return _load(folder)
    if name is None and hub is None:
        raise UsageError("The LLM names no tokenizer: set llm.tokenizer to a folder or a repository.")
    if name is None:
        return _from_hub(str(hub), revision)
    folder = ASSETS / name.removeprefix(_ASSET) if name.startswith(_ASSET) else Path(name).expanduser()
    if folder.is_dir():
        return _load(folder)
    if name.startswith(_ASSET):
        shipped = ", ".join(sorted(path.name for path in ASSETS.iterdir()))
        raise UsageError(f"llm.tokenizer={name}: the package ships {shipped}.")
    return _from_hub(name, None)


def _from_hub(repo: str, revision: str | None) -> PreTrainedTokenizerBase:
    hint = (
        f"The tokenizer of {repo} is not in the local Hugging Face cache and could not be downloaded (a few MB). "
        "Copy its files here and point to their folder: llm.tokenizer=PATH."
    )
    return _load(_snapshot(repo, revision, _has_tokenizer, [_SMALL], hint))


def _load(folder: Path, **options: Any) -> PreTrainedTokenizerBase:
    bare = (folder / "tokenizer.model").is_file() and not (folder / "tokenizer.json").is_file()
    # For a bare tokenizer.model, classes such as `LlamaTokenizer` order the merges by the pieces' ids. The generic
    # class orders them by score, as SentencePiece does, and saves the result as tokenizer.json.
    loader = PreTrainedTokenizerFast if bare and not options else AutoTokenizer
    tokenizer = loader.from_pretrained(folder, trust_remote_code=False, local_files_only=True, **options)
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


def _snapshot(
    repo: str,
    revision: str | None,
    complete: Callable[[Path], bool],
    attempts: Sequence[Sequence[str]],
    hint: str,
    dry_run: bool = False,
) -> Path:
    """The first snapshot that is `complete`: from the cache with each of the patterns, then from the hub."""
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
                # The lines after the first advise on options of another library.
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
