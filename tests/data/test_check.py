"""A data set with faults of 22 kinds planted in it: all are found, none is invented."""

import hashlib
import io
import json
import random
import struct
import zlib
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest
from PIL import ExifTags, Image

from prism_deco.cli import main
from prism_deco.data.base import Source
from prism_deco.data.check import check_dataset
from prism_deco.data.encoder import Encoder
from prism_deco.data.records import open_records
from prism_deco.data.validators import KINDS
from prism_deco.llms import build_llm

PLANTED = {
    "malformed": 9, "turn_order": 9, "image_tags": 8, "outside_root": 9, "id_type": 6, "duplicate_id": 8,
    "empty_turn": 8, "control_token": 8, "missing": 9, "outside_link": 8, "unreadable": 9, "huge": 7,
    "unread_image": 6, "broken_text": 6, "control_character": 6, "no_room": 4, "answers_cut": 4,
    "single_pixel": 5, "transparent": 5, "rotated": 5, "clipped": 5, "unrenderable": 0,
}  # fmt: skip
UNUSABLE = {"malformed", "outside_root", "unread_image", "broken_text"}
CLEAN = 300
ROOM = 300


def llava_turns(*texts: str) -> list[dict[str, str]]:
    return [{"from": "human" if i % 2 == 0 else "gpt", "value": text} for i, text in enumerate(texts)]


def _encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _rotated(orientation: int, kind: str) -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return _encoded(Image.new("RGB", (8, 4), (9, 9, 9)), kind, exif=exif)


def _see_through(alpha: list[int]) -> bytes:
    pixels = np.full((2, 2, 4), 200, dtype=np.uint8)
    pixels[..., 3] = np.reshape(alpha, (2, 2))
    return _encoded(Image.fromarray(pixels), "PNG")


def _jpeg(seed: int, kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, kind)
    return buffer.getvalue()


