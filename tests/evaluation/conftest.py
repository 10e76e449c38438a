"""Small benchmarks in the official formats, and a fake model with scripted answers."""

import base64
import csv
import json
import pickle
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image


class Root:
    """Writes small benchmarks into a folder; the method of a family returns the benchmark's configuration."""

    def __init__(self, path: Path):
        self.path = path

    def image(self, name: str, size: tuple[int, int] = (8, 8)) -> str:
        file = self.path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (len(name), 0, 0)).save(file)
        return name

    def json(self, name: str, content: object) -> str:
        file = self.path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content))
        return name

    def common(self, name: str, **keys: object) -> dict:
        return {"name": name, "root": str(self.path)} | keys

    def pope(self, **keys: object) -> dict:
        for subset in ("random", "popular"):
            records = [
                {
                    "question_id": k,
                    "image": Path(self.image(f"images/{k % 2}.png")).name,
                    "text": f"Is there a thing {k} in the image?",
                    "label": "yes" if k < 2 else "no",
                }
                for k in range(4)
            ]
            lines = "\n".join(map(json.dumps, records))
            (self.path / f"coco_pope_{subset}.json").write_text(lines + "\n")
        return (
            self.common(
                "tiny_pope",
                family="pope",
                annotations="coco_pope_{subset}.json",
                image="images/{image}",
                subsets=["random", "popular"],
                variants=["likelihood", "generate"],
            )
            | keys
        )

    def refcoco(self, size: tuple[int, int] = (100, 50), **keys: object) -> dict:
        self.image("images/7.png", size)
        refs = [
            {
                "ref_id": k,
                "ann_id": k,
                "category_id": 1,
                "image_id": 7,
                "split": split,
                "sent_ids": [2 * k, 2 * k + 1],
                "sentences": [
                    {"sent": f"thing {k} {w}", "sent_id": 2 * k + w, "tokens": [], "raw": ""} for w in range(2)
                ],
            }
            for k, split in enumerate(["val", "val", "train"])
        ]
        with (self.path / "refs(unc).p").open("wb") as file:
            pickle.dump(refs, file, protocol=2)
        self.json(
            "instances.json",
            {
                "images": [{"id": 7, "width": size[0], "height": size[1], "file_name": "7.png"}],
                "annotations": [
                    {"id": k, "image_id": 7, "category_id": 1, "bbox": [10 * k, 0, 50, 50]} for k in range(3)
                ],
                "categories": [{"id": 1, "name": "thing"}],
            },
        )
        return (
            self.common(
                "tiny_refcoco",
                family="refcoco",
                annotations="refs(unc).p",
                instances="instances.json",
                image="images/{file_name}",
                split="val",
                variants=["quoted"],
            )
            | keys
        )

    def vqav2(self, **keys: object) -> dict:
        self.json(
            "questions.json",
            {
                "questions": [
                    {"question_id": k, "image_id": k, "question": f"How many in {self.image(f'images/{k:03d}.png')}?"}
                    for k in range(3)
                ]
            },
        )
        self.json(
            "annotations.json",
            {
                "annotations": [
                    {
                        "question_id": k,
                        "image_id": k,
                        "question_type": "how many",
                        "answer_type": "number" if k < 2 else "other",
                        "multiple_choice_answer": str(k),
                        "answers": [
                            {"answer": str(k), "answer_confidence": "yes", "answer_id": a} for a in range(1, 11)
                        ],
                    }
                    for k in range(3)
                ]
            },
        )
        return (
            self.common(
                "tiny_vqav2",
                family="vqav2",
                questions="questions.json",
                annotations="annotations.json",
                image="images/{image_id:03d}.png",
                variants=["short"],
            )
            | keys
        )

    def vizwiz(self, **keys: object) -> dict:
        answers = [["unanswerable"] * 10, ["red"] * 4 + ["dark red"] * 6]
        self.json(
            "val.json",
            [
                {
                    "image": Path(self.image(f"val/{k}.png")).name,
                    "question": f"What is this {k}?",
                    "answers": [{"answer": answer, "answer_confidence": "yes"} for answer in texts],
                    "answer_type": "other",
                    "answerable": k,
                }
                for k, texts in enumerate(answers)
            ],
        )
        return (
            self.common("tiny_vizwiz", family="vizwiz", annotations="val.json", image="val/{image}", variants=["short"])
            | keys
        )

    def textvqa(self, **keys: object) -> dict:
        self.json(
            "text.json",
            {
                "data": [
                    {
                        "question_id": k,
                        "image_id": f"im{k}",
                        "question": f"what does {self.image(f'images/im{k}.png')} say?",
                        "answers": [f"word{k}"] * 10,
                    }
                    for k in range(2)
                ]
            },
        )
        self.json("ocr.json", {"data": [{"image_id": f"im{k}", "ocr_tokens": ["A", f"word{k}"]} for k in range(2)]})
        return (
            self.common(
                "tiny_textvqa",
                family="textvqa",
                annotations="text.json",
                ocr="ocr.json",
                image="images/{image_id}.png",
                variants=["ocr", "plain"],
            )
            | keys
        )

    def gqa(self, **keys: object) -> dict:
        self.json(
            "gqa.json",
            {
                f"20{k}": {
                    "imageId": Path(self.image(f"images/n{k}.png")).stem,
                    "question": f"Is it left {k}?",
                    "answer": answer,
                    "types": {"structural": "verify"},
                }
                for k, answer in enumerate(["yes", "yes", "t-shirt"])
            },
        )
        return (
            self.common(
                "tiny_gqa", family="gqa", annotations="gqa.json", image="images/{imageId}.png", variants=["short"]
            )
            | keys
        )

    def questions(self, **keys: object) -> dict:
        records = [
            {"question": "What is this?", "image": self.image("images/q0.png"), "answer": "A cat"},
            {
                "question": "Which differ?",
                "image": [self.image("images/q1.png"), "images/q0.png"],
                "answer": ["2", "two"],
            },
            {"question": "What is 1 + 1?", "image": None, "answer": 2, "question_id": "sum"},
        ]
        (self.path / "questions.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n")
        return self.common("tiny_questions", family="questions", annotations="questions.jsonl", image="{image}",
                           variants=["short"]) | keys  # fmt: skip

    def mme(self, **keys: object) -> dict:
        for name in ("count/a", "count/b"):
            self.image(f"mme/{name}.png")
            (self.path / f"mme/{name}.txt").write_text(
                "Is there one? Please answer yes or no.\tYes\nAre there two? Please answer yes or no.\tNo\n"
            )
        self.image("mme/scene/images/c.jpg")
        texts = self.path / "mme/scene/questions_answers_YN"
        texts.mkdir()
        (texts / "c.txt").write_text("Is it a bar?  Please answer yes or no.\tYes\nIs it a zoo?\tNo\n")
        return (
            self.common(
                "tiny_mme",
                family="mme",
                annotations="mme/{task}",
                image="mme/{task}/{name}",
                tasks=["count", "scene"],
                variants=["short"],
            )
            | keys
        )

    def seed(self, **keys: object) -> dict:
        self.json(
            "seed.json",
            {
                "question_type": {"Instance Location": 4, "Spatial Relation": 6, "Action Recognition": 10},
                "questions": [
                    {
                        "question_id": str(k),
                        "question": f"Where is it {k}?",
                        "choice_a": "left",
                        "choice_b": "right",
                        "choice_c": 3,
                        "choice_d": "below",
                        "answer": answer,
                        "data_id": Path(self.image(f"images/s{k}.png")).name if kind != 10 else "v.mp4",
                        "data_type": "image" if kind != 10 else "video",
                        "question_type_id": kind,
                        "data_source": "x",
                    }
                    for k, (answer, kind) in enumerate([("A", 4), ("B", 6), ("B", 6), ("D", 10)])
                ],
            },
        )
        return (
            self.common(
                "tiny_seed", family="seed", annotations="seed.json", image="images/{data_id}", variants=["letter"]
            )
            | keys
        )

    def mmbench(self, **keys: object) -> dict:
        image = base64.b64encode((self.path / self.image("x.jpg")).read_bytes()).decode()
        rows = []
        for number, (category, hint) in enumerate([("spatial_relationship", ""), ("ocr", "Think.")], start=5):
            for rotation, (first, second, answer) in enumerate([("cat", "dog", "A"), ("dog", "cat", "B")]):
                index = number + 1_000_000 * rotation
                rows.append([index, "Which?", hint, first, second, "", "", answer, category, image])
        with (self.path / "mmb.tsv").open("w", newline="") as file:
            writer = csv.writer(file, delimiter="\t")
            writer.writerow(["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image"])
            writer.writerows(rows)
        return self.common("tiny_mmbench", family="mmbench", annotations="mmb.tsv", variants=["letter"]) | keys


