"""The miniature's language models: the texts that they read, their training, and what is shipped."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from pretrain_llms import SETTINGS, Settings, TextPretraining, pretrain_llm
from safetensors.torch import load_file
from text_scenes import CELLS, Writer, phrases

from prism_deco.config import choices, load_choice
from prism_deco.llms import build_llm
from prism_deco.llms.hub import WEIGHTS
from prism_deco.miniature.rng import Dice
from prism_deco.miniature.scene import Plate, Scene, Thing, draw_scene

SHIPPED = [name for name in SETTINGS if (WEIGHTS / f"{name}.safetensors").is_file()]
ROOT = Path(__file__).parents[2]

# A circle over the four cells of the upper left corner but most of it in the first, and a plate in the lower right.
SCENE = Scene((Thing("red", "circle", 18, 4, 2, (0, 0, 0)),), Plate(47, 36, 44), 100, "none")


def test_phrases_are_words_and_edges():
    assert phrases(SCENE) == [
        ((4, 2, 22, 20), ["small", "red", "circle", "0.06", "0.03", "0.34", "0.31"]),
        ((36, 44, 64, 64), ["plate", "4", "7"]),
    ]


@pytest.mark.parametrize("name", SETTINGS)
def test_written_scenes_are_texts_of_the_scene(name):
    llm = build_llm(name, pretrained=False)
    writer = Writer(llm.tokenizer)
    seen = {llm.tokenizer.decode(writer.write(SCENE, Dice("test", number))).strip() for number in range(60)}
    assert "There is a small red circle at the top left and a plate at the bottom right that says 47." in seen
    # Twelve cells around the circle's and the plate's are empty, and so are two more: each has its mark.
    grids = {"".join(text.split()) for text in seen if "." in text.replace("0.", "")}
    assert ("smallredcircle,..............plate47,") in grids
    assert all("red" in text and "47" in text for text in seen)


@pytest.mark.parametrize("name", SETTINGS)
def test_folded_cells_by_a_slow_loop(name):
    llm = build_llm(name, pretrained=False)
    table = torch.randn(llm.embedding_rows, llm.embed_dim)
    folded = Writer(llm.tokenizer).fold([SCENE], table)
    assert folded.shape == (1, CELLS, llm.embed_dim)

    def vector(*words, first=0):
        total = torch.zeros(llm.embed_dim)
        for place, word in enumerate(words, start=first):
            text = word if word[0].isdigit() else f"a {word}"
            token = llm.tokenizer(text, add_special_tokens=False)["input_ids"][-1]
            for component in range(llm.embed_dim):
                total[component] += table[token, (component + 13 * place) % llm.embed_dim]
        return total

    circle = vector("small", "red", "circle", "0.06", "0.03", "0.34", "0.31")
    plate = vector("plate", "4", "7", first=7)
    # The circle covers 12 x 14 pixels of its first cell, 6 x 14 of the second (a third), 12 x 4 (a fifth at least is
    # 51 of 256: not this) and 6 x 4. The plate covers 12, 16 columns and 4 rows (48, 64) and 16 rows.
    expected = {0: circle, 1: circle, 11: plate, 14: plate, 15: plate}
    for cell in range(CELLS):
        torch.testing.assert_close(folded[0, cell], expected.get(cell, torch.zeros(llm.embed_dim)))


def test_training_never_renders(monkeypatch):
    """Its images are words: neither pixels nor a tower's features are computed."""
    from prism_deco.miniature import render

    def no_pixels(*_):
        raise AssertionError("rendered")

    monkeypatch.setattr(render, "render", no_pixels)
    pretraining = TextPretraining(
        "mini_qwen2", replace(Settings(), steps=3, existence_steps=1, referring_steps=1, batch_size=2)
    )
    assert all(parameter.is_meta for parameter in pretraining.vlm.backbone.parameters())
    assert len(pretraining.train()) == 3


def test_the_first_questions_are_about_existence():
    pretraining = TextPretraining("mini_qwen2", Settings())
    stream = pretraining.conversations("train", existence_first=20)
    drawn = [next(stream) for _ in range(30)]
    for index, questions in drawn:
        names = {question.template for question in questions}
        assert (names <= {"exists", "exists_confusable", "shape_exists"}) == (index < 20)


