"""What the data keys are told when their values are not what they should be."""

import pytest

from prism_deco.cli import main
from prism_deco.config import load_config
from prism_deco.data import build_source

LONG = "x" * 300


@pytest.fixture
def files(tmp_path, monkeypatch):
    (tmp_path / "a.json").write_text("[]")
    (tmp_path / "images").mkdir()
    (tmp_path / "set").mkdir()
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("llava", {"json": "b.json"}, "data.json=b.json: there is no such file"),
        (
            "llava",
            {"json": "images"},
            r"data.json=images cannot be read as a file \(Is a directory\): name a JSON",
        ),
        ("llava", {"json": "a.json/b.json"}, r"data.json=a.json/b.json cannot be read as a file \(Not a directory\)"),
        ("llava", {"json": LONG}, r"data.json=x+ cannot be read as a file \(File name too long\)"),
        ("llava", {"val_json": "images"}, "data.val_json=images cannot be read as a file"),
        ("llava", {"val_json": LONG}, "data.val_json=x+ cannot be read"),
        ("llava", {"image_root": "b"}, "data.image_root=b: there is no such folder"),
        (
            "llava",
            {"image_root": "a.json"},
            r"data.image_root=a.json cannot be read as a folder.*: name the folder",
        ),
        ("llava", {"image_root": LONG}, r"data.image_root=x+ cannot be read as a folder \(File name too long\)"),
        ("embedded", {"path": "a.json"}, "data.path=a.json: there is no .parquet.*data=llava data.json=FILE"),
        ("embedded", {"path": "nope"}, r"data.path=nope: there is no such file or folder\."),
        ("embedded", {"path": "a.json", "val_path": "set/nope"}, "data.path=a.json: there is no .parquet"),
        ("embedded", {"path": "nope/*.parquet"}, r"data.path=nope/\*.parquet: there is no .parquet"),
        ("embedded", {"path": LONG}, "data.path=x+ cannot be read"),
        (
            "llava_v1_5_mix665k",
            {"root": "b"},
            "b/llava_v1_5_mix665k.json does not exist: run `prism-deco data prepare`",
        ),
        ("llava_v1_5_mix665k", {"root": "a.json"}, "a.json/llava_v1_5_mix665k.json does not exist: run"),
        ("llava_v1_5_mix665k", {"root": LONG}, "/llava_v1_5_mix665k.json does not exist: run"),
    ],
)
def test_a_wrong_path_is_named_with_its_key(files, family, options, message):
    given = {"json": "a.json", "image_root": "images"} if family == "llava" else {}
    with pytest.raises(ValueError, match=message):
        build_source(family, **given | options)


def test_a_key_of_another_choice_leads_to_it():
    with pytest.raises(ValueError, match=r"Unknown key data.json. It is a key of data=llava or data="):
        load_config(["data=shapes", "data.json=x.json"])
    with pytest.raises(ValueError, match=r"Unknown key data.path. It is a key of data=embedded\."):
        load_config(["data=llava", "data.path=x"])


@pytest.mark.parametrize("command", [["data", "check"], ["train"], ["train", "--check"], ["plan"]], ids=" ".join)
def test_the_data_are_looked_for_before_a_tokenizer_is(files, command, capsys):
    """Offline, the tokenizer of Phi-2 cannot be had."""
    main([*command, "llm=phi2", "backbone=clip_vit_l_336", "data=llava", "data.json=b.json", "data.image_root=images"])
    said = capsys.readouterr()
    assert "data.json=b.json: there is no such file" in said.err + said.out
    assert "tokenizer" not in said.err
