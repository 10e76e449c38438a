"""Published formats of conversations, and mixtures of them."""

import json
import pickle
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from prism_deco.cli import main
from prism_deco.config import load_config
from prism_deco.data import build_source
from prism_deco.data.encoder import Encoder, check_records
from prism_deco.data.formats import as_llava
from prism_deco.data.images import load_image
from prism_deco.data.records import open_parts, open_records, repeat
from prism_deco.llms import build_llm


def _human(*texts):
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (  # ShareGPT as LLaMA-Factory writes it
            {"messages": [{"role": "user", "content": "<image>Who?"}, {"role": "assistant", "content": "A cat."}],
             "images": ["1.png"]},
            {"image": ["1.png"], "conversations": _human("<image>Who?", "A cat.")},
        ),
        (
            {"conversations": _human("Hi", "Ho"), "images": ["1.png"], "image": None},
            {"image": ["1.png"], "conversations": _human("Hi", "Ho")},
        ),
        (  # TRL: the parts hold places, the record holds images
            {"messages": [
                {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "Who?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}],
             "images": ["1.png"]},
            {"image": ["1.png"], "conversations": _human("<image>\nWho?", "A cat.")},
        ),
        (  # Qwen-VL: the parts hold the images
            {"messages": [
                {"role": "user", "content": [
                    {"type": "image", "image": "1.png"}, {"type": "image", "image": "2.png"},
                    {"type": "text", "text": "Who?"}]},
                {"role": "assistant", "content": "Cats."}], "image": None},
            {"image": ["1.png", "2.png"], "conversations": _human("<image>\n<image>\nWho?", "Cats.")},
        ),
        (  # The Cauldron, FineVision
            {"images": ["1.png", "2.png"], "relevance_min": 4,
             "texts": [{"user": "Both?", "assistant": "Yes."}, {"user": "Sure?", "assistant": "No."}]},
            {"image": ["1.png", "2.png"], "relevance_min": 4,
             "conversations": _human("<image><image>\nBoth?", "Yes.", "Sure?", "No.")},
        ),
        (
            {"images": ["1.png"], "texts": [{"user": "One?", "assistant": "Yes."}]},
            {"image": ["1.png"], "conversations": _human("One?", "Yes.")},
        ),
        ({"id": "a"}, {"id": "a"}),
        ("no object", "no object"),
    ],
)  # fmt: skip
def test_an_entry_becomes_one_of_llava(raw, expected):
    before = json.dumps(raw)
    assert as_llava(raw) == expected
    assert json.dumps(raw) == before


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (
            {"messages": [{"role": "user", "content": [{"type": "video"}]}]},
            "part of type 'video': only text",
        ),
        ({"messages": [{"role": "user", "content": ["text"]}]}, "part of type None"),
        ({"messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "?"}]}, "must alternate"),
        ({"messages": [{"role": "system", "content": "Be kind."}]}, "must alternate"),
        (
            {"messages": [{"role": "user", "content": "?"}, {"role": "tool", "content": "!"}]},
            r"record 0: turn 2 is from 'tool': a turn must be .*; the first one may be from \"system\"",
        ),
        (
            {"messages": [{"role": "user", "content": "?"}, {"role": "system", "content": "Be kind."}]},
            "record 0: turn 2 is from 'system' and is not the first: move it, or leave it out",
        ),
        (
            {"messages": [{"role": "system", "content": "<image>"}, {"role": "user", "content": "?"}]},
            "record 0: turn 1 is from 'system' and holds <image>: move it",
        ),
        ({"messages": [{"role": "user", "content": "?", "image": "1.png"}]}, "key `image` of turn 1 is not read"),
        ({"messages": ["?"]}, "a turn must be"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "image": "1.png"}]}], "image": ["2.png"]},
            "images stand both in the record and in the parts",
        ),
        ({"texts": [{"user": "?", "assistant": "!", "image": "1.png"}]}, "key `image` of turn 1 is not read"),
        ({"texts": [{"user": "?"}]}, "a turn must be"),
        ({"texts": ["?"]}, "a turn must be"),
        ({"texts": [], "images": ["1.png", "2.png"]}, "must alternate"),
        ({"text": "?"}, "a list `conversations`, `messages` or `texts`"),
        ({"messages": None, "texts": {}}, "a list `conversations`, `messages` or `texts`"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, raw, message):
    (tmp_path / "a.jsonl").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=message):
        open_records(tmp_path / "a.jsonl", tmp_path)