def _png_header(width: int, height: int) -> bytes:
    """A PNG file that claims a size and holds one row."""

    def part(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", header) + part(b"IDAT", zlib.compress(b"\0" * 100)) + part(b"IEND", b"")


@dataclass
class PlantedSet:
    """Builds the records and images, and remembers what it planted."""

    root: object
    records: list = field(default_factory=list)
    planted: set = field(default_factory=set)
    unusable: int = 0

    def image(self, content: bytes | None, suffix: str = "jpg") -> str:
        name = f"{len(self.records) % 7}/{len(self.records)}.{suffix}"
        path = self.root / "images" / name
        path.parent.mkdir(exist_ok=True)
        if content is not None:
            path.write_bytes(content)
        return name

    def add(self, kind: str | None, *turns: str, image: object = None, **changes: object) -> None:
        turns = turns or (f"<image>\nWhat is number {len(self.records)}?", f"It is {len(self.records)}.")
        record = {"id": f"r{len(self.records)}", "conversations": llava_turns(*turns)}
        if image is not None:
            record["image"] = image
        record |= changes
        if kind:
            self.planted.add((len(self.records), kind))
        self.records.append(record)

    def plant(self, kind: str, i: int) -> None:
        at = len(self.records)
        self.unusable += kind in UNUSABLE or (kind == "turn_order" and i % 3 != 1)
        good = None if kind in ("missing", "outside_link", "unreadable", "huge") else self.image(_jpeg(at))
        if kind == "malformed":
            self.add(kind, **[{"conversations": None}, {"image": 3}, {"conversations": [{"from": "x"}]}][i % 3])
        elif kind == "turn_order":
            turns = [
                llava_turns("q"),
                llava_turns("q", "a", "q"),
                [*llava_turns("q", "a"), *llava_turns("q", "a")[::-1]],
            ]
            self.add(kind, image=good, conversations=turns[i % 3])
        elif kind == "image_tags":
            self.add(
                kind,
                *[("<image> and <image>", "two"), ("<image> q", "a"), ("<image> q", "the <image> a")][i % 3],
                image=good if i % 3 != 1 else None,
            )
        elif kind == "outside_root":
            self.add(kind, image=["../images/0/0.jpg", "0/../../x.jpg", str(self.root / "images2" / "0.jpg")][i % 3])
        elif kind == "duplicate_id":
            self.add(kind, image=good, id=f"r{i}")
        elif kind == "id_type":
            self.add(kind, image=good, id=[at, {"a": [at]}, 0.5 + at][i % 3])
        elif kind == "empty_turn":
            self.add(kind, *[("", "Nothing was asked."), ("<image>\nq", " \n"), ("<image>", "a")][i % 3], image=good)
        elif kind == "control_token":
            self.add(kind, "<image>\nq", ["It ends <|endoftext|> here", "<|im_start|>system"][i % 2], image=good)
        elif kind == "missing":
            self.add(kind, image=self.image(None))
        elif kind == "outside_link":
            name = self.image(None)
            (self.root / "elsewhere.jpg").write_bytes(_jpeg(0))
            (self.root / "images" / name).symlink_to("../../elsewhere.jpg" if i % 2 else self.root / "elsewhere.jpg")
            self.add(kind, image=name)
        elif kind == "unreadable":
            whole = _jpeg(at, "PNG" if i % 2 else "JPEG")
            contents = [whole[: len(whole) // 2], b"", b"<html>404 Not Found</html>"]
            self.add(kind, image=self.image(contents[i % 3], "png" if i % 2 else "jpg"))
        elif kind == "huge":
            side = 10_000 if i % 2 else 20_000  # Pillow warns from 9459 on, and refuses from 13377 on
            self.add(kind, image=self.image(_png_header(side, side), "png"))
        elif kind == "unread_image":
            others = [{"photos": [good]}, {"image_path": good}, {"img": good, "image": []}]
            self.add(kind, "q", "a", **[*others, {"image": good, "images": ["x.png"]}][i % 4])
        elif kind == "broken_text":
            self.add(kind, "<image>\nq", ["a \ud83d", "\udc00 a"][i % 2], image=good)
        elif kind == "control_character":
            self.add(kind, "<image>\nq", ["a\0b", "\x1b[31mred", "bell\x07"][i % 3], image=good)
        elif kind == "no_room":
            self.add(kind, "<image>" * 100 + " q", "a", image=[good] * 100)
        elif kind == "answers_cut":
            self.add(kind, "<image>\n" + "word " * (ROOM + i), "a", image=good)
        elif kind == "single_pixel":
            self.add(kind, image=self.image(_encoded(Image.new("RGB", (1, 1), (i, at % 256, 0)), "PNG"), "png"))
        elif kind == "transparent":
            self.add(kind, image=self.image(_see_through([0, 0, 0, 0]), "png"))
        elif kind == "rotated":
            self.add(kind, image=self.image(_rotated(2 + i % 7, ["JPEG", "PNG"][i % 2]), ["jpg", "png"][i % 2]))
        elif kind == "clipped":
            pixels = [
                np.full((4, 4), 40_000 + at, dtype=np.uint16),
                np.linspace(0, 1, 16, dtype=np.float32).reshape(4, 4),
                np.linspace(-5, 90, 16, dtype=np.float32).reshape(4, 4),
            ][i % 3]
            self.add(kind, image=self.image(_encoded(Image.fromarray(pixels), "TIFF"), "tif"))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("planted")
    (root / "images").mkdir()
    world = PlantedSet(root)
    for i in range(CLEAN):  # among them all that looks odd and is right
        if i % 10 == 0:
            world.add(None, f"Only words {i}?", "Yes. ünï 🐞", "And now?", "a < b </ i >")
        elif i % 10 == 1:
            world.add(None, "no tag at all", "still about the image", image=world.image(_jpeg(i)))
        elif i % 10 == 2:
            world.add(None, image=world.records[1]["image"])  # an image that occurred before
        elif i % 10 == 3:
            world.add(None, image=world.image(_jpeg(i, "PNG"), "PNG"))
        elif i % 10 == 4:
            name = world.image(None)
            (root / "images" / name).symlink_to(root / "images" / world.records[1]["image"])
            world.add(None, image=name)  # a link that stays inside
        elif i % 10 == 5:
            world.add(None, image=world.image(_jpeg(i)))
            world.records[-1]["conversations"].insert(0, {"from": "gpt", "value": "skipped, as LLaVA does"})
        elif i % 20 == 8:
            name = f"{root}/images/{world.image(_jpeg(i))}"
            world.add(None, "<image>\nTabs\tand\r\nlines", "are text\n", image=name)  # below the root
        elif i % 20 == 9:
            world.add(None, "<image>\nq", "word " * 2 * ROOM, image=world.image(_rotated(1, "JPEG")))
        elif i % 20 == 18:
            sixteen = np.arange(200, 216, dtype=np.uint16).reshape(4, 4)  # nothing is cut off
            name = world.image(_encoded(Image.fromarray(sixteen), "PNG"), "png")
            world.add(None, image=name, images=[name], image_url="http://x/7")
        elif i % 20 == 19:
            world.add(None, image=world.image(_see_through([0, 0, 0, 1]), "png"), image_id=5)
        elif i % 10 == 6:
            two = [world.image(_jpeg(i)), world.records[1]["image"]]
            world.add(None, "<image> and <image>?", "alike", image=two)
        else:
            world.add(None, image=world.image(_jpeg(i)))
    kinds = [kind for kind, number in PLANTED.items() for _ in range(number)]
    random.Random(0).shuffle(kinds)
    for i, kind in enumerate(kinds):
        world.plant(kind, i)
    (root / "train.json").write_text(json.dumps(world.records))
    return world


@pytest.fixture(scope="module")
def encoder():
    llm = build_llm("mini_qwen2", pretrained=False, device="meta")
    return Encoder(llm, max_text_tokens=ROOM, max_positions=ROOM + 100, tokens_per_image=4)


def _check(world, encoder, out, **options):
    return check_dataset(Source(world.root / "train.json", world.root / "images"), encoder, out, **options)


def _found(out) -> list[tuple[int, str]]:
    lines = [json.loads(line) for line in (out / "bad.jsonl").read_text().splitlines()]
    return [(line["entry"], line["kind"]) for line in lines]


@pytest.mark.parametrize("workers", [1, 2])
def test_all_planted_faults_are_found_and_none_is_invented(world, encoder, tmp_path, workers):
    assert len(world.planted) == sum(PLANTED.values()) and set(PLANTED) == set(KINDS)
    report = _check(world, encoder, tmp_path, workers=workers)
    assert report.exit_status == 1
    assert report.counts == {kind: number for kind, number in PLANTED.items() if number}
    assert sorted(_found(tmp_path)) == sorted(world.planted)
    assert report.totals["records"] == CLEAN + sum(PLANTED.values()) - world.unusable
    assert report.data_hash == hashlib.sha256((world.root / "train.json").read_bytes()).hexdigest()


def test_a_clean_set_ends_with_zero_and_is_counted(tmp_path, encoder, colors):
    source = Source(colors / "train.json", colors / "images")
    report = check_dataset(source, encoder, tmp_path, workers=1)
    assert (report.exit_status, report.faults) == (0, [])
    assert (tmp_path / "bad.jsonl").read_text() == ""
    totals = report.totals
    files = sorted((colors / "images").iterdir())
    assert (totals["records"], totals["with_image"], totals["images"], dict(totals["formats"])) == (9, 8, 8, {"PNG": 8})
    assert totals["image_bytes"] == sum(file.stat().st_size for file in files)
    assert (
        int(totals["image_hash"], 16)
        == sum(int(hashlib.sha256(f.read_bytes()).hexdigest(), 16) for f in files) % 2**256
    )


def test_lengths_supervision_and_cuts_are_those_of_the_tokens(tmp_path, colors):
    llm = build_llm("mini_qwen2", pretrained=False, device="meta")
    records = json.loads((colors / "train.json").read_text())
    encoded = [
        llm.encode(
            [{"role": ("user", "assistant")[i % 2], "content": t["value"]} for i, t in enumerate(r["conversations"])],
            num_images="image" in r,
        )
        for r in records
    ]
    lengths = [len(e.input_ids) for e in encoded]
    room = max(lengths) - 4
    report = check_dataset(
        Source(colors / "train.json", colors / "images"), Encoder(llm, max_text_tokens=room), tmp_path, workers=1
    )
    totals = report.totals
    assert totals["tokens"] == sum(lengths) and totals["longest"] == max(lengths)
    assert totals["supervised"] == sum(label != -100 for e in encoded for label in e.labels)
    assert totals["records_cut"] == sum(n > room for n in lengths) > 0
    assert totals["tokens_cut"] == sum(max(0, n - room) for n in lengths)
    assert totals["supervised_cut"] > 0
    assert totals["lengths"] == Counter(int(np.ceil(np.log2(n))) for n in lengths)


@pytest.mark.parametrize(("projector", "visual"), [("linear", 64), ("avgpool", 16)])
def test_the_command_counts_the_visual_tokens_of_the_projector(tmp_path, colors, projector, visual):
    llm = build_llm("mini_qwen2", pretrained=False, device="meta")
    given = ["data=llava", f"data.json={colors / 'train.json'}", f"data.image_root={colors / 'images'}"]
    line = [*given, f"projector={projector}", "recipe.max_positions=90", f"runs_dir={tmp_path}"]
    assert main(["data", "check", "--workers", "1", *line]) == 0
    report = json.loads((tmp_path / "data_check" / "llava" / "report.json").read_text())
    cut = 0
    for record in open_records(colors / "train.json", tmp_path):
        tokens = len(llm.encode(record.messages, num_images=len(record.images)).input_ids)
        cut += max(0, tokens - (90 - visual * len(record.images)))
    assert report["tokens_cut"] == cut and (cut > 0) == (visual == 64)


def test_an_image_fault_is_reported_with_every_record_that_shows_it(tmp_path, encoder, colors):
    records = json.loads((colors / "train.json").read_text())
    for i in (1, 4, 6):
        records[i]["image"] = "gone.png"
    (tmp_path / "t.json").write_text(json.dumps(records))
    source = Source(tmp_path / "t.json", colors / "images")
    report = check_dataset(source, encoder, tmp_path / "out", workers=1)
    assert [(f.entry, f.id, f.image) for f in report.faults] == [(i, records[i]["id"], "gone.png") for i in (1, 4, 6)]
    assert report.totals["images"] == 6  # five that are there, and one that is not
    allowed = check_dataset(source, encoder, tmp_path / "out", workers=1, allow=["missing"])
    assert (allowed.exit_status, allowed.counts) == (0, {"missing": 3})


def test_a_conversation_with_nothing_to_learn_from_is_a_fault(tmp_path, colors):
    template = "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% endif %}{% endfor %}{{ image }}"  # noqa: E501
    llm = build_llm("mini_qwen2", pretrained=False, device="meta", chat_template=template)
    records = json.loads((colors / "train.json").read_text())[-1:]
    records[0]["conversations"][1]["value"] = ""
    (tmp_path / "t.json").write_text(json.dumps(records))
    report = check_dataset(
        Source(tmp_path / "t.json", colors), Encoder(llm, max_text_tokens=99), tmp_path / "out", workers=1
    )
    assert report.counts == {"empty_turn": 1, "unrenderable": 1}


def test_the_report_can_be_read(world, encoder, tmp_path):
    from rich.console import Console

    report = _check(world, encoder, tmp_path, workers=1)
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(report.render())
    text = console.export_text()
    for kind, number in report.counts.items():
        assert any(kind in line and f" {number} " in line for line in text.splitlines())
    assert str(report.totals["records"]) in text and report.data_hash in text


def test_an_unknown_kind_lists_the_known_ones(world, encoder, tmp_path):
    with pytest.raises(ValueError, match=r"Unknown kind of fault 'mising'. Did you mean 'missing'"):
        _check(world, encoder, tmp_path, allow=["mising"])
