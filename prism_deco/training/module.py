"""The LightningModule: optimizer steps over a plain `VLM`."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from prism_deco.data.loader import Step
from prism_deco.distributed import gather_objects
from prism_deco.exits import Interrupted, NonFinite, Preempted
from prism_deco.training.lightning_internals import count_skipped_step
from prism_deco.training.nonfinite import diagnose
from prism_deco.training.optim import adamw, clip_gradients, grad_norm, warmup_cosine
from prism_deco.vlm import VLM

log = logging.getLogger(__name__)


class _Totals(NamedTuple):
    """Counts of a step; summed over all ranks they are float64[], until they are read."""

    targets: Any
    passes: Any
    passes_with_images: Any
    tokens_cut: Any
    bad_images: Any
    bad_records: Any
    preempted: Any
    interrupted: Any


class TrainingModule(pl.LightningModule):
    """Trains projector and LLM of a `VLM`, and the tower where the recipe does.

    One item of the loader is one optimizer step (`data.loader.Step`); its forward passes are looped
    over here. Lightning's own accumulation averages the passes' means, which weights a token by how
    few supervised tokens its pass happens to have.

    Args:
        recipe: the `recipe` group of the configuration.
        total_steps: optimizer steps of the whole run, for the schedule.
        seed: seeds dropout, anew in each step, so that a resumed run draws the same.
        nonfinite: stop | skip: what a step does whose loss or gradient is not finite.
        shard: divides the model among the processes of a mesh, once there is one; None leaves it whole.
        stop_requested: how this process was asked to stop, if it was.

    Attributes:
        counts: text tokens cut, bad images, bad records and skipped steps so far.
        bad_rows: the numbers of the bad records so far: they recur in every epoch, and count once.
        stop: how the run is to stop after this step, agreed between all processes; None if it goes on.
        last_step, last_norms: the numbers of the last step.
        val_loss: of the last validation, in nats per token.
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
        stop_requested: Callable[[], type[Preempted] | None] = lambda: None,
    ):
        super().__init__()
        self.automatic_optimization = False
        # An LLM that was read from files comes in eval mode: no dropout, no activation checkpointing.
        self.vlm = vlm.train()
        self.recipe = recipe
        self.total_steps = total_steps
        self.counts = {"tokens_cut": 0, "bad_images": 0, "bad_records": 0, "steps_skipped": 0}
        self.bad_rows: set[int] = set()
        self.stop: type[Preempted] | None = None
        self.last_step: dict[str, Any] = {}
        self.last_norms: dict[str, float] = {}
        self.val_loss = math.nan
        self._seed = seed
        self._nonfinite = nonfinite
        self._shard = shard
        self._stop_requested = stop_requested
        self._validation = torch.zeros(2, dtype=torch.float64)

    def configure_model(self) -> None:
        """Shards the model; Lightning calls it when the processes have found each other."""
        if self._shard is not None:
            assert self.device_mesh is not None
            self._shard(self.device_mesh["data_parallel"])
            self._shard = None

    def configure_optimizers(self) -> Any:
        recipe = self.recipe
        optimizer = adamw(self.vlm, recipe)
        return [optimizer], [warmup_cosine(optimizer, self.total_steps, recipe.warmup_ratio, recipe.warmup_rounding)]

    def training_step(self, batch: Step, batch_idx: int) -> None:
        optimizer, scheduler = cast(Any, self.optimizers()), cast(Any, self.lr_schedulers())
        optimizer.zero_grad()
        totals = self._totals(batch)
        loss = self._accumulate(batch, totals)
        idle = all(micro_batch.pixels is None for micro_batch in batch.batches)
        # Only a process without images has to ask whether others have some.
        if idle and not self.recipe.update_idle_projector and not totals.passes_with_images:
            # They have gradients of zero on every rank, with which AdamW would still move them.
            self.vlm.projector.zero_grad()
            self.vlm.backbone.zero_grad()
        norm = grad_norm(self.vlm.parameters())
        parts = {"projector": self.vlm.projector, "lm": self.vlm.lm}
        if self.vlm.backbone.trained:
            parts["tower"] = self.vlm.backbone
        norms = (grad_norm(part.parameters()) for part in parts.values())
        # In one transfer: the device is waited for once in a step.
        numbers = [value.to(self.device, torch.float64) for value in (loss, norm, *totals, *norms)]
        step_loss, step_norm, *counted = torch.stack(numbers).tolist()
        totals = _Totals(*counted[: len(totals)])
        part_norms = zip(parts, counted[len(totals) :], strict=True)
        self.last_norms = {f"train/grad_norm_{part}": part_norm for part, part_norm in part_norms}
        self.last_step = {
            "train/loss": step_loss,
            "train/grad_norm": step_norm,
            "train/lr": {group["name"]: group["lr"] for group in optimizer.param_groups},
            "train/supervised_tokens": int(totals.targets),
        }
        if math.isfinite(step_loss + step_norm):
            # Clipped here, not earlier: a norm that is NaN would spoil the gradients that were good.
            clip_gradients(self.vlm.parameters(), self.recipe.grad_clip, norm)
            optimizer.step()
        else:
            self._handle_nonfinite(batch)
            optimizer.zero_grad()
            count_skipped_step(self.trainer)
        scheduler.step()
        self.counts["tokens_cut"] += int(totals.tokens_cut)
        self.counts["bad_images"] += int(totals.bad_images)
        if totals.bad_records:  # the same in all processes
            self.bad_rows.update(*gather_objects(batch.bad_rows))
            self.counts["bad_records"] = len(self.bad_rows)
        if totals.preempted:
            self.stop = Interrupted if totals.interrupted else Preempted

    def _totals(self, step: Step) -> _Totals:
        asked = self._stop_requested()
        counts = _Totals(
            targets=step.num_targets,
            passes=sum(targets > 0 for targets in step.targets),
            passes_with_images=sum(micro_batch.pixels is not None for micro_batch in step.batches),
            tokens_cut=step.tokens_cut,
            bad_images=step.bad_images,
            bad_records=len(step.bad_rows),
            preempted=asked is not None,
            interrupted=asked is Interrupted,
        )
        counted = torch.tensor(counts, dtype=torch.float64).to(self.device, non_blocking=True)
        return _Totals(*self.all_reduce_sum(counted))

    def _accumulate(self, step: Step, totals: _Totals) -> Tensor:
        """Runs the forward and backward passes; returns the loss of the step over all ranks, float[]."""
        targets = totals.targets.float().clamp(min=1)
        passes = totals.passes.float().clamp(min=1)
        size = self.trainer.world_size  # gradients are averaged over ranks afterwards
        total = torch.zeros((), device=self.device)
        self._seed_step()
        for micro_batch in step.batches:
            loss = self.vlm(micro_batch)
            if self.recipe.loss == "micro_batch_mean":
                share = loss.total / loss.count.clamp(min=1) * size / passes
            else:
                share = loss.total * size / targets
            self.manual_backward(share)
            total += share.detach()
        # Ranks' scaled losses average to the global one, as their gradients do.
        return self.all_reduce_sum(total) / size

    def _seed_step(self) -> None:
        """Dropout is a function of seed, step and rank: a checkpoint needs no state of generators."""
        key = f"{self._seed}/{self.trainer.global_step}/{self.global_rank}"
        torch.manual_seed(int.from_bytes(hashlib.blake2b(key.encode(), digest_size=7).digest(), "big"))

    def _handle_nonfinite(self, step: Step) -> None:
        self._seed_step()
        number = self.trainer.global_step + 1
        message = f"step {number}: loss or gradient not finite: {diagnose(self.vlm, step.batches)}"
        if self._nonfinite == "stop":
            raise NonFinite(
                f"{message}. Lower recipe.lr, fix the records, or set trainer.nonfinite=skip to skip such steps."
            )
        self.counts["steps_skipped"] += 1
        log.warning("Skipped %s", message)

    def all_reduce_sum(self, value: Tensor) -> Tensor:
        """The sum of a tensor over all ranks."""
        return cast(Tensor, self.trainer.strategy.reduce(value, reduce_op="sum"))

    def on_validation_epoch_start(self) -> None:
        self._validation = torch.zeros(2, dtype=torch.float64, device=self.device)

    def validation_step(self, batch: Step, batch_idx: int) -> None:
        for micro_batch in batch.batches:
            loss = self.vlm(micro_batch)
            self._validation += torch.stack([loss.total.double(), loss.count.double()])

    def on_validation_epoch_end(self) -> None:
        # Every rank takes part, even one that held only fillers: the mean is over the tokens of all ranks.
        total, count = self.all_reduce_sum(self._validation)
        self.val_loss = (total / count.clamp(min=1)).float().item()