SYSTEM = {
    "id": "s",
    "images": ["1.png"],
    "messages": [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "<image>What is it?"},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "Yes."},
    ],
}


@pytest.mark.parametrize("rounds", [2, 1])  # the last question without an answer
def test_a_leading_system_turn_is_shown_as_the_chat_format_shows_it(tmp_path, rounds):
    llm = build_llm("mini_qwen2", pretrained=False, device="meta")
    messages = SYSTEM["messages"] if rounds == 2 else SYSTEM["messages"][:-1]
    (tmp_path / "a.jsonl").write_text(json.dumps(SYSTEM | {"messages": messages}))
    records = open_records(tmp_path / "a.jsonl", tmp_path, allow_faults=True)
    record = records[0]
    assert record.messages == messages and record.answered == messages[: 1 + 2 * rounds]
    encoder = Encoder(llm, max_text_tokens=300)
    check_records(records, encoder)
    encoded, _ = encoder(record)
    first = "<|im_start|>system\nBe kind.<|im_end|><|im_start|>user\nWhat is it?<|im_end|><|im_start|>assistant\n"
    second = "<|im_start|>user\nSure?<|im_end|><|im_start|>assistant\n"
    texts = {1: (first, "A cat.<|im_end|>"), 2: (second, "Yes.<|im_end|>")}
    bos = llm.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    expected = [(bos, -100, 0)]
    for number in range(1, 1 + rounds):
        for text, supervised in zip(texts[number], (False, True), strict=True):
            ids = llm.tokenizer(text, add_special_tokens=False)["input_ids"]
            expected += [(id, id if supervised else -100, number) for id in ids]
    assert [*zip(encoded.input_ids, encoded.labels, encoded.rounds, strict=True)] == expected
    assert encoded.image_slots == [1]


def test_a_chat_format_without_system_turns_refuses_them_before_training(tmp_path):
    plain = {"messages": SYSTEM["messages"][1:3]}
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, [plain, SYSTEM])))
    records = open_records(tmp_path / "a.jsonl", tmp_path, allow_faults=True)
    llm = build_llm("mini_phi", pretrained=False, device="meta")
    with pytest.raises(ValueError, match=r"Record s: .* this format has no system message.*data.on_bad_record=skip"):
        check_records(records, Encoder(llm, max_text_tokens=300))


def test_where_all_records_have_system_turns_leaving_them_out_is_no_hint(tmp_path, capsys):
    _image(tmp_path / "1.png", 1)
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(SYSTEM | {"id": f"{i}"}) for i in range(4)))
    settings = ["data=llava", f"data.json={tmp_path / 'a.jsonl'}", f"data.image_root={tmp_path}", "llm=mini_phi"]
    settings += ["data.on_bad_record=skip", "backbone.pretrained=false", "evaluate.benchmarks=null"]
    assert main(["train", "--check", *settings, f"runs_dir={tmp_path}"]) != 0
    assert "this format has no system message" in capsys.readouterr().err


def test_records_with_system_turns_are_trained_and_validated_on(tmp_path):
    entries = []
    for i in range(8):
        _image(tmp_path / "images" / f"{i}.png", i)
        entries.append(SYSTEM | {"id": f"{i}", "images": [f"{i}.png"]})
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, entries)))
    settings = [
        "data=llava", f"data.json={tmp_path / 'a.jsonl'}", f"data.image_root={tmp_path / 'images'}",
        f"data.val_json={tmp_path / 'a.jsonl'}", "data.num_workers=0", "recipe.max_steps=2",
        "recipe.global_batch_size=2", "recipe.micro_batch_size=2", "backbone.pretrained=false", "trainer.threads=1",
        "evaluate.benchmarks=null", f"runs_dir={tmp_path}", "run_id=a",
    ]  # fmt: skip
    assert main(["train", *settings]) == 0
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    assert (manifest["samples"], manifest["bad_records"]) == (4, 0)
    # The question that the model is asked as a sample.
    [events] = (tmp_path / "a").rglob("*tfevents*")
    assert b"What is it?" in events.read_bytes() and b"Be kind." not in events.read_bytes()


def _image(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), (value, 0, 0)).save(path)


