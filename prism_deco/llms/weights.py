"""Loading pretrained weights: safetensors, GGUF through transformers, or pickles restricted to tensors."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
import struct
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from prism_deco.config import building_folder, cache_dir
from prism_deco.errors import UsageError
from prism_deco.llms.hub import has_weights, weight_files
from prism_deco.tensors import SAFETENSORS, open_tensors

log = logging.getLogger(__name__)

# The last two are raised for truncated files, safetensors and GGUF.
_UNREADABLE = (ImportError, KeyError, OSError, RuntimeError, ValueError, SafetensorError, struct.error)


def load_lm(path: Path, config: PretrainedConfig | None, **options: Any) -> PreTrainedModel:
    """A causal LM with the weights of a local folder or file.

    Args:
        path: folder in the hub's layout, or a .safetensors, .gguf or .bin file.
        config: the architecture; required for .safetensors and .bin files, which do not contain it.
        options: passed to `from_pretrained`.

    Raises:
        UsageError: the weights cannot be read or do not fit the architecture.
    """
    if not path.exists():
        raise UsageError(f"llm.weights={path}: there is no such file or folder.")
    log.info("Loading the language model's weights from %s", path)
    loader: Any = AutoModelForCausalLM
    if path.suffix == ".gguf":
        folder = path.parent
        options["gguf_file"] = path.name
    elif path.is_file():
        if config is None:
            raise UsageError(
                f"{path} does not hold its architecture: set llm.architecture, or give a folder with config.json."
            )
        loader, folder = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], None
        options |= {"config": config, "state_dict": open_tensors(path)}
    else:
        check_folder(path)
        folder = as_safetensors(path)
        options |= {"trust_remote_code": False, "use_safetensors": True, "local_files_only": True}
    try:
        model, report = loader.from_pretrained(folder, output_loading_info=True, **options)
    except _UNREADABLE as error:
        raise UsageError(f"{path} cannot be loaded as a language model: {error}") from error
    missing = sorted(report["missing_keys"])
    if missing:
        # transformers would fill them with random numbers.
        raise UsageError(f"{path} is missing {len(missing)} weights of the architecture, for example {missing[0]}.")
    return model


def check_folder(path: Path) -> None:
    """`UsageError` unless a folder holds a complete language model."""
    if not has_weights(path):
        raise UsageError(
            f"llm.weights={path} must hold config.json and all of model*.safetensors (or pytorch_model*.bin)."
        )


def as_safetensors(folder: Path) -> Path:
    """The folder itself, or a cached one with its .bin shards as safetensors; converted once, shard by shard."""
    shards = weight_files(folder)
    if shards[0].suffix == SAFETENSORS:
        return folder
    key = json.dumps([(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in shards] + [str(folder.resolve())])
    target = cache_dir() / "converted" / hashlib.sha256(key.encode()).hexdigest()[:16]
    if target.is_dir():
        return target
    building = building_folder(target)
    try:
        # Without the lock, concurrent processes would each hold a shard in memory and write a full copy.
        with (cache_dir() / "converting.lock").open("a") as lock:
            with suppress(OSError):  # file systems without locks
                fcntl.lockf(lock, fcntl.LOCK_EX)
            if not target.is_dir():
                log.info("Converting %d pickled shards of %s to safetensors in %s", len(shards), folder, target)
                _convert(folder, shards, building)
                os.replace(building, target)
    except OSError:
        # Where locks do not work, another process may have finished the same conversion first.
        if not target.is_dir():
            raise
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return target


def _convert(folder: Path, shards: Sequence[Path], target: Path) -> None:
    """Writes pickled shards as safetensors, with the configuration next to them, to a new folder."""
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        # safetensors refuses tensors that share storage.
        tensors = {k: v.clone().contiguous() for k, v in open_tensors(shard).items()}
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(tensors, target / name, metadata={"format": "pt"})
        (target / name).chmod(target.stat().st_mode & 0o666)  # safetensors creates files readable only by their owner
        weight_map |= dict.fromkeys(tensors, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    for file in folder.glob("*config.json"):
        shutil.copy(file, target / file.name)
