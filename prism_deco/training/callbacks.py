"""What a run shows while it trains: a progress bar, and the model's own answers."""

from __future__ import annotations

from typing import cast

import numpy as np
import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback, RichProgressBar
from pytorch_lightning.loggers import TensorBoardLogger

from prism_deco.data.images import load_image
from prism_deco.data.loader import stack_pixels
from prism_deco.data.records import IMAGE_TAG
from prism_deco.data.split import Subset
from prism_deco.inference import answer
from prism_deco.llms import LanguageModel
from prism_deco.training.datamodule import Conversations
from prism_deco.training.module import TrainingModule


class ProgressBar(RichProgressBar):
    """Lightning's bar over optimizer steps, with time left; all epochs are one pass here."""

    def __init__(self) -> None:
        super().__init__(leave=True)

    @property
    def total_train_batches(self) -> int:
        """The steps of the run; the loader may have more, or, when a run goes on, fewer."""
        return int(self.trainer.max_steps)

    def _get_train_description(self, current_epoch: int) -> str:
        return "Training"

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics


class SampleAnswers(Callback):
    """Logs, after each validation, a few held-out images with the question, the model's answer and the
    reference answer (TensorBoard: images and text).

    Args:
        count: number of validation images shown, the first of the file; of each its first record.
    """

    def __init__(self, llm: LanguageModel, count: int, max_new_tokens: int = 32):
        self._llm = llm
        self._count = count
        self._max_new_tokens = max_new_tokens

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        vlm = cast(TrainingModule, pl_module).vlm
        # Where weights are sharded, all processes answer together, and the first one shows it.
        if trainer.sanity_checking or not (trainer.is_global_zero or vlm.every_unit):
            return
        assert isinstance(trainer.logger, TensorBoardLogger)
        step = trainer.global_step - 1  # what Lightning calls the step before this validation
        data = cast(Conversations, trainer.datamodule)  # type: ignore[attr-defined]  # set by Trainer.fit
        board = trainer.logger.experiment
        for row, index in enumerate(_distinct_images(data.val_records, self._count)):
            record = data.val_records[index]
            example = data.val_examples[index]
            if example.bad_images or example.bad_record:
                continue
            pixels = stack_pixels(example.pixels)
            assert pixels is not None
            pixels = {tower: images.to(pl_module.device) for tower, images in pixels.items()}
            question, reference = record.messages[0]["content"], record.messages[1]["content"]
            [text] = answer(
                vlm, self._llm, [list(vlm.visual_tokens(pixels))], [question], max_new_tokens=self._max_new_tokens
            )
            image = load_image(data.val_examples.images, record.images[0])
            board.add_image(f"samples/{row}", np.asarray(image), step, dataformats="HWC")
            shown = question.replace(IMAGE_TAG, "").strip()
            board.add_text(
                f"samples/{row}",
                f"**question** {shown}\n\n**answer** {text}\n\n**reference** {reference}",
                step,
            )


def _distinct_images(records: Subset, count: int) -> list[int]:
    """The first records of the first `count` images."""
    chosen: dict[tuple[str, ...], int] = {}
    for index in np.flatnonzero(records.has_image).tolist():
        chosen.setdefault(records[index].images, index)
        if len(chosen) >= count:
            break
    return list(chosen.values())[:count]