@pytest.mark.parametrize("name", SETTINGS)
def test_of_a_box_the_first_number_says_which_thing(name):
    pretraining = TextPretraining(name, Settings())
    stream = pretraining.referring()
    drawn = [next(stream) for _ in range(6)]
    with torch.no_grad():
        _, targets, turns = pretraining.predict(*pretraining.batch("train", drawn, folded=True))
    first = pretraining.first_numbers(targets, turns)
    asked = [question for _, questions in drawn for question in questions]
    assert {question.task for question in asked} == {"refcoco+"}
    found = [pretraining.llm.tokenizer.decode(token).strip() for token in targets[first].tolist()]
    assert found == [question.answer[1:5] for question in asked]


@pytest.mark.slow
def test_pretraining_writes_weights_and_record(tmp_path):
    settings = Settings(seed=3, steps=3, existence_steps=1, batch_size=2, held_out=16)
    record = pretrain_llm("mini_llama", tmp_path, settings)
    options = "--seed 3 --steps 3 --existence-steps 1 --batch-size 2 --held-out 16"
    assert record["command"] == f"python runs/reference/miniature/pretrain_llms.py mini_llama --out DIR {options}"
    assert record["settings"] == asdict(settings) and list(record["loss"]) == ["1", "2", "3"]
    file = tmp_path / "mini_llama.safetensors"
    assert {value.dtype for value in load_file(file).values()} == {torch.float16}
    assert json.loads((tmp_path / "mini_llama.json").read_text()) == record
    assert record["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    # The command of the record makes the same files again, in a process of its own.
    command = record["command"].replace("DIR", str(tmp_path / "again")).split()[1:]
    subprocess.run([sys.executable, *command], check=True, cwd=ROOT)
    again = json.loads((tmp_path / "again" / "mini_llama.json").read_text())
    assert again | {"cpu_seconds": record["cpu_seconds"]} == record
    assert build_llm("mini_llama", weights=str(file)).embed_dim == 128


def test_every_shipped_language_model_can_be_made_again():
    weights = {name: load_choice("llm", name).get("weights") for name in choices("llm")}
    assert set(SHIPPED) == {name for name, source in weights.items() if source == f"asset:{name}"}
    assert sum(file.stat().st_size for file in WEIGHTS.iterdir()) < 10_000_000


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_language_models_are_what_their_records_say(name):
    file = WEIGHTS / f"{name}.safetensors"
    record = json.loads((WEIGHTS / f"{name}.json").read_text())
    assert record["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert record["name"] == name and Settings(**record["settings"]) == SETTINGS[name]
    options = f"--seed 0 --steps {SETTINGS[name].steps}"
    assert record["command"] == f"python runs/reference/miniature/pretrain_llms.py {name} --out DIR {options}"
    stored = load_file(file)
    for key, value in build_llm(name).model.state_dict().items():
        if key in stored:
            assert torch.equal(value, stored[key].float())


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_language_models_read(name):
    """Whether a thing is in a written scene, on scenes that no training saw."""
    llm = build_llm(name)
    writer = Writer(llm.tokenizer)
    yes, no = (llm.tokenizer(word, add_special_tokens=False)["input_ids"][-1] for word in ("Yes", "No"))
    right = []
    for number in range(60):
        scene = draw_scene(77, "read", number)
        for asked in (scene.things[0].category, "cyan cross"):
            question = f"Is there a {asked} in the image?\nAnswer the question using a single word or phrase."
            encoded = llm.encode([{"role": "user", "content": question}], num_images=1, add_generation_prompt=True)
            (slot,) = encoded.image_slots
            ids = [*encoded.input_ids[:slot], *writer.write(scene, Dice(number)), *encoded.input_ids[slot:]]
            with torch.no_grad():
                logits = llm.model(input_ids=torch.tensor([ids])).logits[0, -1]
            there = any(thing.category == asked for thing in scene.things)
            right.append(bool(logits[yes] > logits[no]) == there)
    assert sum(right) / len(right) > 0.7  # by guessing 0.5, with a standard error of 0.05
