"""Where a tokenizer comes from."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, cast

from tokenizers import Regex, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from prism_deco.errors import UsageError
from prism_deco.llms.hub import has_tokenizer, tokenizer_folder

log = logging.getLogger(__name__)

ASSETS = Path(__file__).parent.parent / "assets" / "tokenizers"
_ASSET = "asset:"


def load_tokenizer(
    name: str | None, weights: str | None, hub: str | None, revision: str | None
) -> PreTrainedTokenizerBase:
    """Loads a tokenizer.

    Args:
        name: `asset:<folder of the package>`, a local folder, or a repository; None looks beside the
            weights and then in `hub`.
        weights: local weights; a GGUF file brings its own tokenizer.
        hub: repository of the model.
        revision: commit of `hub`.
    """
    if name is None and weights is not None:
        path = Path(weights).expanduser()
        if path.suffix == ".gguf":
            return _load(path.parent, gguf_file=path.name)
        beside = path if path.is_dir() else path.parent
        if has_tokenizer(beside):
            return _load(beside)
    if name is None and hub is None:
        raise UsageError("The LLM names no tokenizer: set llm.tokenizer to a folder or a repository.")
    if name is None:
        return _from_hub(str(hub), revision)
    folder = ASSETS / name.removeprefix(_ASSET) if name.startswith(_ASSET) else Path(name).expanduser()
    if folder.is_dir():
        return _load(folder)
    if name.startswith(_ASSET):
        shipped = ", ".join(sorted(p.name for p in ASSETS.iterdir()))
        raise UsageError(f"llm.tokenizer={name}: the package ships {shipped}.")
    return _from_hub(name, None)


def _from_hub(repo: str, revision: str | None) -> PreTrainedTokenizerBase:
    hint = (
        f"The tokenizer of {repo} is neither in the local Hugging Face cache nor could it be downloaded (a few MB). "
        "Copy its files here and point to their folder: llm.tokenizer=PATH."
    )
    return _load(tokenizer_folder(repo, revision, hint))


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
