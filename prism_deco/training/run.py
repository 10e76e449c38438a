"""A training run: from the configuration to a self-describing run folder."""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from pathlib import Path

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import TensorBoardLogger

from prism_deco.compose import build_model, group
from prism_deco.config import save_config
from prism_deco.data import Source, build_source
from prism_deco.llms import LanguageModel
from prism_deco.training.artifacts import WEIGHTS, save_model
from prism_deco.training.callbacks import ProgressBar, SampleAnswers
from prism_deco.training.datamodule import Conversations
from prism_deco.training.manifest import build_manifest, file_sha256, write_json
from prism_deco.training.module import TrainingModule
from prism_deco.vlm import VLM

log = logging.getLogger(__name__)

FEATURE_STATISTICS_IMAGES = 512


def default_run_id(config: DictConfig) -> str:
    """A name made of the choices and the seed: `mini_siglip-avgpool-mini_qwen2-shapes-mini-s7`."""
    names = [config[key].name for key in ("backbone", "projector", "llm", "data", "recipe")]
    return "-".join([*names, f"s{config.seed}"])


def prepare_run(config: DictConfig, *, overwrite: bool = False) -> Path:
    """Creates the run's folder with its `config.yaml`.

    Raises:
        ValueError: the folder holds a run already and `overwrite` is false.
    """
    config.run_id = config.run_id or default_run_id(config)
    folder = Path(config.runs_dir) / config.run_id
    if folder.exists():
        if not overwrite:
            raise ValueError(
                f"{folder} already holds a {_state(folder)} run. Keep it and name this one run_id=NAME, or replace it "
                "with --overwrite."
            )
        log.warning("Removing the earlier run in %s", folder)
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    save_config(config, folder / "config.yaml")
    return folder


def train(config: DictConfig, folder: Path) -> Path:
    """Trains the configured model and writes `model/`, `manifest.json` and `status.json`.

    Args:
        folder: what `prepare_run` made.
    """
    handler = logging.FileHandler(folder / "train.log", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.getLogger("prism_deco").addHandler(handler)
    started = time.time()
    set_status(folder, "running", pid=os.getpid(), started=started)
    try:
        _train(config, folder)
    except BaseException as error:
        set_status(folder, "failed", reason=f"{type(error).__name__}: {error}")
        log.error("The run failed: %s", error)
        raise
    finally:
        logging.getLogger("prism_deco").removeHandler(handler)
        handler.close()
    set_status(folder, "trained", started=started, seconds=round(time.time() - started, 1))
    return folder


def set_status(folder: Path, state: str, **details: object) -> None:
    """Writes `status.json`: running | failed | trained | done."""
    write_json(folder / "status.json", {"state": state, **details})


def _train(config: DictConfig, folder: Path) -> None:
    if config.trainer.threads:
        torch.set_num_threads(config.trainer.threads)
    pl.seed_everything(config.seed, workers=True, verbose=False)
    source = build_source(group(config, "data"))
    vlm, llm = build_model(config)
    data = Conversations(source, config, vlm, llm)
    if config.recipe.standardise_features:
        vlm.fit_features(data.sample_pixels(FEATURE_STATISTICS_IMAGES))
    module = TrainingModule(vlm, config.recipe, data.total_steps, config.trainer.log_every)
    trainer = _trainer(config, folder, data, llm)
    log.info(
        "Training %s: %d records, %d steps, %d visual tokens per image",
        config.run_id,
        len(data.train_records),
        data.total_steps,
        vlm.projector.num_tokens,
    )
    trainer.fit(module, datamodule=data)
    if trainer.interrupted:
        raise KeyboardInterrupt
    _save(config, folder, vlm, llm, data, module, source)


def _trainer(config: DictConfig, folder: Path, data: Conversations, llm: LanguageModel) -> pl.Trainer:
    settings = config.trainer
    callbacks: list[Callback] = [ProgressBar(), SampleAnswers(llm, settings.samples)]
    return pl.Trainer(
        accelerator=settings.accelerator,
        devices=settings.devices,
        num_nodes=settings.num_nodes,
        strategy=settings.strategy,
        precision=settings.precision,
        max_epochs=1,
        max_steps=data.total_steps,
        # The loader runs through all epochs in one pass; see StepSampler.
        val_check_interval=max(1, round(data.total_steps * settings.val_every)),
        check_val_every_n_epoch=None,
        limit_val_batches=1.0 if len(data.val_records) else 0,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        log_every_n_steps=settings.log_every,
        callbacks=callbacks,
        logger=TensorBoardLogger(folder, name=None, version="tensorboard", default_hp_metric=False),
        default_root_dir=folder,
    )


def _save(
    config: DictConfig,
    folder: Path,
    vlm: VLM,
    llm: LanguageModel,
    data: Conversations,
    module: TrainingModule,
    source: Source,
) -> None:
    save_model(folder / "model", config, vlm, llm)
    manifest = build_manifest(
        config,
        vlm,
        data_hash=data.data_hash,
        steps=data.total_steps,
        samples=min(data.total_steps * config.recipe.global_batch_size, len(data.train_records) * config.recipe.epochs),
        bad_images=module.bad_images,
        text_tokens_cut=module.tokens_cut,
        model_sha256=file_sha256(folder / "model" / WEIGHTS),
        benchmarks=str(source.benchmarks) if source.benchmarks else None,
    )
    write_json(folder / "manifest.json", manifest)


def _state(folder: Path) -> str:
    try:
        return {"done": "finished", "trained": "finished"}[json.loads((folder / "status.json").read_text())["state"]]
    except (OSError, ValueError, KeyError):
        return "unfinished"
