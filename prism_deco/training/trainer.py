"""Trains a configured model in its run folder."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from omegaconf import DictConfig
from pytorch_lightning.callbacks import Callback

from prism_deco.build import build_model, group
from prism_deco.data import build_source
from prism_deco.distributed import World
from prism_deco.exits import Interrupted, Preempted, Preemption, Stop, requeue
from prism_deco.features import FeatureCache
from prism_deco.files import write_json
from prism_deco.llms import LanguageModel
from prism_deco.llms.build import weight_map
from prism_deco.llms.layers import checkpoint_activations
from prism_deco.llms.packed_attention import use_packed_attention
from prism_deco.llms.spec import read_spec
from prism_deco.plan.flops import TrainingFlops, training_flops
from prism_deco.plan.meta_models import NeedsData
from prism_deco.processes import clear_failures, failure_recorded
from prism_deco.training.board import Loggers
from prism_deco.training.callbacks import Recorder, SampleAnswers, SpeedMonitor
from prism_deco.training.checkpoint_callback import Checkpointing
from prism_deco.training.checkpoints import CHECKPOINTS, Checkpoint
from prism_deco.training.compiling import compile_layers
from prism_deco.training.datamodule import Conversations
from prism_deco.training.feature_cache import build_caches, cached
from prism_deco.training.init_from import find_start, start_from, takes_llm
from prism_deco.training.lightning_internals import fit
from prism_deco.training.manifest import build_manifest, check_owner, provenance
from prism_deco.training.model_folder import save_model, verify_model
from prism_deco.training.module import TrainingModule
from prism_deco.training.preflight import preflight
from prism_deco.training.progress import Metrics, read_status, set_status
from prism_deco.training.run_dir import RunTarget, full_disk_named
from prism_deco.training.sharding import Sharding, reshard, strategy_of
from prism_deco.vlm import VLM

log = logging.getLogger(__name__)

FEATURE_STATISTICS_IMAGES = 512


def train(
    config: DictConfig, data: Conversations | None, target: RunTarget, world: World, preemption: Preemption
) -> None:
    """Trains the configured model and writes `model/`, `manifest.json` and `status.json`; every process calls this.

    Args:
        data: of the run, if this process has opened it already.
        target: the run's folder and the checkpoint to resume from.

    Raises:
        Stop: the run ended early.
    """
    started = time.time()
    finish = partial(_finish, target.folder, config.trainer.requeue)
    logged = _logged(target.folder) if world.is_main else nullcontext()
    with logged, failure_recorded(target.folder, world, finish):
        if world.is_main:
            set_status(target.folder, "running", pid=os.getpid(), started=started)
        with full_disk_named(target.folder):
            _train(config, data, target, world, preemption)
    if world.is_main:
        clear_failures(target.folder)
        set_status(target.folder, "trained", started=started, seconds=round(time.time() - started, 1))
    world.barrier()  # the caller reads the model, which rank 0 has written


def _train(
    config: DictConfig, data: Conversations | None, target: RunTarget, world: World, preemption: Preemption
) -> None:
    if config.trainer.threads:
        torch.set_num_threads(config.trainer.threads)
    pl.seed_everything(config.seed, workers=True, verbose=False)
    resume = start = None
    if target.checkpoint is not None:
        resume = Checkpoint(target.checkpoint)
        check_owner(resume, config)
        resume.verify()
    if config.recipe.start_from:
        start = find_start(Path(config.recipe.start_from), config)
        world.decide(partial(verify_model, start))
    sharding = Sharding.of(config.trainer, world.size) if config.trainer.strategy == "fsdp" else None
    vlm, llm = _build(config, start, sharding)
    if data is None:
        data = Conversations(build_source(group(config, "data")), config, vlm, llm)
    _announce(config, target, world, vlm, data)
    if config.recipe.standardise_features and resume is None:
        # Checkpoints contain them. Computed on rank 0 for all: with another number of threads, other ranks would round
        # differently.
        statistics = world.decide(lambda: vlm.fit_features(data.sample_pixels(FEATURE_STATISTICS_IMAGES), world.device))
        vlm.feature_mean, vlm.feature_std = statistics
    if start is not None:
        start_from(start, config, vlm, llm)
    about = world.decide(lambda: provenance(config, vlm, llm, data, start, resume))
    if config.trainer.preflight and resume is None:
        world.decide(lambda: preflight(config, target.folder, vlm, llm, data, world.device))
    caches = build_caches(config, vlm, data, world) if config.trainer.feature_cache else []
    module = TrainingModule(
        vlm,
        config.recipe,
        data.total_steps,
        seed=config.seed,
        nonfinite=config.trainer.nonfinite,
        shard=partial(sharding.apply, vlm, llm) if sharding else None,
        stop_requested=lambda: preemption.requested,
    )
    metrics = loggers = None
    if world.is_main:
        steps_done = resume.step if resume else 0
        metrics, loggers = Metrics(target.folder, steps_done), Loggers(target.folder, config, steps_done)
    # Lightning calls them in this order: the metrics of a step must be recorded before its checkpoint is saved.
    callbacks: list[Callback] = [SpeedMonitor(_step_flops(config, caches), config.trainer.log_every, loggers)]
    if config.trainer.samples:
        callbacks.append(SampleAnswers(llm, data, config.trainer.samples, loggers))
    if metrics and loggers:
        callbacks.append(Recorder(metrics, loggers, config.trainer.log_every))
    callbacks.append(Checkpointing(target.folder / CHECKPOINTS, resume, metrics, config.trainer, about, preemption))
    trainer = _lightning_trainer(config, world, data, callbacks)
    with preemption.at_boundaries():
        with cached(vlm, data, caches) if caches else nullcontext(), half_precision_tower(vlm, config.trainer):
            fit(trainer, module, data)
            reshard(vlm)
        model_sha256 = save_model(target.folder / "model", config, vlm, llm)
        if world.is_main:
            manifest = build_manifest(
                config,
                vlm,
                data,
                module.counts,
                module.bad_rows,
                input_changes=about["input_changes"],
                devices=world.size,
                feature_caches=[cache.digest for cache in caches if cache.names],
                model_sha256=model_sha256,
            )
            write_json(target.folder / "manifest.json", manifest)


def _build(config: DictConfig, start: Path | None, sharding: Sharding | None) -> tuple[VLM, LanguageModel]:
    """The model on the CPU; if it is sharded, possibly with its LLM on the meta device, so that each process later
    reads only its shard."""
    # Random weights are drawn whole, so that they do not depend on how they are sharded.
    defers = sharding is not None and config.llm.pretrained and weight_map(read_spec(group(config, "llm"))) is not None
    if start is not None and takes_llm(start, config):
        defers = False
    vlm, llm = build_model(config, defer_llm=defers)
    if config.recipe.packing:
        use_packed_attention(vlm.lm)
    if config.trainer.activation_checkpointing != "none":
        blocks = vlm.backbone.blocks if vlm.backbone.trained else []
        checkpoint_activations(vlm.lm, config.trainer.activation_checkpointing, blocks)
    if config.trainer.compile:
        compile_layers(vlm)
    return vlm, llm


@contextmanager
def half_precision_tower(vlm: VLM, settings: DictConfig) -> Iterator[None]:
    """Keeps a frozen tower's weights in bfloat16 during a `bf16-mixed` training, as prismatic-vlms does: this halves
    their memory and saves the casts of each pass. Under FSDP the mixed-precision policy does the same. Restores the
    original weights afterwards."""
    applies = settings.precision == "bf16-mixed" and settings.strategy != "fsdp" and not vlm.backbone.trained
    exact = [(parameter, parameter.data) for parameter in vlm.backbone.parameters()] if applies else []
    for parameter, weights in exact:
        parameter.data = weights.bfloat16()
    try:
        yield
    finally:
        for parameter, weights in exact:
            parameter.data = weights


def _announce(config: DictConfig, target: RunTarget, world: World, vlm: VLM, data: Conversations) -> None:
    if world.is_main:
        set_status(target.folder, **read_status(target.folder), total_steps=data.total_steps)
    log.info(
        "Training %s: %d records (%d with images), %d steps, %d visual tokens per image, %d processes",
        config.run_id,
        len(data.train_records),
        np.count_nonzero(data.train_records.has_image),
        data.total_steps,
        vlm.projector.num_tokens,
        world.size,
    )


def _step_flops(config: DictConfig, caches: list[FeatureCache]) -> TrainingFlops | None:
    """The FLOPs of a step, for the utilisation of GPUs; None on devices of unknown peak."""
    if not torch.cuda.is_available():
        return None
    try:
        flops = training_flops(config)
    except NeedsData as error:
        log.info("train/mfu will not be logged: %s", error)
        return None
    return replace(flops, tower=0) if caches else flops


def _lightning_trainer(config: DictConfig, world: World, data: Conversations, callbacks: list[Callback]) -> pl.Trainer:
    settings = config.trainer
    return pl.Trainer(
        accelerator=settings.accelerator,
        devices=world.devices,
        num_nodes=settings.num_nodes,
        strategy=strategy_of(settings, world),
        # FSDP sets its precision in `Sharding`.
        precision="32-true" if settings.strategy == "fsdp" else settings.precision,
        plugins=[world.environment] if world.grouped and world.environment else None,
        # To Lightning, all epochs are one: the loader iterates over them (StepSampler).
        max_epochs=1,
        max_steps=data.total_steps,
        val_check_interval=max(1, round(data.total_steps * settings.val_every)),
        check_val_every_n_epoch=None,
        # A resumed run may validate before its first step; under inference mode FSDP's buffers then fail in training.
        inference_mode=False,
        limit_val_batches=1.0 if len(data.val_records) else 0,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
        logger=False,
    )


def _finish(folder: Path, requeues: bool, stop: Stop) -> None:
    """Records why the run ended early, and requeues a preempted SLURM job if configured."""
    requeues = requeues and isinstance(stop, Preempted) and not isinstance(stop, Interrupted)
    details: dict[str, object] = {"requeued": True} if requeues else {}
    with suppress(OSError):  # the disk may be what failed
        set_status(folder, stop.state, reason=" ".join(str(stop).split()), **details)
    if requeues:
        requeue()


class _LogFile(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        """Drops lines silently on a full disk: the run ends with one clear message at the next file it must write."""


@contextmanager
def _logged(folder: Path) -> Iterator[None]:
    """Writes the log to `train.log` in the run's folder."""
    logger = logging.getLogger("prism_deco")
    handler = _LogFile(folder / "train.log", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()
