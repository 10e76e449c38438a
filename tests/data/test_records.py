import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from prism_deco.data import llava_json as entries
from prism_deco.data.images import ImageFolder, open_image, resolve_image
from prism_deco.data.records import hold_out, open_records


def _turns(*values):
    return [{"from": "human" if i % 2 == 0 else "gpt", "value": value} for i, value in enumerate(values)]


def _write(path, entries):
    path.write_text(json.dumps(entries), encoding="utf-8")
    return path


def test_records_come_back_as_written(tmp_path):
    entries = [
        {"id": "a", "image": "x/1.png", "conversations": _turns("<image>\nWhat is it?", "Ein Käfer 🐞")},
        {"id": 7, "conversations": _turns("Hi", "Hello", "Bye", "See you")},
        {
            "id": "c",
            "image": "1.png",
            "conversations": [{"from": "gpt", "value": "skipped"}, *_turns("q <image>", "a")],
        },
        {"id": "d", "image": ["1.png", "2.png"], "conversations": _turns("<image> or <image>?", "both")},
    ]
    records = open_records(_write(tmp_path / "train.json", entries), tmp_path / "cache")
    assert len(records) == 4
    assert records[0].images == ("x/1.png",)
    assert records[0].messages[1] == {"role": "assistant", "content": "Ein Käfer 🐞"}
    assert (records[1].id, records[1].images, len(records[1].messages)) == ("7", (), 4)
    assert [m["content"] for m in records[2].messages] == ["q <image>", "a"]
    assert records[3].images == ("1.png", "2.png")
    assert records.words.tolist() == [4 + 3, 1 + 1 + 1 + 2, 2 + 1, 3 + 1]
    assert records.has_image.tolist() == [True, False, True, True]
    assert [r.id for r in pickle.loads(pickle.dumps(records))] == ["a", "7", "c", "d"]


def test_the_index_is_built_once_and_follows_the_content(tmp_path):
    path = _write(tmp_path / "train.json", [{"id": "a", "conversations": _turns("q", "a")}])
    hash_before = open_records(path, tmp_path).data_hash
    stamp = next((tmp_path / "index").rglob("index.json")).stat().st_mtime_ns
    open_records(path, tmp_path)
    assert next((tmp_path / "index").rglob("index.json")).stat().st_mtime_ns == stamp
    _write(path, [{"id": "b", "conversations": _turns("q", "a")}])
    again = open_records(path, tmp_path)
    assert again[0].id == "b" and again.data_hash != hash_before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[{", "not valid JSON.*download complete"),
        ('[{"id": "a"} {"id": "b"}]', "not valid JSON.*Expecting ',' delimiter"),
        ('[{"id": "a"},]', "not valid JSON"),
        ('[{"id": "a"}] []', "not valid JSON.*Extra data"),
        ('[{"id": "\xff"}]'.encode("latin-1"), "not valid JSON.*can't decode"),
        ("", "non-empty JSON list"),
        ("[]", "non-empty JSON list"),
        (" \n[ \n]", "non-empty JSON list"),
        ("{}", r"record 0: expected an object with a list `conversations`"),
        ('{\n "id": "a"\n}', r"bad.json: the object of line 1 has several lines. Write a list"),
        ('{"id": "a"}\n{"id":\n"b"}', "the object of line 2 has several lines"),
        ('{"id": "a",, \n', "not valid JSON.*line 1, column 12"),
        ('{"id": "a"}\n\n{"id": ', "not valid JSON.*line 3, column 8.*download complete"),
        ("not JSON at all", "not valid JSON"),
        ("[" * 100_000, "not valid JSON.*recursion"),
        (f'[{{"id": {"7" * 5000}}}]', "not valid JSON.*digits"),
        ('[{"id": "a"}]', r"record 0 \(id a\): expected an object with a list `conversations`"),
        ('[{"id": "a", "conversations": [{"from": "user", "value": "x"}]}]', r"turn 1 is from 'user': a turn must be"),
        (
            '[{"id": "a", "conversations": [{"from": "human", "value": "x"}]}]',
            "must alternate, and at least one question be answered",
        ),
        ('[{"id": "a", "conversations": []}]', "must alternate"),
        ('[{"id": "a", "image": 3, "conversations": []}]', "`image` must be a path"),
    ],
)
def test_a_malformed_file_names_the_record(tmp_path, content, message):
    path = tmp_path / "bad.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    for _ in range(2):  # an index that exists already is no excuse
        with pytest.raises(ValueError, match=message) as error:
            open_records(path, tmp_path / "cache")
        assert str(path) in str(error.value)