class FakeModel:
    """Answers with a function of image path and prompt; the visual tokens carry the image's index.

    Counts how often each image is encoded, and raises KeyboardInterrupt at the `dies_at`-th call with questions.
    """

    def __init__(self, answer=lambda path, prompt: "yes", dies_at: int | None = None):
        self.answer = answer
        self.dies_at = dies_at
        self.paths: list[Path] = []
        self.encoded: Counter[str] = Counter()
        self.calls: list[list[str]] = []

    def encode_images(self, images):
        tokens = []
        for path in images:
            with Image.open(path) as image:
                image.load()
            self.encoded[path.name] += 1
            self.paths.append(path)
            tokens.append(torch.full((2, 3), float(len(self.paths) - 1)))
        return tokens

    def _ask(self, images, prompts):
        self.calls.append(list(prompts))
        if self.dies_at is not None and len(self.calls) >= self.dies_at:
            raise KeyboardInterrupt
        return [self.answer(self._seen(i), p) for i, p in zip(images, prompts, strict=True)]

    def _seen(self, image):
        """The path of a question's image, or a list of paths if it has several or none."""
        if isinstance(image, list):
            return [self.paths[int(tokens[0, 0])] for tokens in image]
        return self.paths[int(image[0, 0])]

    def generate(self, images, prompts, max_new_tokens):
        return self._ask(images, prompts)

    def choice_probabilities(self, images, prompts, choices):
        answers = self._ask(images, prompts)
        rows = [[0.75 if a.lower() == choice.lower() else 0.25 for choice in choices] for a in answers]
        return torch.tensor(rows)


@pytest.fixture
def files(tmp_path: Path) -> Root:
    root = tmp_path / "root"
    root.mkdir()
    return Root(root)


@pytest.fixture
def fake_model() -> type[FakeModel]:
    return FakeModel
