"""The checks of a preflight that train, look and save."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import Tensor

from prism_deco.data.examples import Example
from prism_deco.errors import UsageError
from prism_deco.llms import LanguageModel
from prism_deco.llms.lora import is_adapter
from prism_deco.sequence import Batch
from prism_deco.training.datamodule import Conversations
from prism_deco.training.model_folder import adapter_dtype, load_model, save_model
from prism_deco.training.optim import adamw, clip_gradients, grad_norm, parameter_groups
from prism_deco.vlm import VLM

log = logging.getLogger(__name__)

STEPS = 10


def failed(check: str, found: str) -> UsageError:
    """What to raise where a check finds something wrong."""
    return UsageError(f"Preflight, {check}: {found}. trainer.preflight=false trains all the same.")


@contextmanager
def modes_kept(vlm: VLM) -> Iterator[None]:
    """Gives the modules their modes back."""
    modes = [(module, module.training) for module in vlm.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@dataclass(frozen=True)
class Checks:
    """The checks that compute; `device` is where the model is."""

    config: DictConfig
    vlm: VLM
    data: Conversations
    examples: list[Example]
    device: torch.device

    def learning(self) -> None:
        """Gradients, and a loss that falls."""
        recipe, vlm, batches = self.config.recipe, self.vlm, self.data.collate(self.examples).batches
        rates = {"lr": recipe.lr, "projector_lr": recipe.projector_lr, "weight_decay": recipe.weight_decay}
        groups = parameter_groups(vlm.projector, vlm.lm, **rates)
        optimizer = adamw(groups, recipe)
        targets = sum(batch.num_targets for batch in batches)
        before = sum(self._losses(batches)) / targets
        for step in range(STEPS):
            optimizer.zero_grad()
            for batch in batches:
                with self._precision():
                    loss = vlm(batch.to(self.device)).total / targets
                if loss.requires_grad:
                    loss.backward()
            if step == 0:
                self._check_gradients()
            clip_gradients(vlm.parameters(), recipe.grad_clip, grad_norm(vlm.parameters()))
            optimizer.step()
        after = sum(self._losses(batches)) / targets
        found = f"{STEPS} steps at recipe.lr={recipe.lr} take the loss of {len(self.examples)} records"
        if not after < before:
            raise failed("learning", f"{found} from {before:.6g} to {after:.6g}, not down")
        log.info("Preflight: %s from %.4f to %.4f", found, before, after)

    def _check_gradients(self) -> None:
        # Norms of whole parts: a parameter may rightly have none at first (a LoRA factor behind one of zeros).
        sees = not self.config.recipe.blind and any(example.pixels for example in self.examples)
        for name, part in [("projector", self.vlm.projector)] * sees + [("LLM", self.vlm.lm)]:
            norm = float(grad_norm(part.parameters()))
            if any(p.requires_grad for p in part.parameters()) and not (math.isfinite(norm) and norm > 0):
                raise failed("gradient", f"the norm of the {name}'s first gradient is {norm}; it must be above 0")

    def images(self) -> None:
        """Another loss with images that belong to other records."""
        pixels = [image for example in self.examples for image in example.pixels]
        half = len(pixels) // 2
        others = pixels[half:] + pixels[:half]
        if all(torch.equal(a[tower], b[tower]) for a, b in zip(pixels, others, strict=True) for tower in a):
            log.info("Preflight: the records looked at have no two different images to swap")
            return
        turn = iter(others)
        swapped = [replace(example, pixels=[next(turn) for _ in example.pixels]) for example in self.examples]
        own, other = (self._losses(self.data.collate(e).batches) for e in (self.examples, swapped))
        if own == other:
            found = "the loss stays the same to the last bit when images change places: the model ignores them"
            raise failed("images", f"{found} (if it should: recipe.blind=true)")
        log.log(
            logging.INFO if sum(other) > sum(own) else logging.WARNING,
            "Preflight: after %d steps the loss is %.4g times as high with the images of other records",
            *(STEPS, sum(other) / sum(own)),
        )

    def saving(self, folder: Path, llm: LanguageModel) -> None:
        """Equal logits of a saved and loaded model, on the CPU: equal weights give equal bits there."""
        with torch.no_grad():
            for name, parameter in self.vlm.named_parameters():
                if is_adapter(name):
                    parameter.copy_(parameter.to(adapter_dtype(self.config)))
        batch = self.data.collate.batch(sorted(self.examples, key=lambda e: len(e.encoded.input_ids))[:2])
        try:
            save_model(folder, self.config, self.vlm, llm)
            expected, found = (_logits(vlm, batch) for vlm in (self.vlm, load_model(folder)[0]))
        except UsageError as error:
            raise failed("saving", f"what was saved cannot be loaded: {error}") from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        difference, largest = float((expected - found).abs().max()), float(expected.abs().max())
        # Where memory is aligned otherwise, libraries may round otherwise; other weights are further off.
        if not difference <= largest * math.sqrt(torch.finfo(expected.dtype).eps):
            raise failed("saving", f"logits of up to {largest:.3g} differ by {difference:.3g} once loaded")
        log.info("Preflight: logits differ by %.3g after saving and loading", difference)

    @torch.no_grad()
    def _losses(self, batches: Sequence[Batch]) -> list[float]:
        """The summed loss of each batch, without dropout."""
        with modes_kept(self.vlm), self._precision():
            self.vlm.eval()
            return [float(self.vlm(batch.to(self.device)).total) for batch in batches]

    def _precision(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.trainer.precision == "bf16-mixed")


@torch.no_grad()
def _logits(vlm: VLM, batch: Batch) -> Tensor:
    """float[B, L, V], without dropout."""
    vlm.eval()
    return vlm.logits(vlm.hidden_states(batch))