def test_faulty_records_can_be_left_out_by_name(tmp_path):
    good = {"id": "a", "image": "1.png", "conversations": _turns("q", "a")}
    raw = [good, 3, good | {"id": "b"}, good | {"image": "../1.png"}, good | {"id": "c", "image": None}]
    path = _write(tmp_path / "t.json", raw)
    with pytest.raises(ValueError, match="record 1: expected an object.*1 more records are refused.*data check"):
        open_records(path, tmp_path)
    records = open_records(path, tmp_path, allow_faults=True)
    assert [(r.id, r.images) for r in records] == [("a", ("1.png",)), ("b", ("1.png",)), ("c", ())]
    assert records.column("entry").tolist() == [0, 2, 4]
    assert [(f["entry"], f["kind"], f["id"]) for f in records.refused("refuse")] == [
        (1, "malformed", "record 1"),
        (3, "outside_root", "a"),
    ]


@pytest.mark.parametrize("chunk", [1, 7, 64, 10_000])
def test_the_list_is_read_in_pieces_of_any_size(tmp_path, monkeypatch, chunk):
    values = [{"a": ']},[{\\" ü🐞'}, 12345, "x" * 300, [], [1, [2, {}]], None, -1.5e3, {"b": {"c": [True]}}]
    for indent in (None, 1):
        path = tmp_path / "list.json"
        path.write_text(json.dumps(values, indent=indent, ensure_ascii=bool(indent)) + "\n", encoding="utf-8")
        monkeypatch.setattr(entries, "_CHUNK", chunk)
        assert list(entries.read_entries(path)) == values


def test_json_lines_are_read(tmp_path):
    entries = [{"id": str(i), "image": f"{i}.png", "conversations": _turns(f"q\u2028{i}", "ü🐞")} for i in range(5)]
    listed = open_records(_write(tmp_path / "list.json", entries), tmp_path)
    for name, start, end in (("a", "", "\n"), ("b", "\ufeff", "\r\n"), ("c", " \n", "\n\n")):
        path = tmp_path / f"{name}.jsonl"
        text = start + end.join(json.dumps(entry, ensure_ascii=name == "a") for entry in entries)
        path.write_text(text, encoding="utf-8", newline="")
        assert list(open_records(path, tmp_path)) == list(listed)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("image_path", "1.png"), ("Image_Path", "1.png"), ("imagePaths", ["1.png"]),
        ("image_file", "1.png"), ("image-url", "http://x/1.png"), ("img", "1.png"), ("picture", {"path": "1.png"}),
        ("photos", ["1.png"]), ("video", "1.mp4"), ("image_file_name", "1.png"), ("image_0", "1.png"),
        ("image1", "1.png"), ("image_base64", "aGk="), ("frames", ["1.png"]), ("media", "1.png"),
        ("input_image", "1.png"), ("pixel_values", [[0.5]]), ("visual", "1.png"), ("jpg", "1.jpg"),
    ],
)  # fmt: skip
def test_an_image_under_another_key_is_a_fault(tmp_path, key, value):
    path = _write(tmp_path / "t.json", [{"id": "a", key: value, "conversations": _turns("q", "a")}])
    with pytest.raises(ValueError, match=rf"record 0 \(id a\): the key `{key}` is not read: images stand under"):
        open_records(path, tmp_path)


@pytest.mark.parametrize("more", [{"images": ["2.png"]}, {"images": ["1.png", "2.png"]}, {"image_1": "2.png"}])
def test_another_image_beside_the_one_that_is_read_is_a_fault(tmp_path, more):
    path = _write(tmp_path / "t.json", [{"id": "a", "image": "1.png", **more, "conversations": _turns("q", "a")}])
    with pytest.raises(ValueError, match=rf"record 0 \(id a\): the key `{next(iter(more))}` is not read"):
        open_records(path, tmp_path)