def _texts(path, count):
    """FineVision's columns, as `datasets` writes them."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    rows = []
    for i in range(count):
        _image(path.parent / "png" / f"{i}.png", i)
        data = (path.parent / "png" / f"{i}.png").read_bytes()
        rows.append({
            "images": [{"bytes": data, "path": None}],
            "texts": [{"user": f"What is {i}?", "assistant": "This."}, {"user": "Sure?", "assistant": "Yes."}],
            "source": "x", "relevance_ratings": [5, 4],
        })  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), path)


def _messages(folder, count):
    """LLaMA-Factory's."""
    entries = []
    for i in range(count):
        _image(folder / "images" / f"{i}.png", 100 + i)
        turns = [{"role": "user", "content": f"<image>Which is {i}?"}, {"role": "assistant", "content": "That."}]
        entries.append({"messages": turns, "images": [f"{i}.png"]})
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, entries)))


@pytest.fixture
def sets(tmp_path):
    _texts(tmp_path / "fine.parquet", 6)
    _messages(tmp_path, 9)
    llava = {"data": "llava", "json": str(tmp_path / "a.jsonl"), "image_root": str(tmp_path / "images")}
    return {"fine": {"data": "embedded", "path": str(tmp_path / "fine.parquet")}, "chat": llava}


def test_parquet_with_texts_is_read(sets, tmp_path):
    source = build_source("embedded", path=sets["fine"]["path"])
    records = open_records(source.train, tmp_path)
    assert [m["content"] for m in records[4].messages] == ["What is 4?", "This.", "Sure?", "Yes."]
    assert load_image(source.images(records), records[4].images[0]).getpixel((0, 0)) == (4, 0, 0)


def test_a_mixture_shows_each_set_as_often_as_its_weight_says(sets, tmp_path):
    mixture = {"fine": sets["fine"] | {"weight": 2}, "chat": sets["chat"] | {"weight": 1 / 3}}
    source = build_source("mixture", mixture=mixture)
    train = open_parts(source, tmp_path, val_fraction=0.0, limit=None).train
    firsts = Counter(record.messages[0]["content"] for record in train)
    assert {f"What is {i}?": 2 for i in range(6)} == {k: n for k, n in firsts.items() if k.startswith("What")}
    thirds = [k for k in firsts if k.startswith("<image>Which")]
    assert len(thirds) == 3 and firsts.total() == 15
    images = source.images(train)
    for record in train:
        number = int(record.messages[0]["content"].rstrip("?").split()[-1])
        [name] = record.images
        expected = number if record.messages[0]["content"].startswith("What") else 100 + number
        assert images.contains(name) and load_image(images, name).getpixel((0, 0)) == (expected, 0, 0)
    assert images.missing([train[0].images[0], "1/none.png"]) == ["1/none.png"]
    assert "none.png" in images.location("1/none.png")
    assert train.words.tolist() == [sum(len(m["content"].split()) for m in r.messages) for r in train]
    # Which third it is never changes; another weight is other data.
    again = open_parts(source, tmp_path, val_fraction=0.0, limit=None).train
    other = open_parts(build_source("mixture", mixture=sets), tmp_path, val_fraction=0.0, limit=None).train
    assert list(again) == list(train) and again.data_hash == train.data_hash != other.data_hash


def test_each_set_of_a_mixture_is_cut_and_held_out_by_itself(sets, tmp_path):
    source = build_source("mixture", mixture=sets)
    parts = open_parts(source, tmp_path, val_fraction=0.4, limit=2)
    assert len(parts.train) == 4 and len(parts.val) > 0
    assert not {r.images for r in parts.train} & {r.images for r in parts.val}
    images = source.images(parts.val)
    assert not images.missing(name for record in parts.val for name in record.images)


def test_a_mixture_of_one_set_reads_its_own_images(tmp_path):
    """An image in a folder with a number for its name is no image of a set with that number."""
    _image(tmp_path / "images" / "0" / "0.png", 7)
    _image(tmp_path / "images" / "0.png", 9)
    turns = [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "That."}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": turns, "images": ["0/0.png"]}))
    _texts(tmp_path / "fine.parquet", 3)
    llava = {"data": "llava", "json": str(tmp_path / "a.jsonl"), "image_root": str(tmp_path / "images")}
    fine = {"data": "embedded", "path": str(tmp_path / "fine.parquet")}
    for own, values in ((llava, [7]), (fine, [0, 1, 2])):
        source = build_source("mixture", mixture={"a": own})
        train = open_parts(source, tmp_path, val_fraction=0.0, limit=None).train
        for records in (train, train.select(slice(None)), pickle.loads(pickle.dumps(train))):
            names = [record.images[0] for record in records]
            assert [load_image(source.images(records), name).getpixel((0, 0))[0] for name in names] == values
        twice = build_source("mixture", mixture={"a": own | {"weight": 2}})
        assert open_parts(twice, tmp_path, val_fraction=0.0, limit=None).train.data_hash != train.data_hash


