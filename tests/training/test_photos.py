"""Real photographs from disk: the README's example learns its conversations by heart and answers them back."""

import json
import re
import shlex
from pathlib import Path

import pytest

import prism_deco
from prism_deco.cli import main

ROOT = Path(__file__).parents[2]
skimage = pytest.importorskip("skimage")


@pytest.mark.slow
def test_the_photographs_are_learned_by_heart(tmp_path, monkeypatch):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    command = next(line for line in readme.splitlines() if line.endswith("run_id=photos"))
    photos = Path(skimage.__path__[0]) / "data"
    command = re.sub(r'"\$\(.*\)/data"', str(photos), command)  # what the shell would put in
    monkeypatch.chdir(ROOT)
    assert main([*shlex.split(command)[1:], f"runs_dir={tmp_path}", "trainer.threads=1"]) == 0
    model = prism_deco.load(tmp_path / "photos")
    records = json.loads((ROOT / "tests" / "assets" / "photos.json").read_text())
    images, questions, answers = [], [], []
    for record in records:
        turns = [turn["value"].replace("<image>", "").strip() for turn in record["conversations"]]
        for question, answer in zip(turns[::2], turns[1::2], strict=True):
            images.append(photos / record["image"] if "image" in record else None)
            questions.append(question)
            answers.append(answer)
    assert model.generate(images, questions, max_new_tokens=40) == answers