@pytest.mark.parametrize("key", ["image", "image_url"])
def test_an_image_inside_a_turn_is_a_fault(tmp_path, key):
    turns = _turns("q", "a")
    path = _write(tmp_path / "t.json", [{"id": "a", "conversations": [turns[0] | {key: "1.png"}, turns[1]]}])
    with pytest.raises(ValueError, match=rf"record 0 \(id a\): the key `{key}` of turn 1 is not read"):
        open_records(path, tmp_path)


def test_other_keys_are_none_of_our_business(tmp_path):
    others = {
        "image": "1.png",
        "images": ["1.png"],
        "image_path": "1.png",
        "image_url": "http://x/7",
    }  # the same, said twice
    text = {
        "image_id": "17",
        "image_size": [3, 4],
        "images": [],
        "image": None,
        "img": 3,
        "imagery": "x",
        "source": "y",
    }
    raw = [{"id": "a", "conversations": _turns("q", "a")} | more for more in (others, text)]
    assert [r.images for r in open_records(_write(tmp_path / "t.json", raw), tmp_path)] == [("1.png",), ()]


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"conversations": _turns("q", "a \ud83d")}, r"turn 2 holds half of a surrogate pair \(\\ud83d\)"),
        ({"conversations": _turns("\udcff q", "a")}, r"turn 1 holds half of a surrogate pair \(\\udcff\)"),
        ({"image": "\ud83d.png"}, r"`image` holds half of a surrogate pair"),
    ],
)
def test_half_a_surrogate_pair_is_found_when_the_file_is_read(tmp_path, changes, place):
    path = _write(tmp_path / "t.json", [{"id": "x", "conversations": _turns("q", "a")} | changes])
    with pytest.raises(ValueError, match=r"record 0 \(id x\): " + place):
        open_records(path, tmp_path)


def test_an_id_can_always_be_printed(tmp_path):
    path = _write(tmp_path / "t.json", [{"id": "x\ud83d", "conversations": _turns("q 😀", "a")}])
    [record] = open_records(path, tmp_path)
    assert (record.id, record.messages[0]["content"]) == ("x\\ud83d", "q 😀")


def test_absolute_paths_below_the_root_are_taken_and_others_refused(tmp_path):
    root = tmp_path / "images"
    (root / "a").mkdir(parents=True)
    (tmp_path / "link").symlink_to(root)

    def entry(image):
        return {"id": image, "image": image, "conversations": _turns("q", "a")}

    inside = [f"{root}/a/1.png", f"{root}/a/../1.png", "a/1.png", "a/../1.png", "a/b..c.png", f"{tmp_path}/link/1.png"]
    path = _write(tmp_path / "t.json", [entry(image) for image in inside])
    expected = ["a/1.png", "1.png", "a/1.png", "1.png", "a/b..c.png"]
    for place in (root, Path(os.path.relpath(root))):
        records = open_records(path, tmp_path, image_root=place, allow_faults=True)
        assert [r.images[0] for r in records] == expected
        # The sixth leads through a link that the root is not named by.
        assert [fault["entry"] for fault in records.refused("refuse")] == [5]
    assert open_records(path, tmp_path, image_root=tmp_path / "link", allow_faults=True)[5].images == ("1.png",)
    assert open_records(path, tmp_path, image_root=Path("/"), allow_faults=True)[0].images == (f"{root}/a/1.png"[1:],)
    for image in (f"{root}2/1.png", "../1.png", "a/../../1.png", "/etc/passwd", "..\\1.png", "\\1.png", "a\\..\\1.png"):
        path = _write(tmp_path / "t.json", [entry(image)])
        with pytest.raises(ValueError, match="leads out of the image root .*/ allows any absolute path"):
            open_records(path, tmp_path, image_root=root)
    with pytest.raises(ValueError, match="NUL"):
        open_records(_write(tmp_path / "t.json", [entry("a\0.png")]), tmp_path, image_root=root)


def test_the_split_holds_out_images_not_records(tmp_path):
    entries = [
        {"id": f"{image}-{copy}", "image": f"{image}.png", "conversations": _turns("q", "a")}
        for copy in range(3)
        for image in range(400)
    ]
    records = open_records(_write(tmp_path / "t.json", entries), tmp_path)
    train, val = hold_out(records, 0.2)
    assert len(train) + len(val) == len(records)
    assert 0.13 < len(val) / len(records) < 0.27
    assert not {r.images for r in train} & {r.images for r in val}
    assert len(val) % 3 == 0  # all copies of an image lie on one side
    fewer, _ = hold_out(open_records(_write(tmp_path / "u.json", entries[::-1]), tmp_path), 0.2)
    assert {r.id for r in fewer} == {r.id for r in train}
    assert [r.id for r in train.select(slice(5))] == [r.id for r in train][:5]
    assert np.array_equal(train.words, np.full(len(train), 2))


