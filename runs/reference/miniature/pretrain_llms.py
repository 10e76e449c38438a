"""Pretrains the miniature's language models on text alone: scenes in words and conversations about them.

python runs/reference/miniature/pretrain_llms.py [mini_qwen2 ...] --out DIR

Existence comes first. Mixed with other questions, whether a word is in a list is learned late and all at once.
Referring steps then train only the object that a box belongs to. The box's first number identifies this object; its
weight stays as large as a short answer's, so that the skill is not lost.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import logging
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from text_scenes import CELLS, Writer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import get_cosine_schedule_with_warmup

from prism_deco.backbones import build_backbone
from prism_deco.llms import Encoded, build_llm
from prism_deco.llms.encoding import IGNORE
from prism_deco.logs import configure_logging
from prism_deco.miniature.conversations import Balance, Pool, converse
from prism_deco.miniature.questions import Question
from prism_deco.miniature.rng import Dice
from prism_deco.miniature.scene import BINS, draw_scene
from prism_deco.miniature.templates import TEMPLATES
from prism_deco.projectors import build_projector
from prism_deco.sequence import Batch, build_batch
from prism_deco.training.optim import parameter_groups
from prism_deco.vlm import VLM

log = logging.getLogger("prism_deco.pretrain")

_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors")
_BY_NAME = {template.name: template for template in TEMPLATES}
_EXISTENCE = [_BY_NAME[name] for name in ("exists", "exists", "exists", "exists_confusable", "shape_exists")]


@dataclass(frozen=True)
class Settings:
    """Hyperparameters of one language model.

    Attributes:
        seed: seeds weights, conversations and order; the scenes are those of `seed + 3000`.
        steps: optimizer steps, each on texts of one form (folded or written).
        existence_steps: number of first steps, which ask only about existence.
        referring_steps: number of steps after these, which ask for boxes of objects by appearance, in folded scenes.
        batch_size: conversations per step.
        lr: peak learning rate (AdamW, warmup of 3 %, cosine).
        embedding_std: initial standard deviation of the input embeddings, large enough to tell words apart.
        folded_percent: percentage of the steps that read folded scenes; the others read written ones.
        noise: standard deviation of the noise added to folded cells, relative to that of the embeddings.
        turn_power: a token's weight is (tokens of its turn) ** -turn_power: boxes are long, yes and no are short.
        first_number: weight of a box's first number, which identifies the object; the others follow from it. 0 uses the
            weight of the box's other tokens.
        other_numbers: weight of the answer's other tokens in referring steps.
        held_out: number of held-out scenes for the metrics of the record.
        curve_every: steps between evaluations on 160 held-out scenes during training; 0 disables them. They consume
            random numbers, so changing this changes the weights.
    """

    seed: int = 0
    steps: int = 6000
    existence_steps: int = 1000
    referring_steps: int = 0
    batch_size: int = 8
    lr: float = 1.5e-3
    embedding_std: float = 0.32
    folded_percent: int = 70
    noise: float = 0.3
    turn_power: float = 0.5
    first_number: float = 0.0
    other_numbers: float = 0.1
    held_out: int = 400
    curve_every: int = 0


# Phi, with its parallel blocks, learns existence later than the others and forgets it in referring steps.
SETTINGS = {
    "mini_qwen2": Settings(referring_steps=800, first_number=1.0, curve_every=400),
    "mini_llama": Settings(steps=4000),
    "mini_phi": Settings(steps=5000, existence_steps=1500),
}
"""The settings of each shipped language model."""


class TextPretraining:
    """A language model that reads scenes in words instead of images.

    Args:
        name: a choice of `conf/llm`.
    """

    def __init__(self, name: str, settings: Settings):
        torch.manual_seed(settings.seed)
        self.settings = settings
        self.curve: dict[str, dict[str, float]] = {}
        self.llm = build_llm(name, pretrained=False)
        self.table.data.normal_(std=settings.embedding_std)
        self.writer = Writer(self.llm.tokenizer)
        # The full model, for its masks and positions; tower and projector are not used.
        tower = build_backbone("mini_siglip", pretrained=False, device="meta")
        projector = build_projector("avgpool", tower.embed_dim, self.llm.embed_dim, tower.grid, num_tokens=CELLS)
        self.vlm = VLM(tower, projector, self.llm.model, turn_mask="block").eval()

    @property
    def table(self) -> nn.Parameter:
        """float[V, E]: the input embeddings."""
        return cast(nn.Parameter, self.llm.model.get_input_embeddings().weight)

    def conversations(self, split: str, existence_first: int = 0) -> Iterator[tuple[int, list[Question]]]:
        """Infinite stream of scene indices with questions; the first `existence_first` ask only about existence."""
        balance = Balance()
        index = 0
        while True:
            dice = Dice(self.settings.seed, "llm", split, index)
            pool = Pool(draw_scene(self.settings.seed + 3000, f"llm {split}", index))
            # Turns do not attend to each other, so a question may be asked even if another turn reveals its answer.
            turns = [] if index < existence_first else converse(pool, dice, balance)
            for _ in range(4 if index < existence_first else 1):
                question = balance.ask(dice.pick(_EXISTENCE), pool, dice)
                turns += [] if question is None else [question]
            if turns:
                yield index, turns
            index += 1

    def referring(self) -> Iterator[tuple[int, list[Question]]]:
        """Infinite stream of scene indices with questions for boxes by appearance."""
        balance = Balance()
        for index in itertools.count():
            dice = Dice(self.settings.seed, "llm", "referring", index)
            pool = Pool(draw_scene(self.settings.seed + 3000, "llm train", index))
            turns = [balance.ask(_BY_NAME["refcoco+"], pool, dice) for _ in range(5)]
            if known := [question for question in turns if question is not None]:
                yield index, known

    def batch(self, split: str, drawn: list[tuple[int, list[Question]]], folded: bool) -> tuple[Batch, Tensor | None]:
        """The conversations, each after its scene, and the folded scenes float[B, CELLS, E] (None if written)."""
        scenes = [draw_scene(self.settings.seed + 3000, f"llm {split}", index) for index, _ in drawn]
        encoded = [self._encode(questions) for _, questions in drawn]
        if folded:
            cells = self.writer.fold(scenes, self.table)
            noise = self.settings.noise * self.table.detach().std()
            return build_batch(encoded, CELLS, restart_rounds=True), cells + noise * torch.randn_like(cells)
        for row, (index, _) in enumerate(drawn):
            written = self.writer.write(scenes[row], Dice(self.settings.seed, "llm written", split, index))
            encoded[row] = _put(encoded[row], written)
        return build_batch(encoded, CELLS, restart_rounds=True), None

    def predict(self, batch: Batch, cells: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Logits float[K, V], targets int64[K] and the turn of each token, int64[K], as 100 * row + round."""
        labels = batch.labels[:, 1:]
        supervised = labels != IGNORE
        hidden = self.vlm.hidden_states(batch, cells)[:, :-1][supervised]
        rows = torch.arange(len(labels))[:, None] * 100
        return self.vlm.logits(hidden), labels[supervised], (rows + batch.rounds[:, 1:])[supervised]

    def train(self) -> list[float]:
        """Trains the model; returns the unweighted loss of every step, in nats per token."""
        settings = self.settings
        groups = parameter_groups(nn.Module(), self.llm.model, lr=settings.lr, projector_lr=None, weight_decay=0.1)
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)
        schedule = get_cosine_schedule_with_warmup(optimizer, settings.steps * 3 // 100, settings.steps)
        dice = Dice(settings.seed, "llm forms")
        stream = self.conversations("train", settings.existence_steps * settings.batch_size)
        referring = self.referring()
        losses = []
        for step in range(1, settings.steps + 1):
            refers = 0 < step - settings.existence_steps <= settings.referring_steps
            drawn = [next(referring if refers else stream) for _ in range(settings.batch_size)]
            folded = refers or dice.chance(settings.folded_percent)
            batch, cells = self.batch("train", drawn, folded)
            logits, targets, turns = self.predict(batch, cells)
            losses_of_tokens = F.cross_entropy(logits, targets, reduction="none")
            _, turn, length = turns.unique(return_inverse=True, return_counts=True)
            weights = length[turn].float() ** -settings.turn_power
            if settings.first_number:
                first = self.first_numbers(targets, turns)
                weights = weights.where(~first, settings.first_number)
                if refers:
                    weights = weights.where(first, settings.other_numbers)
            loss = (losses_of_tokens * weights).sum() / weights.sum()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.llm.model.parameters(), 1.0)
            optimizer.step()
            if settings.curve_every and step % settings.curve_every == 0:
                self.curve[str(step)] = self.evaluate(folded=True, scenes=160)
            schedule.step()
            losses.append(losses_of_tokens.mean().item())
            if step in milestones(settings.steps):
                log.info("step %d: loss %.3f, %s", step, _recent(losses), self.evaluate(folded=True, scenes=80))
        return losses

    def first_numbers(self, targets: Tensor, turns: Tensor) -> Tensor:
        """bool[K]: True for the first box number of each turn, among the tokens of `predict`."""
        numbers = torch.tensor([self.writer.word(f"{edge / BINS:.2f}") for edge in range(BINS + 1)])
        places = torch.isin(targets, numbers).nonzero()[:, 0]
        owners = turns[places]
        first = torch.zeros_like(targets, dtype=torch.bool)
        first[places[owners != F.pad(owners, (1, 0), value=-1)[:-1]]] = True
        return first

    @torch.no_grad()
    def evaluate(self, folded: bool, scenes: int) -> dict[str, float]:
        """Teacher-forced accuracy by task, in per cent.

        An answer is correct if every token is the argmax. Boxes count the fraction of such tokens instead, and their
        first number is also evaluated by the number of objects in the scene.
        """
        stream = self.conversations("held out")
        right = defaultdict(list)
        for _ in range(0, scenes, 16):
            drawn = [next(stream) for _ in range(16)]
            logits, targets, turns = self.predict(*self.batch("held out", drawn, folded))
            hits = logits.argmax(-1) == targets
            first = self.first_numbers(targets, turns)
            for turn in turns.unique().tolist():
                question = drawn[turn // 100][1][turn % 100 - 1]
                own = hits[turns == turn].float()
                is_box = question.answer.startswith("[")
                if is_box:
                    scene = draw_scene(self.settings.seed + 3000, "llm held out", drawn[turn // 100][0])
                    right[f"first number, {len(scene.things)} things"].append(hits[first & (turns == turn)].item())
                right[question.task].append((own.mean() if is_box else own.min()).item())
        return {task: round(100 * sum(values) / len(values), 1) for task, values in sorted(right.items())}

    def _encode(self, questions: list[Question]) -> Encoded:
        messages = []
        for question in questions:
            messages.append({"role": "user", "content": question.prompt})
            messages.append({"role": "assistant", "content": question.answer})
        return self.llm.encode(messages, num_images=1)


def _put(encoded: Encoded, written: list[int]) -> Encoded:
    """The same conversation with a text in place of its image."""
    (slot,) = encoded.image_slots
    return Encoded(
        encoded.input_ids[:slot] + written + encoded.input_ids[slot:],
        encoded.labels[:slot] + [IGNORE] * len(written) + encoded.labels[slot:],
        encoded.rounds[:slot] + [0] * len(written) + encoded.rounds[slot:],
        [],
    )


def _recent(losses: list[float]) -> float:
    return sum(losses[-100:]) / len(losses[-100:])


def milestones(steps: int) -> list[int]:
    """About ten evenly spaced steps, including the last one."""
    return sorted({*range(max(steps // 10, 1), steps, max(steps // 10, 1)), steps})


def pretrain_llm(name: str, out_dir: Path, settings: Settings) -> dict[str, Any]:
    """Trains a language model and writes `<name>.safetensors` (float16) and `<name>.json` (the record).

    Returns:
        The record.
    """
    start = time.process_time()
    log.info("%s: %d steps of %d conversations", name, settings.steps, settings.batch_size)
    pretraining = TextPretraining(name, settings)
    losses = pretraining.train()
    out_dir.mkdir(parents=True, exist_ok=True)
    file = out_dir / f"{name}.safetensors"
    model = pretraining.llm.model
    # float16 halves the file size; the model is loaded as float32. A tied output layer is not stored twice.
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    weights = {key: value.half().contiguous() for key, value in model.state_dict().items() if key not in tied}
    save_file(weights, file, metadata={"format": "pt"})
    file.chmod(0o644)  # safetensors makes its files readable only by the owner
    record = {
        "name": name,
        "command": _command(name, settings),
        "settings": asdict(settings),
        "loss": {str(step): round(_recent(losses[:step]), 4) for step in milestones(settings.steps)},
        "curve_folded": pretraining.curve,
        "held_out_folded": pretraining.evaluate(folded=True, scenes=settings.held_out),
        "held_out_written": pretraining.evaluate(folded=False, scenes=settings.held_out),
        "cpu_seconds": round(time.process_time() - start),
        "versions": {package: version(package) for package in _PACKAGES},
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
    }
    (out_dir / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return record


def _command(name: str, settings: Settings) -> str:
    """The command that reproduces the model; options not on the command line come from `SETTINGS`."""
    shipped = asdict(replace(SETTINGS[name], seed=-1, steps=-1))  # so these two are always written out
    given = {key: value for key, value in asdict(settings).items() if value != shipped[key]}
    options = "".join(f" --{key.replace('_', '-')} {value}" for key, value in given.items())
    return f"python runs/reference/miniature/pretrain_llms.py {name} --out DIR{options}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the miniature language models that ship with the package.")
    parser.add_argument("names", nargs="*", help=f"{', '.join(SETTINGS)} (default: all)")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    for field in fields(Settings):
        option = f"--{field.name.replace('_', '-')}"
        parser.add_argument(option, type=type(field.default), help="see `Settings` (default: from `SETTINGS`)")
    args = vars(parser.parse_args())
    names, out = args.pop("names"), args.pop("out")
    unknown = set(names) - set(SETTINGS)
    if unknown:
        parser.error(f"unknown language models: {', '.join(sorted(unknown))}. Choices: {', '.join(SETTINGS)}.")
    configure_logging(debug=False)
    torch.set_num_threads(1)
    given = {key: value for key, value in args.items() if value is not None}
    for name in names or SETTINGS:
        pretrain_llm(name, out, replace(SETTINGS[name], **given))


if __name__ == "__main__":
    main()
