"""How much of a language model is trained."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel

from prism_deco.config.registry import unknown
from prism_deco.llms.lora import add_lora
from prism_deco.llms.quantize import quantization


@dataclass(frozen=True)
class Tuning:
    """One way to train an LLM.

    Attributes:
        base: its own weights are trained; else they stay as they are, bit for bit.
        adapters: LoRA adapters are added and trained.
        quantize: the weights are held in this format (`LLMSpec.quantize`).
    """

    base: bool
    adapters: bool
    quantize: str | None = None

    def check(self) -> None:
        """`UsageError` says why this machine cannot do it."""
        if self.quantize:
            quantization(self.quantize)

    def apply(self, model: PreTrainedModel, *, r: int, alpha: int, dropout: float, source: str | None = None) -> None:
        """Freezes what is not trained, and adds adapters where there are some (see `add_lora`)."""
        model.requires_grad_(self.base)
        if self.adapters:
            add_lora(model, r=r, alpha=alpha, dropout=dropout, base=source)


TUNINGS = {
    "full": Tuning(base=True, adapters=False),
    "frozen": Tuning(base=False, adapters=False),
    "lora": Tuning(base=False, adapters=True),
    "qlora": Tuning(base=False, adapters=True, quantize="nf4"),
}
"""The choices of `recipe.lm`."""


def tuning(name: str) -> Tuning:
    """The way of that name; `UsageError` lists the choices otherwise."""
    if name not in TUNINGS:
        raise unknown("recipe.lm", name, TUNINGS)
    return TUNINGS[name]
