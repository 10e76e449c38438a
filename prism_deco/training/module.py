"""The LightningModule: optimizer steps over a plain `VLM`, and what TensorBoard shows of them."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable
from typing import Any, cast

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from prism_deco.config.registry import unknown
from prism_deco.config.schema import LOSS, NONFINITE
from prism_deco.data.loader import Step
from prism_deco.exits import NonFinite
from prism_deco.training.nonfinite import diagnose
from prism_deco.training.optim import adamw, clip_gradients, grad_norm, parameter_groups, warmup_cosine
from prism_deco.vlm import VLM, Loss

log = logging.getLogger(__name__)


class TrainingModule(pl.LightningModule):
    """Trains projector and LLM of a `VLM`.

    One item of the loader is one optimizer step (`data.loader.Step`); its forward passes are looped
    over here. Lightning's own accumulation averages the passes' means, which weights a token by how
    few supervised tokens its pass happens to have.

    Args:
        recipe: the `recipe` group of the configuration.
        total_steps: optimizer steps of the whole run, for the schedule.
        seed: seeds dropout, anew in each step, so that a resumed run draws the same.
        nonfinite: stop | skip: what a step does whose loss or gradient is not finite.
        shard: divides the model among the processes of a mesh, once there is one; None leaves it whole.
        preempted: whether this process was asked to make way; `making_way` is what all agree on.
    """

    def __init__(
        self,
        vlm: VLM,
        recipe: DictConfig,
        total_steps: int,
        *,
        seed: int = 0,
        nonfinite: str = "stop",
        shard: Callable[[DeviceMesh], None] | None = None,
        preempted: Callable[[], bool] = lambda: False,
    ):
        super().__init__()
        if recipe.loss not in LOSS:
            raise unknown("recipe.loss", recipe.loss, LOSS)
        if nonfinite not in NONFINITE:
            raise unknown("trainer.nonfinite", nonfinite, NONFINITE)
        self.automatic_optimization = False
        # An LLM that was read from files comes in eval mode: no dropout, no activation checkpointing.
        self.vlm = vlm.train()
        self.recipe = recipe
        self.total_steps = total_steps
        self.counts = {"tokens_cut": 0, "bad_images": 0, "bad_records": 0, "steps_skipped": 0}
        self.making_way = False
        self.last_step: dict[str, Any] = {}
        self._seed = seed
        self._nonfinite = nonfinite
        self._shard = shard
        self._preempted = preempted
        self._validation = torch.zeros(2, dtype=torch.float64)

    def configure_model(self) -> None:
        """Shards the model; Lightning calls it when the processes have found each other."""
        if self._shard is not None:
            assert self.device_mesh is not None
            self._shard(self.device_mesh["data_parallel"])
            self._shard = None

    def configure_optimizers(self) -> Any:
        recipe = self.recipe
        groups = parameter_groups(
            self.vlm.projector,
            self.vlm.lm,
            lr=recipe.lr,
            projector_lr=recipe.projector_lr,
            weight_decay=recipe.weight_decay,
        )
        optimizer = adamw(groups, recipe)
        return [optimizer], [warmup_cosine(optimizer, self.total_steps, recipe.warmup_ratio)]

    def training_step(self, batch: Step, batch_idx: int) -> None:
        step = batch
        optimizer = cast(Any, self.optimizers())
        scheduler = cast(Any, self.lr_schedulers())
        optimizer.zero_grad()
        passes = sum(micro_batch.num_targets > 0 for micro_batch in step.batches)
        counts = [step.num_targets, passes, step.tokens_cut, step.bad_images, step.bad_records, self._preempted()]
        totals = self.all_reduce_sum(torch.tensor(counts, dtype=torch.float64, device=self.device))
        targets, passes = totals[0].float(), totals[1].float()
        total = torch.zeros((), device=self.device)
        self._seed_step()
        for micro_batch in step.batches:
            result = self.vlm(micro_batch)
            loss = self._scaled(result, targets, passes)
            self.manual_backward(loss)
            total += loss.detach()
        # Ranks' scaled losses average to the global one, as their gradients do.
        total = self.all_reduce_sum(total) / self.trainer.world_size
        norms = {
            part: grad_norm(module.parameters())
            for part, module in (("projector", self.vlm.projector), ("lm", self.vlm.lm))
        }
        norm = grad_norm(self.vlm.parameters())
        rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
        _, _, tokens_cut, bad_images, bad_records, making_way = (int(value) for value in totals.tolist())
        if math.isfinite(total.item() + norm.item()):
            # Not before: a norm that is no number would spoil the gradients that were good.
            clip_gradients(self.vlm.parameters(), self.recipe.grad_clip, norm)
            optimizer.step()
        else:
            self._handle_nonfinite(step)
            optimizer.zero_grad()
            # Lightning counts steps of the optimizer, and this is one that was left out.
            self.trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress.increment_ready()
            self.trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress.increment_completed()
        scheduler.step()
        self.making_way = making_way > 0
        self.counts["tokens_cut"] += tokens_cut
        self.counts["bad_images"] += bad_images
        self.counts["bad_records"] += bad_records
        self.last_step = {
            "train/loss": total.item(),
            "train/grad_norm": norm.item(),
            "train/lr": rates,
            "train/supervised_tokens": int(targets),
        }
        self._log_step(total, norm, norms, rates)

    def _seed_step(self) -> None:
        """Dropout is a function of seed, step and rank: a checkpoint needs no state of generators."""
        key = f"{self._seed}/{self.trainer.global_step}/{self.global_rank}"
        torch.manual_seed(int.from_bytes(hashlib.blake2b(key.encode(), digest_size=7).digest(), "big"))

    def _handle_nonfinite(self, step: Step) -> None:
        self._seed_step()
        message = (
            f"step {self.trainer.global_step + 1}: loss or gradient not finite: {diagnose(self.vlm, step.batches)}"
        )
        if self._nonfinite == "stop":
            raise NonFinite(f"{message}. Lower recipe.lr or mend the records; trainer.nonfinite=skip leaves it out.")
        self.counts["steps_skipped"] += 1
        log.warning("Left out %s", message)

    def _scaled(self, loss: Loss, targets: Tensor, passes: Tensor) -> Tensor:
        """This pass's share of the step's loss. Gradients are averaged over ranks afterwards.

        Args:
            targets: float[], supervised tokens of the step on all ranks.
            passes: float[], its forward passes that have any.
        """
        size = self.trainer.world_size
        if self.recipe.loss == "micro_batch_mean":
            return loss.total / loss.count.clamp(min=1) * size / passes.clamp(min=1)
        return loss.total * size / targets.clamp(min=1)

    def all_reduce_sum(self, value: Tensor) -> Tensor:
        """The sum of a tensor over all ranks."""
        return cast(Tensor, self.trainer.strategy.reduce(value, reduce_op="sum"))

    def _log_step(self, loss: Tensor, norm: Tensor, norms: dict[str, Tensor], rates: dict[str, float]) -> None:
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/grad_norm", norm)
        for part, value in norms.items():
            self.log(f"train/grad_norm_{part}", value)
        for name in {name.partition("/")[0] for name in rates}:
            rate = next(value for group, value in rates.items() if group.startswith(f"{name}/"))
            self.log(f"train/lr_{name}", rate)
        self.log("data/bad_images", float(self.counts["bad_images"]))
        self.log("data/text_tokens_cut", float(self.counts["tokens_cut"]))

    def on_validation_epoch_start(self) -> None:
        self._validation = torch.zeros(2, dtype=torch.float64, device=self.device)

    def validation_step(self, batch: Step, batch_idx: int) -> None:
        for micro_batch in batch.batches:
            loss = self.vlm(micro_batch)
            self._validation += torch.stack([loss.total.double(), loss.count.double()])

    def on_validation_epoch_end(self) -> None:
        # Every rank logs, also one that held fillers only: the mean is over the tokens of all ranks.
        total, count = self.all_reduce_sum(self._validation)
        self.log("val/loss", (total / count.clamp(min=1)).float(), prog_bar=True)
