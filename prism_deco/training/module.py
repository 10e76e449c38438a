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
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from prism_deco.data.loader import Step
from prism_deco.distributed import gather_objects
from prism_deco.exits import Interrupted, NonFinite, Preempted
from prism_deco.training.lightning_internals import count_skipped_step
from prism_deco.training.nonfinite import diagnose
from prism_deco.training.optim import adamw, grad_norm, warmup_cosine
from prism_deco.vlm import VLM

log = logging.getLogger(__name__)


class _Totals(NamedTuple):
    """Counts of a step: numbers of this rank, or their sums over all ranks as tensors, float64[]."""

    targets: Any
    passes: Any
    passes_with_images: Any
    tokens_cut: Any
    bad_images: Any
    bad_records: Any
    preempted: Any
    interrupted: Any


class TrainingModule(pl.LightningModule):
    """Trains the projector and the LLM of a `VLM`, and the tower if the recipe says so.

    One item of the loader is one optimizer step (`data.loader.Step`), and `training_step` loops over its micro-batches.
    Lightning's gradient accumulation would average the means of the micro-batches, so that a token in a micro-batch
    with few supervised tokens would weigh more.

    Args:
        recipe: the `recipe` group of the configuration.
        total_steps: optimizer steps of the whole run, for the schedule.
        seed: seeds dropout anew in each step, so that a resumed run draws the same masks.
        nonfinite: stop | skip, for a step with a non-finite loss or gradient.
        shard: shards the model over the processes of a mesh, once there is one; None does not shard.
        stop_requested: returns how this process was asked to stop, or None.

    Attributes:
        counts: text tokens cut, bad images, bad records and skipped steps so far.
        bad_rows: indices of the bad records so far, since a record recurs in every epoch but counts once.
        stop: how all processes will stop after this step; None to continue.
        last_step, last_norms: metrics of the last step.
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
        # transformers loads an LLM in eval mode, without dropout and activation checkpointing.
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
        """Shards the model; Lightning calls this once the process group exists."""
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
        # A rank with images need not wait for the totals, which say whether any rank has images.
        if idle and not self.recipe.update_idle_projector and not totals.passes_with_images:
            # Their gradients are zero on every rank, but AdamW would still move them (momentum, weight decay). Without
            # a gradient it skips them.
            self.vlm.projector.zero_grad()
            self.vlm.backbone.zero_grad()
        norm = grad_norm(self.vlm.parameters())
        parts = {"projector": self.vlm.projector, "lm": self.vlm.lm}
        if self.vlm.backbone.trained:
            parts["tower"] = self.vlm.backbone
        norms = (grad_norm(part.parameters()) for part in parts.values())
        # In one transfer to the host, so that the step synchronises with the device only once.
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
            # Not clipped earlier: a NaN norm would make all gradients NaN, and `diagnose` looks at them.
            if self.recipe.grad_clip > 0:
                nn.utils.clip_grads_with_norm_(self.vlm.parameters(), self.recipe.grad_clip, norm)
            optimizer.step()
        else:
            self._handle_nonfinite(batch)
            optimizer.zero_grad()
            count_skipped_step(self.trainer)
        scheduler.step()
        self.counts["tokens_cut"] += int(totals.tokens_cut)
        self.counts["bad_images"] += int(totals.bad_images)
        if totals.bad_records:  # the same on all ranks, which gather together
            self.bad_rows.update(*gather_objects(batch.bad_rows))
            self.counts["bad_records"] = len(self.bad_rows)
        if totals.preempted:
            self.stop = Interrupted if totals.interrupted else Preempted

    def _totals(self, step: Step) -> _Totals:
        """The counts of a step, summed over all ranks."""
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
        return _Totals(*self.trainer.strategy.reduce(counted, reduce_op="sum"))

    def _accumulate(self, step: Step, totals: _Totals) -> Tensor:
        """Runs the forward and backward passes; returns the loss of the step over all ranks, float[]."""
        # Without any target the loss is 0, not NaN.
        targets = totals.targets.float().clamp(min=1)
        passes = totals.passes.float().clamp(min=1)
        size = self.trainer.world_size  # DDP and FSDP divide gradients by this
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
        # Like the gradients, the ranks' losses were scaled such that their mean is the loss over all ranks.
        return self.trainer.strategy.reduce(total, reduce_op="sum") / size

    def _seed_step(self) -> None:
        """Makes dropout a function of seed, step and rank, so that checkpoints need no generator state."""
        key = f"{self._seed}/{self.trainer.global_step}/{self.global_rank}"
        torch.manual_seed(int.from_bytes(hashlib.blake2b(key.encode(), digest_size=7).digest(), "big"))

    def _handle_nonfinite(self, step: Step) -> None:
        self._seed_step()  # `diagnose` repeats the forward passes with the same dropout
        number = self.trainer.global_step + 1
        message = f"step {number}: loss or gradient not finite: {diagnose(self.vlm, step.batches)}"
        if self._nonfinite == "stop":
            raise NonFinite(
                f"{message}. Lower recipe.lr, fix the records, or set trainer.nonfinite=skip to skip such steps."
            )
        self.counts["steps_skipped"] += 1
        log.warning("Skipped %s", message)

    def on_validation_epoch_start(self) -> None:
        self._validation = torch.zeros(2, dtype=torch.float64, device=self.device)

    def validation_step(self, batch: Step, batch_idx: int) -> None:
        for micro_batch in batch.batches:
            loss = self.vlm(micro_batch)
            self._validation += torch.stack([loss.total.double(), loss.count.double()])

    def on_validation_epoch_end(self) -> None:
        # Every rank takes part, even one with filler batches only: the mean is over the tokens of all ranks.
        sums: Any = self.trainer.strategy.reduce(self._validation, reduce_op="sum")
        total, count = sums
        self.val_loss = (total / count.clamp(min=1)).float().item()
