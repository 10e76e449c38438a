"""Parquet and Arrow files with embedded images, written by pyarrow as Hugging Face's libraries do."""

import hashlib
import io
import json
import pickle

import numpy as np
import pytest
from PIL import Image

from prism_deco.config import cache_dir
from prism_deco.data import build_source
from prism_deco.data.base import Source
from prism_deco.data.encoder import Encoder
from prism_deco.data.images import load_image
from prism_deco.data.loader import Examples
from prism_deco.data.records import hold_out, open_records

pa = pytest.importorskip("pyarrow")
import pyarrow.parquet as pq  # noqa: E402

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
TURNS = pa.list_(pa.struct([("from", pa.string()), ("value", pa.string())]))


def _png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), (value, 2 * value, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def _table(values, kind=IMAGE):
    def image(value):
        if value is None or kind == pa.binary():
            return value and _png(value)
        return {"bytes": _png(value), "path": f"{value}.png"}

    many = kind == pa.list_(IMAGE)
    columns = {
        "id": [f"r{i}" for i in range(len(values))],
        "source": ["ignored"] * len(values),
        "image": [[image(v) for v in vs] if many else image(vs) for vs in values],
        "conversations": [
            [{"from": "human", "value": f"What is {v}?"}, {"from": "gpt", "value": "This."}] for v in values
        ],
    }
    types = [pa.string(), pa.string(), kind, TURNS]
    return pa.table([pa.array(c, t) for c, t in zip(columns.values(), types, strict=True)], names=list(columns))


def _write(path, table, format="parquet"):
    path.parent.mkdir(parents=True, exist_ok=True)
    if format == "parquet":
        pq.write_table(table, path, row_group_size=3)
    else:
        new = pa.ipc.new_stream if format == "stream" else pa.ipc.new_file
        with new(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=4)


@pytest.mark.parametrize(
    ("format", "name"), [("parquet", "train-0.parquet"), ("stream", "data-0.arrow"), ("file", "data-0.arrow")]
)
def test_rows_and_images_come_back(tmp_path, format, name):
    values = [5, 7, None, 5, 9]
    _write(tmp_path / "set" / name, _table(values), format)
    source = build_source("embedded", path=str(tmp_path / "set"))
    records = open_records(source.train, tmp_path)
    images = pickle.loads(pickle.dumps(source.images(records)))
    assert [r.id for r in records] == ["r0", "r1", "r2", "r3", "r4"]
    assert records.has_image.tolist() == [True, True, False, True, True]
    for record, value in zip(records, values, strict=True):
        assert record.messages[0]["content"] == f"What is {value}?"
        if value is not None:
            assert load_image(images, record.images[0]).getpixel((0, 0)) == (value, 2 * value, 0)
            assert record.images == (hashlib.sha256(_png(value)).hexdigest()[:16],)
    assert records[0].images == records[3].images  # equal images are stored once
    assert sum(len(_png(v)) for v in {5, 7, 9}) == (images.folder / "images.bin").stat().st_size
    assert images.missing(["00" * 8, records[0].images[0]]) == ["00" * 8]
    with pytest.raises(FileNotFoundError, match="embedded image 0000000000000000"):
        images.read("00" * 8)


def test_shards_patterns_and_lists_of_images(tmp_path):
    _write(tmp_path / "data" / "train-00000-of-00002.parquet", _table([1, 2], pa.binary()))
    _write(tmp_path / "data" / "train-00001-of-00002.parquet", _table([3], pa.binary()))
    _write(tmp_path / "data" / "test-00000-of-00001.parquet", _table([4], pa.binary()))
    _write(tmp_path / "data" / "cache-0123.arrow", _table([4], pa.binary()), "stream")
    train = open_records(build_source("embedded", path=str(tmp_path / "data" / "train-*.parquet")).train, tmp_path)
    assert [r.messages[0]["content"] for r in train] == ["What is 1?", "What is 2?", "What is 3?"]
    _write(tmp_path / "pairs.parquet", _table([[1], []], pa.list_(IMAGE)))
    assert [len(r.images) for r in open_records(tmp_path / "pairs.parquet", tmp_path)] == [1, 0]


@pytest.mark.parametrize(
    ("kept", "left_out"),
    [
        ("data/train-00000-of-00001", "data/test-00000-of-00001 data/Validation_0"),
        ("train/data-00000", "test/data-00000 dev/data-00000"),
        ("a/train-0 b/train-0", "a/val-0 b/valid-0 b/test.2"),
        ("eval/train-0", "train/eval-0"),  # a file's own name counts
        ("part-0 part-1", "part-eval-0"),
        ("latest-0 evaluate-0 devices/0 chartest/0", ""),
        ("test-0 validation-0", ""),  # whoever names such files alone means them
    ],
)
def test_held_out_splits_are_not_trained_on(tmp_path, caplog, kept, left_out):
    names = [*kept.split(), *left_out.split()]
    for value, name in enumerate(names):
        _write(tmp_path / "set" / f"{name}.parquet", _table([value + 1], pa.binary()))
    source = build_source("embedded", path=str(tmp_path / "set"))
    found = {r.messages[0]["content"] for r in open_records(source.train, tmp_path)}
    assert found == {f"What is {value + 1}?" for value in range(len(kept.split()))}
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warned) == bool(left_out)
    count = len(left_out.split())
    assert all("not training data" in text and (f"and {count - 1} more" in text) == (count > 1) for text in warned)
    for name in left_out.split():
        one = build_source("embedded", path=str(tmp_path / "set" / f"{name[:-1]}*.parquet"))
        assert len(open_records(one.train, tmp_path)) == 1


