"""The records of a run as a LightningDataModule."""

from __future__ import annotations

import logging

import numpy as np
import pytorch_lightning as pl
from omegaconf import DictConfig
from torch import Tensor
from torch.utils.data import DataLoader

from prism_deco.build import build_encoder, record_options
from prism_deco.config import cache_dir
from prism_deco.data import Source
from prism_deco.data.encoder import Encoder, check_records
from prism_deco.data.images import ImageSource
from prism_deco.data.loader import Collate, Examples, Step, build_loader, loader_workers, stack_pixels
from prism_deco.data.records import Records, open_parts
from prism_deco.data.samplers import Population, StepSampler, in_order
from prism_deco.errors import UsageError
from prism_deco.llms import LanguageModel
from prism_deco.vlm import VLM

log = logging.getLogger(__name__)


class Conversations(pl.LightningDataModule):
    """Training and validation loaders whose items are optimizer steps.

    Args:
        vlm, llm: the model for which images and text are prepared; may be on the meta device.

    Attributes:
        available_steps: optimizer steps of all epochs.
        total_steps: optimizer steps of the whole run, at most `recipe.max_steps`.

    Raises:
        UsageError: a record is malformed and `data.on_bad_record` is "fail", or no record is left to train on.
    """

    def __init__(self, source: Source, config: DictConfig, vlm: VLM, llm: LanguageModel):
        super().__init__()
        self._config = config
        self.benchmarks = source.benchmarks
        parts = open_parts(source, cache_dir(), **record_options(config))
        self.data_hash, self.val_hash = parts.records.data_hash, parts.val.data_hash
        self.train_records, self.val_records, self.left_out = parts.train, parts.val, parts.left_out
        encoder = build_encoder(config, llm, vlm.projector.num_tokens)
        self.train_examples = self._examples(self.train_records, source.images(parts.records), encoder, vlm)
        self.val_examples = self._examples(self.val_records, source.images(parts.val), encoder, vlm)
        self.collate = Collate(
            vlm.projector.num_tokens,
            config.recipe.micro_batch_size,
            restart_rounds=vlm.turn_mask == "block",
            pack=config.recipe.packing,
            coarser=vlm.projector.scales[1:],
        )
        self.population = Population(self.train_records.words, self.train_records.has_image)
        self.available_steps = len(self._sampler())
        self.total_steps = min(self.available_steps, config.recipe.max_steps or self.available_steps)
        self._workers = 0

    def check(self) -> None:
        """Finds records that cannot be encoded and missing images, which would otherwise stop the run at some step.
        Logs how many records are skipped, and whether the run is shorter than `recipe.max_steps`.

        Raises:
            UsageError: names the first one, unless `data.on_bad_record` or `data.on_bad_image` is "skip".
        """
        recipe = self._config.recipe
        settings = self._config.data
        if self.left_out:
            log.info("Skipping %d bad records (data.on_bad_record=skip): %s", len(self.left_out), self.left_out[0])
        for examples in (self.train_examples, self.val_examples):
            if settings.on_bad_record == "fail":
                check_records(examples.records, examples.encoder)
            elif len(examples.records) and examples.records.column("system").all():
                # If the prompt format rejects system turns and all records have one, skipping would leave none.
                examples.encoder(examples.records[0])
            if settings.on_bad_image == "fail":
                _check_images(examples)
        if recipe.max_steps is not None and recipe.max_steps > self.available_steps:
            log.warning(
                "recipe.max_steps=%d is not reached: recipe.epochs=%d over %d records in batches of %d is %d steps. "
                "Raise recipe.epochs to train longer.",
                *(recipe.max_steps, recipe.epochs, len(self.train_records), recipe.global_batch_size),
                self.available_steps,
            )

    def train_dataloader(self) -> DataLoader[Step]:
        trainer = self.trainer
        assert trainer is not None
        gpu = trainer.strategy.root_device.type == "cuda"
        self._workers = loader_workers(self._config.data.num_workers, gpu=gpu, ranks=trainer.num_devices)
        sampler = self._sampler(trainer.global_rank, trainer.world_size, trainer.global_step)
        return build_loader(self.train_examples, self.collate, sampler, num_workers=self._workers)

    def val_dataloader(self) -> DataLoader[Step]:
        trainer = self.trainer
        assert trainer is not None
        size = self.collate.micro_batch_size
        batches = in_order(len(self.val_records), size, trainer.global_rank, trainer.world_size)
        return build_loader(self.val_examples, self.collate, batches, num_workers=self._workers)

    def sample_pixels(self, count: int) -> dict[str, Tensor]:
        """Per tower float[I, 3, S, S]: the images of up to `count` training records, evenly spaced."""
        with_image = np.flatnonzero(self.train_records.has_image)
        if len(with_image) == 0:
            raise UsageError("recipe.standardise_features needs training records with images; there are none.")
        spread = with_image[np.linspace(0, len(with_image) - 1, min(count, len(with_image))).astype(int)]
        pixels = stack_pixels([p for i in spread.tolist() for p in self.train_examples[i].pixels])
        assert pixels is not None
        return pixels

    def _sampler(self, rank: int = 0, world_size: int = 1, start_step: int = 0) -> StepSampler:
        recipe = self._config.recipe
        return StepSampler(
            recipe.sampler,
            self.population,
            global_batch_size=recipe.global_batch_size,
            epochs=recipe.epochs,
            seed=self._config.seed,
            rank=rank,
            world_size=world_size,
            start_step=start_step,
        )

    def _examples(self, records: Records, images: ImageSource, encoder: Encoder, vlm: VLM) -> Examples:
        if self._config.data.draft_jpeg:
            images.least_side = 2 * max(tower.image_size for tower in vlm.backbone.transform.towers.values())
        return Examples(
            records,
            images,
            encoder,
            vlm.backbone.transform,
            on_bad_image=self._config.data.on_bad_image,
            on_bad_record=self._config.data.on_bad_record,
        )


def _check_images(examples: Examples) -> None:
    """`UsageError` if an image is missing, which would otherwise end the run after hours."""
    if len(examples):
        log.info("Checking that the images of %d records exist", len(examples))
    owners = {image: record.id for record in examples.records for image in record.images}
    missing = examples.images.missing(owners)
    if missing:
        first = missing[0][:300]  # very long where a file holds base64 instead of names
        raise UsageError(
            f"{len(missing)} of {len(owners)} images are missing under {examples.images}; the first is {first} "
            f"(record {owners[missing[0]]}). Fix data.image_root, or train without them: data.on_bad_image=skip"
        )
