"""A training run: from the configuration to a self-describing run folder."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from omegaconf import DictConfig
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor

from prism_deco.build import build_model, group, max_positions
from prism_deco.config.registry import unknown
from prism_deco.data import Source, build_source
from prism_deco.distributed import World
from prism_deco.errors import UsageError
from prism_deco.exits import Interrupted, Preempted, Stop
from prism_deco.files import write_json
from prism_deco.llms import LanguageModel, build_llm
from prism_deco.llms.build import tensor_files
from prism_deco.llms.checkpointing import checkpoint_activations
from prism_deco.llms.isolation import check_isolation
from prism_deco.plan.flops import training_flops
from prism_deco.processes import clear_failures, failure_recorded
from prism_deco.training.board import Board
from prism_deco.training.callbacks import ProgressReport, SampleAnswers
from prism_deco.training.checkpoint_callback import Checkpointing
from prism_deco.training.checkpoints import Checkpoint
from prism_deco.training.checksums import trained_sha256, verify_model
from prism_deco.training.datamodule import Conversations
from prism_deco.training.feature_cache import build_caches, cached
from prism_deco.training.init_from import find_start, start_from, takes_llm
from prism_deco.training.lightning_internals import FirstError
from prism_deco.training.manifest import build_manifest
from prism_deco.training.metrics import VAL_LOSS, Metrics, Recorder
from prism_deco.training.model_folder import save_model
from prism_deco.training.module import TrainingModule
from prism_deco.training.monitor import SpeedMonitor, choices_of
from prism_deco.training.preemption import Preemption, requeue
from prism_deco.training.preflight import preflight
from prism_deco.training.provenance import Provenance, check_owner, find_provenance
from prism_deco.training.run_dir import RunTarget, full_disk_named
from prism_deco.training.sharding import Sharding, reshard
from prism_deco.training.status import read_status, set_status
from prism_deco.vlm import VLM

log = logging.getLogger(__name__)

FEATURE_STATISTICS_IMAGES = 512


def train(config: DictConfig, plan: RunTarget, world: World, preemption: Preemption) -> None:
    """Trains the configured model and writes `model/`, `manifest.json` and `status.json`.

    Args:
        plan: what `prepare_run` found; training goes on from its checkpoint.
        world: the processes of the run; each of them calls this.

    Raises:
        Stop: the run ended early: preempted, out of memory, a guard, another process.
    """
    started = time.time()
    finish = partial(_finish, plan.folder, config.trainer.requeue)
    with _logged(plan.folder, world), failure_recorded(plan.folder, world, finish):
        if world.is_main:
            set_status(plan.folder, "running", pid=os.getpid(), started=started)
        with full_disk_named(plan.folder):
            _train(config, plan, world, preemption)
    if world.is_main:
        clear_failures(plan.folder)
        set_status(plan.folder, "trained", started=started, seconds=round(time.time() - started, 1))
    world.barrier()  # what follows reads the model that the first process has written


def _finish(folder: Path, requeues: bool, stop: Stop) -> None:
    requeues = requeues and isinstance(stop, Preempted) and not isinstance(stop, Interrupted)
    with suppress(OSError):  # the disk may be what failed
        set_status(folder, stop.state, reason=" ".join(str(stop).split()), **({"requeued": True} if requeues else {}))
    if requeues:
        requeue()


class _LogFile(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        """A full disk takes no line. The write of what the run needs is what ends it, with one message."""


@contextmanager
def _logged(folder: Path, world: World) -> Iterator[None]:
    """Rank 0 keeps a log in the run's folder."""
    if not world.is_main:
        yield
        return
    logger = logging.getLogger("prism_deco")
    handler = _LogFile(folder / "train.log", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()


def _train(config: DictConfig, plan: RunTarget, world: World, preemption: Preemption) -> None:
    if config.trainer.threads:
        torch.set_num_threads(config.trainer.threads)
    pl.seed_everything(config.seed, workers=True, verbose=False)
    resume = _open_checkpoint(config, plan)
    start = None
    if config.recipe.start_from:
        start = find_start(Path(config.recipe.start_from), config)  # a wrong one must not wait for the LLM's weights
        world.decide(partial(verify_model, start))
    with world.main_first():
        source = build_source(group(config, "data"))
    sharding = Sharding.of(config.trainer, world.size) if config.trainer.strategy == "fsdp" else None
    is_read_later = sharding is not None and _is_readable_in_pieces(config)
    if start is not None and takes_llm(start, config):
        is_read_later = False
    vlm, llm = build_model(config, defer_llm=is_read_later)
    recipe = config.recipe
    check_isolation(vlm.lm, packing=recipe.packing, turn_mask=recipe.turn_mask, longest=max_positions(config, llm))
    checkpoint_activations(vlm.lm, config.trainer.activation_checkpointing)
    with world.main_first():
        data = Conversations(source, config, vlm, llm)
    if world.is_main:
        set_status(plan.folder, **read_status(plan.folder), total_steps=data.total_steps)
    if config.recipe.standardise_features and plan.checkpoint is None:
        _fit_features(vlm, data, world)
    if config.recipe.start_from:
        start_from(Path(config.recipe.start_from), config, vlm, llm)
    provenance = world.decide(lambda: find_provenance(config, vlm, data, start, resume))
    if config.trainer.preflight and plan.checkpoint is None:
        world.decide(lambda: preflight(config, plan.folder, vlm, llm, data, world.device))
    caches = build_caches(config, vlm, data, world)
    module = TrainingModule(
        vlm,
        config.recipe,
        data.total_steps,
        seed=config.seed,
        nonfinite=config.trainer.nonfinite,
        shard=partial(sharding.apply, vlm, llm) if sharding else None,
        stop_requested=lambda: preemption.requested,
    )
    trainer = _trainer(config, plan, resume, provenance, world, data, llm, preemption, cached=bool(caches))
    log.info(
        "Training %s: %d records (%d with images), %d steps, %d visual tokens per image, %d processes",
        config.run_id,
        len(data.train_records),
        np.count_nonzero(data.train_records.has_image),
        data.total_steps,
        vlm.projector.num_tokens,
        world.size,
    )
    with preemption.at_boundaries():
        with cached(vlm, data, caches):
            _fit(trainer, module, data)
            reshard(vlm)
        digests = [cache.digest for cache in caches if cache.names]
        _save(config, plan.folder, vlm, llm, data, module, source, provenance, world, digests)


def _open_checkpoint(config: DictConfig, plan: RunTarget) -> Checkpoint | None:
    """The checkpoint to continue from, verified; all processes must call it."""
    if plan.checkpoint is None:
        return None
    checkpoint = Checkpoint(plan.checkpoint)
    check_owner(checkpoint, config)
    checkpoint.verify()
    return checkpoint


def _fit_features(vlm: VLM, data: Conversations, world: World) -> None:
    """In the first process, for all: on another number of threads the others would round otherwise."""

    def fit() -> tuple[Tensor | None, Tensor | None]:
        vlm.fit_features(data.sample_pixels(FEATURE_STATISTICS_IMAGES), world.device)
        return vlm.feature_mean, vlm.feature_std

    vlm.feature_mean, vlm.feature_std = world.decide(fit)


def _fit(trainer: pl.Trainer, module: TrainingModule, data: Conversations) -> None:
    first = FirstError()
    trainer.callbacks.insert(0, first)  # type: ignore[attr-defined]
    try:
        trainer.fit(module, datamodule=data)
    except BaseException as error:
        raise first.error or error from None


def _is_readable_in_pieces(config: DictConfig) -> bool:
    """Whether each process can read just its part of the LLM's weights: there are files, and nothing else in them.

    Random weights are drawn whole, so that they do not depend on how they are sharded.
    """
    if not config.llm.pretrained:
        return False
    spec = build_llm(group(config, "llm"), pretrained=False, device="meta").spec
    return tensor_files(spec) is not None


def strategy_of(config: DictConfig, world: World) -> Any:
    """Lightning's strategy of that name; `UsageError` where it is unknown, or not for that many devices."""
    strategies = {
        "auto": lambda: "auto",
        "ddp": lambda: DDPStrategy(timeout=world.timeout),
        # Its defaults shard nothing and synchronise nothing.
        "fsdp": lambda: ModelParallelStrategy(data_parallel_size=world.size, tensor_parallel_size=1),
    }
    if config.trainer.strategy not in strategies:
        raise unknown("trainer.strategy", config.trainer.strategy, strategies)
    if config.trainer.strategy == "auto" and world.size > 1:
        raise UsageError(f"{world.size} devices need trainer.strategy=ddp or trainer.strategy=fsdp.")
    return strategies[config.trainer.strategy]()


def _trainer(
    config: DictConfig,
    plan: RunTarget,
    resume: Checkpoint | None,
    provenance: Provenance,
    world: World,
    data: Conversations,
    llm: LanguageModel,
    preemption: Preemption,
    *,
    cached: bool,
) -> pl.Trainer:
    settings = config.trainer
    every = settings.checkpoint_every
    every = max(1, round(every * data.total_steps)) if 0 < every < 1 else int(every)
    metrics = board = None
    callbacks: list[Callback] = []
    if world.is_main:
        start = resume.step if resume else 0
        metrics, board = Metrics(plan.folder, start), Board(plan.folder, start)
        board.hyperparameters(choices_of(config), [VAL_LOSS])
        callbacks.append(ProgressReport())
    # Only GPUs have a known peak to compare with.
    flops = training_flops(config) if torch.cuda.is_available() else None
    if flops is not None and cached:
        flops = replace(flops, tower=0)
    callbacks += [SpeedMonitor(flops, settings.log_every, board), SampleAnswers(llm, data, settings.samples, board)]
    if metrics and board:
        callbacks.append(Recorder(metrics, board, settings.log_every))
    callbacks.append(
        Checkpointing(
            plan.folder,
            resume,
            metrics,
            every=every,
            keep=settings.keep_checkpoints,
            about=provenance.content,
            preemption=preemption,
        )
    )
    return pl.Trainer(
        accelerator=settings.accelerator,
        devices=world.devices,
        num_nodes=settings.num_nodes,
        strategy=strategy_of(config, world),
        # Sharded weights have their types set where they are sharded.
        precision="32-true" if settings.strategy == "fsdp" else settings.precision,
        plugins=[world.environment] if world.grouped and world.environment else None,
        max_epochs=1,
        max_steps=data.total_steps,
        # The loader runs through all epochs in one pass; see StepSampler.
        val_check_interval=max(1, round(data.total_steps * settings.val_every)),
        check_val_every_n_epoch=None,
        # A validation before the first step, after resuming, would leave FSDP's buffers unfit for training.
        inference_mode=False,
        limit_val_batches=1.0 if len(data.val_records) else 0,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
        logger=False,
        default_root_dir=plan.folder,
    )


def _save(
    config: DictConfig,
    folder: Path,
    vlm: VLM,
    llm: LanguageModel,
    data: Conversations,
    module: TrainingModule,
    source: Source,
    provenance: Provenance,
    world: World,
    feature_caches: list[str],
) -> None:
    save_model(folder / "model", config, vlm, llm)
    if not world.is_main:
        return
    manifest = build_manifest(
        config,
        vlm,
        data_hash=data.data_hash,
        input_changes=provenance.changes,
        steps=data.total_steps,
        samples=min(data.total_steps * config.recipe.global_batch_size, len(data.train_records) * config.recipe.epochs),
        records=len(data.train_records),
        records_with_images=int(np.count_nonzero(data.train_records.has_image)),
        bad_records=len(data.left_out) + module.counts["bad_records"],
        bad_images=module.counts["bad_images"],
        text_tokens_cut=module.counts["tokens_cut"],
        steps_skipped=module.counts["steps_skipped"],
        devices=world.size,
        feature_caches=feature_caches,
        model_sha256=trained_sha256(folder / "model"),
        benchmarks=str(source.benchmarks) if source.benchmarks else None,
    )
    write_json(folder / "manifest.json", manifest)