def test_a_weight_that_takes_no_record_is_refused(sets, tmp_path):
    for small in ("fine", "chat"):
        mixture = {name: own | {"weight": 0.01 if name == small else 1.0} for name, own in sets.items()}
        source = build_source("mixture", mixture=mixture)
        with pytest.raises(ValueError, match=r"nothing to train on: weight 0.01 takes none of the [69] records of .*/"):
            open_parts(source, tmp_path, val_fraction=0.0, limit=None)


def test_weights_repeat_rows_and_draw_the_rest_once():
    rows = np.arange(10, 110)
    assert repeat(rows, 2).tolist() == [*rows, *rows]
    drawn = repeat(rows, 1.25)
    assert len(drawn) == 125 and len(set(drawn[100:])) == 25 and set(drawn[100:]) < set(rows)
    assert (np.diff(drawn[100:]) > 0).all() and np.diff(drawn[100:]).max() > 1


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        (None, "data=mixture needs data.mixture="),
        ([{"data": "llava"}], "data=mixture needs data.mixture="),
        ({"a": "llava"}, "data.mixture.a.data=None: name the choice"),
        ({"a": {"data": "mixture"}}, "data.mixture.a.data=mixture: name the choice"),
        ({"a": {"data": "lava"}}, "lava"),
        ({"a": {"data": "llava", "weight": 0}}, "data.mixture.a.weight=0: expected a number above 0"),
        ({"a": {"data": "llava", "weight": 1e12}}, "data.mixture.a.weight=1.*: expected .* at most 1000"),
        ({"a": {"data": "llava", "weight": 10**400}}, "data.mixture.a.weight=1.*: expected .* at most 1000"),
        ({"a": {"data": "embedded", "path": 5}}, "data.mixture.a: data.path=5: there is no"),
        ({"a": {"data": "embedded", "path": ["x"]}}, r'data.path=\["x"\] must be text or null \(data.mixture.a\)'),
        ({"a": {"data": "llava", "json": [1]}}, r"data.json=\[1\] must be text or null \(data.mixture.a\)"),
        ({"a": {"data": "shapes", "train_images": "x"}}, "data.train_images=x must be .* number.*data.mixture.a"),
        ({"a": {"data": "llava", 5: "x"}}, "Unknown key of data=llava in data.mixture.a '5'"),
        ({"a": {"data": "llava", "jsn": "x"}}, "Unknown key of data=llava in data.mixture.a 'jsn'.*json"),
        (
            {"a": {"data": "llava", "json": "no.json", "image_root": "."}},
            "data.mixture.a: data.json=no.json: there",
        ),
    ],
)
def test_a_wrong_mixture_is_refused(mixture, message):
    with pytest.raises(ValueError, match=message):
        build_source("mixture", mixture=mixture)


def test_a_mixture_can_be_written_on_the_command_line(sets):
    text = json.dumps(sets["chat"] | {"weight": 0.5}).replace('"', "")
    config = load_config(["data=mixture", f"data.mixture={{chat: {text}}}"])
    assert config.data.mixture.chat.weight == 0.5


def test_a_mixture_of_two_published_formats_is_trained_on(sets, tmp_path):
    mixture = {"fine": sets["fine"] | {"weight": 2.0}, "chat": sets["chat"] | {"weight": 0.5}}
    text = json.dumps(mixture).replace('"', "")
    settings = [
        "data=mixture", f"data.mixture={text}", "data.val_fraction=0.2", "data.num_workers=1", "recipe.max_steps=3",
        "recipe.global_batch_size=4", "recipe.micro_batch_size=2", "backbone.pretrained=false", "trainer.threads=1",
        "evaluate.benchmarks=null", f"runs_dir={tmp_path}",
    ]  # fmt: skip
    assert main(["train", *settings, "run_id=first"]) == 0
    # A run's own configuration repeats it.
    assert main(["train", str(tmp_path / "first" / "config.yaml"), "run_id=again"]) == 0
    first, again = (json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("first", "again"))
    assert first["samples"] == 12 and first["bad_images"] == 0
    assert {key: first[key] for key in ("model_sha256", "data_hash")} == {
        key: again[key] for key in ("model_sha256", "data_hash")
    }
