"""LoRA adapters on a language model or a vision tower, through peft (Hu et al. 2021, arXiv 2106.09685).

Adapters are injected into the model's own module tree: its class, methods and module names stay the same, and each
adapted linear layer is wrapped in a module that holds it as `base_layer`.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch
from safetensors.torch import save
from torch import Tensor, nn

from prism_deco.errors import UsageError
from prism_deco.tensors import is_adapter, open_tensors

ADAPTER_WEIGHTS = "adapter_model.safetensors"
"""The tensors in an adapter folder, next to `adapter_config.json`."""

_NAME = "default"
_PREFIX = "base_model.model."  # of names in a `peft.PeftModel`, which wraps the model


def add_lora(
    model: nn.Module,
    *,
    r: int,
    alpha: int,
    dropout: float,
    base: str | None = None,
    layers: Sequence[str] | None = None,
) -> None:
    """Adds trainable adapters to linear layers and freezes the rest.

    A is drawn from torch's seed (see `draw_lora`) and B is zero, so the model's output does not change at first.
    Adapters of a half-precision base are float32, so that small updates are not lost.

    Args:
        r: rank of the update.
        alpha: the update is scaled by alpha / r.
        dropout: fraction of an adapter's inputs dropped in training.
        base: source of the base weights, written to `adapter_config.json`.
        layers: names of the layers; None takes all of a causal LM of transformers except the output head, as in LLaVA.

    Raises:
        UsageError: peft is not installed, or a number is out of range.
    """
    peft = _peft()
    if r < 1 or not 0 <= dropout < 1:
        raise UsageError(f"recipe.lora_r={r} must be at least 1 and recipe.lora_dropout={dropout} in [0, 1).")
    config = peft.LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        bias="none",
        target_modules="all-linear" if layers is None else list(layers),
        task_type="CAUSAL_LM" if layers is None else None,
        base_model_name_or_path=base,
    )
    _inject(model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_adapter(name) and not parameter.is_meta:
                parameter.copy_(draw_lora(name, parameter.shape))


def draw_lora(name: str, shape: Sequence[int]) -> Tensor:
    """Initial float32 values of an adapter's tensor, distributed as in peft (B is zero).

    They depend only on torch's seed and the tensor's name, not on earlier draws, so that a model initialised tensor by
    tensor in several processes gets the same values.
    """
    tensor = torch.zeros(*shape)
    if ".lora_A." in name:
        generator = torch.Generator().manual_seed((torch.initial_seed() + zlib.crc32(name.encode())) % 2**63)
        nn.init.kaiming_uniform_(tensor, a=math.sqrt(5), generator=generator)
    return tensor


def save_lora(model: nn.Module, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
    """Writes the adapters in peft's format: `peft.PeftModel.from_pretrained(base, folder)` reads them too.

    Args:
        state: the gathered state dict of a sharded model; None takes the model's own.
    """
    peft = _peft()
    folder.mkdir(parents=True, exist_ok=True)
    # Otherwise peft would query the hub to see whether the base model's embeddings were resized.
    tensors = peft.get_peft_model_state_dict(model, dict(state) if state else None, _NAME, save_embedding_layers=False)
    tensors = {f"{_PREFIX}{name}": tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    (folder / ADAPTER_WEIGHTS).write_bytes(save(tensors, metadata={"format": "pt"}))
    cast(Any, model).peft_config[_NAME].save_pretrained(folder)


def load_lora(model: nn.Module, folder: Path) -> None:
    """Adds the adapters that `save_lora` wrote.

    Raises:
        UsageError: peft is not installed, or the adapters cannot be read or do not fit the model.
    """
    peft = _peft()
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise UsageError(f"{folder / ADAPTER_WEIGHTS} is missing: the run folder is incomplete.")
    _inject(model, peft.LoraConfig.from_pretrained(folder))
    fill_lora(model, folder)


def fill_lora(model: nn.Module, folder: Path) -> None:
    """Loads the values that `save_lora` wrote into a model's adapters.

    Raises:
        UsageError: they cannot be read or do not fit the model.
    """
    peft = _peft()
    tensors = {name.removeprefix(_PREFIX): tensor for name, tensor in open_tensors(folder / ADAPTER_WEIGHTS).items()}
    try:
        report = peft.set_peft_model_state_dict(model, tensors, _NAME)
    except RuntimeError as error:
        raise UsageError(f"The adapters in {folder} do not fit the model: {error}") from error
    missing = [name for name in report.missing_keys if is_adapter(name)]
    if missing or report.unexpected_keys:
        wrong = [f"missing {name}" for name in missing] + [f"unexpected {name}" for name in report.unexpected_keys]
        listed = "; ".join(wrong[:5])
        raise UsageError(f"The adapters in {folder} do not fit the model: {listed} ({len(wrong)} in all).")


def merge_lora(model: nn.Module) -> None:
    """Merges the adapters into the base weights and removes them.

    Raises:
        UsageError: a merged weight is not finite.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, layer in list(model.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.merge(safe_merge=True)  # type: ignore[call-arg]  # declared by each kind of adapter
            model.set_submodule(name, layer.get_base_layer())
    del cast(Any, model).peft_config


def has_lora(model: nn.Module) -> bool:
    """Whether the model has adapters."""
    return hasattr(model, "peft_config")


def _inject(model: nn.Module, config: Any) -> None:
    with next(model.parameters()).device:
        _peft().inject_adapter_in_model(config, model, _NAME)
    for name, parameter in model.named_parameters():
        if is_adapter(name) and parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()


def _peft() -> ModuleType:
    try:
        import peft
    except ImportError as error:
        raise UsageError(
            "LoRA needs the package peft: pip install 'prism-deco[lora]', or train the whole LLM with recipe.lm=full."
        ) from error
    return peft