def test_the_split_follows_the_content_of_the_images(tmp_path):
    rng = np.random.default_rng(0)
    values = (rng.permutation(120) % 60 + 1).tolist()
    _write(tmp_path / "a.parquet", _table(values))
    _write(tmp_path / "b.parquet", _table(values[::-1]))
    sides = []
    for name in ("a", "b"):
        train, val = hold_out(open_records(tmp_path / f"{name}.parquet", tmp_path), 0.3)
        assert not {r.images for r in train} & {r.images for r in val} and len(val) > 10
        sides.append({r.images for r in val})
    assert sides[0] == sides[1]


def test_examples_read_embedded_images(tmp_path, tiny):
    vlm, llm = tiny()
    _write(tmp_path / "a.parquet", _table([100, 100]))
    records = open_records(tmp_path / "a.parquet", cache_dir())
    source = Source(tmp_path / "a.parquet", None)
    examples = Examples(records, source.images(records), Encoder(llm, max_text_tokens=99), vlm.backbone.transform)
    expected = vlm.backbone.transform(Image.new("RGB", (8, 6), (100, 200, 0)))["mini_siglip"]
    assert examples[1].pixels[0]["mini_siglip"].equal(expected)


def test_wrong_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"data\.path=.*nowhere: there is no such file or folder"):
        build_source("embedded", path=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"data=embedded needs data\.path"):
        build_source("embedded")
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "other.parquet")
    with pytest.raises(
        ValueError, match=r"other\.parquet has the columns text; it needs one of conversations, messages"
    ):
        open_records(tmp_path / "other.parquet", tmp_path)
    pq.write_table(_table([1]).rename_columns(["id", "source", "photo", "conversations"]), tmp_path / "key.parquet")
    with pytest.raises(ValueError, match=r"key\.parquet: the column photo is not read"):
        open_records(tmp_path / "key.parquet", tmp_path)
    table = _table([1, None])
    other = pa.array([[{"bytes": _png(3), "path": None}], [{"bytes": _png(2), "path": None}]], pa.list_(IMAGE))
    pq.write_table(table.append_column("images", other), tmp_path / "both.parquet")
    with pytest.raises(ValueError, match=r"record 0 \(id r0\): the key `images` is not read"):
        open_records(tmp_path / "both.parquet", tmp_path)
    [record] = open_records(tmp_path / "both.parquet", tmp_path, allow_faults=True)
    assert record.images == (hashlib.sha256(_png(2)).hexdigest()[:16],)
    whole = (tmp_path / "other.parquet").read_bytes()
    (tmp_path / "half.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"half\.parquet cannot be read .*download complete"):
        open_records(tmp_path / "half.parquet", tmp_path)
    _write(tmp_path / "half.arrow", _table(list(range(1, 90))), "stream")
    whole = (tmp_path / "half.arrow").read_bytes()
    (tmp_path / "half.arrow").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"half\.arrow cannot be read .*download complete"):
        open_records(tmp_path / "half.arrow", tmp_path)
    assert not list(tmp_path.rglob(".building-*"))


def test_only_bytes_are_images_and_no_path_is_opened(tmp_path):
    """Some writers leave the bytes out and name a file: of whoever made the data set, or of this machine."""
    Image.new("RGB", (8, 6)).save(tmp_path / "secret.png")
    table = _table([1, 2])
    paths = [{"bytes": None, "path": str(tmp_path / "secret.png")}, {"bytes": _png(2), "path": "/etc/passwd"}]
    _write(tmp_path / "a.parquet", table.set_column(2, "image", pa.array(paths, IMAGE)))
    with pytest.raises(ValueError, match=r"record 0 \(id r0\): `image` must be .* encoded images"):
        open_records(tmp_path / "a.parquet", tmp_path)
    records = open_records(tmp_path / "a.parquet", tmp_path, allow_faults=True)
    [record] = records
    name = hashlib.sha256(_png(2)).hexdigest()[:16]
    assert record.images == (name,)
    # Runs are compared by this hash: it must stay what earlier versions wrote.
    must = "`image` must be a path, or a list of paths (in Parquet and Arrow files: encoded images)."
    refused = {"entry": 0, "id": "r0", "kind": "malformed", "detail": f"record 0 (id r0): {must}", "usable": False}
    messages = [{"role": "user", "content": "What is 2?"}, {"role": "assistant", "content": "This."}]
    kept = {"id": "r1", "images": [name], "messages": messages}
    assert records.data_hash == hashlib.sha256(f"{json.dumps(refused)}{json.dumps(kept)}\n".encode()).hexdigest()