def test_records_whose_id_is_null_are_divided_like_those_without(tmp_path, caplog):
    sides = []
    for more in ({}, {"id": None}):
        entries = [{"conversations": _turns("q", "a"), **more} for _ in range(100)]
        sides.append(hold_out(open_records(_write(tmp_path / "t.json", entries), tmp_path), 0.5))
    assert [[r.id for r in side] for side in sides[0]] == [[r.id for r in side] for side in sides[1]]
    assert min(map(len, sides[1])) > 30 and "cannot split" not in caplog.text


def test_records_that_share_one_id_cannot_be_divided(tmp_path, caplog):
    entries = [{"id": "same", "conversations": _turns(f"q{i}", "a")} for i in range(3)]
    records = open_records(_write(tmp_path / "t.json", entries), tmp_path)
    assert 0 in map(len, hold_out(records, 0.5))
    assert "data.val_fraction=0.5 cannot split 3 records that all have the same image, or the same id" in caplog.text


def test_images_that_occur_together_stay_on_one_side(tmp_path):
    def entry(i, *images):
        return {"id": str(i), "image": list(images), "conversations": _turns("<image>" * len(images), "a")}

    singles = [entry(i, f"{i}.png") for i in range(200)]
    chains = [entry(1000 + i, f"{i}.png", f"{i + 1}.png") for i in range(199) if i % 4]  # 0-1 ... joins in fours
    records = open_records(_write(tmp_path / "t.json", singles + chains), tmp_path)
    train, val = hold_out(records, 0.3)
    assert not {i for r in train for i in r.images} & {i for r in val for i in r.images}
    assert 0.15 < len(val) / len(records) < 0.45
    shuffled = open_records(_write(tmp_path / "u.json", chains[::-1] + singles[::-1]), tmp_path)
    assert {r.id for r in hold_out(shuffled, 0.3)[1]} == {r.id for r in val}


def test_image_paths_stay_inside_the_root(tmp_path):
    assert resolve_image(tmp_path, "a/b.png") == tmp_path / "a/b.png"
    assert resolve_image(tmp_path, f"{tmp_path}/a/../b.png") == tmp_path / "b.png"
    for name in ("../secret.png", "a/../../secret.png", "/etc/passwd", "..\\secret.png", f"{tmp_path}x/b.png"):
        with pytest.raises(ValueError, match="leads out of the image root"):
            resolve_image(tmp_path, name)


def test_missing_and_broken_images_are_named(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "there.png").write_bytes(b"not an image")
    assert ImageFolder(tmp_path).missing(["a/there.png", "a/gone.png", "b/gone.png"]) == ["a/gone.png", "b/gone.png"]
    # A folder, and an image that is written out as text.
    wrong = ["a", f"{'x' * 300}/y.png", "x" * 300, "a/there.png/b"]
    assert sorted(ImageFolder(tmp_path).missing(["a/there.png", *wrong])) == sorted(wrong)
    with pytest.raises(ValueError, match=r"there\.png cannot be decoded .* none of JPEG, PNG"):
        open_image(tmp_path / "a" / "there.png")
    for name in ("a/gone.png", "a", "a/there.png/b", "a/" + "x" * 300):
        with pytest.raises(ValueError, match=rf"{name} cannot be read .*: name an image, JPEG, PNG"):
            open_image(tmp_path / name)


def test_an_id_that_is_no_text_is_noted_and_trained_on(tmp_path):
    entries = [{"id": id, "conversations": _turns("q", "a")} for id in (7, "7b", None)]
    (tmp_path / "t.json").write_text(json.dumps([*entries, {"conversations": _turns("q", "a")}]))
    records = open_records(tmp_path / "t.json", tmp_path / "cache")
    assert [record.id for record in records] == ["7", "7b", "record 2", "record 3"]
    assert [(note["entry"], note["kind"]) for note in records.noted()] == [(0, "id_type")]
    assert "record 0 (id 7): the id is of Python's type int" in records.noted()[0]["detail"]
