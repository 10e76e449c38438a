"""Files of tensors: what is read, and how damage, foreign pickles and gaps are reported."""

import json
import pickle

import pytest
import torch
from safetensors.torch import save_file

from prism_deco.tensors import indexed_files, open_tensors, tensor_files

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(2)}


class Payload:
    def __reduce__(self):
        return print, ("unpickled!",)


def _same(found) -> bool:
    return found.keys() == TENSORS.keys() and all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)


def test_every_format_gives_the_same_tensors(tmp_path):
    save_file(TENSORS, tmp_path / "a.safetensors")
    torch.save(TENSORS, tmp_path / "a.bin")
    torch.save({"model": TENSORS | {"step": 3}, "optimizer": {"lr": 0.1}}, tmp_path / "wrapped.pth")
    assert all(_same(open_tensors(tmp_path / name)) for name in ("a.safetensors", "a.bin", "wrapped.pth"))
    assert "c" not in open_tensors(tmp_path / "a.safetensors")


@pytest.mark.parametrize("kept", [0, 5, 40, 150])
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_truncated_files_are_named(tmp_path, suffix, kept):
    file = tmp_path / f"cut.{suffix}"
    save_file(TENSORS, file) if suffix == "safetensors" else torch.save(TENSORS, file)
    content = file.read_bytes()
    assert len(content) > kept
    file.write_bytes(content[:kept])
    with pytest.raises(ValueError, match=rf"cut\.{suffix} cannot be read.*incomplete or damaged"):
        open_tensors(file)


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_files_of_another_kind_are_named(tmp_path, suffix, capsys):
    file = tmp_path / f"other.{suffix}"
    for content in (pickle.dumps({"a": Payload()}, 2), b"version https://git-lfs.github.com/spec/v1\n"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=rf"other\.{suffix} cannot be read.*Fetch or write it again"):
            open_tensors(file)
    file.unlink()
    with pytest.raises(ValueError, match=rf"other\.{suffix} cannot be read.*No such file"):
        open_tensors(file)
    assert "unpickled" not in capsys.readouterr().out


def test_files_of_a_checkpoint(tmp_path):
    assert tensor_files(tmp_path) == tensor_files(tmp_path / "model.safetensors") == []
    for name in ("b.pth", "b.bin", "a.bin"):
        (tmp_path / name).touch()
    assert tensor_files(tmp_path) == [tmp_path / "a.bin", tmp_path / "b.bin"]  # of one format only
    assert tensor_files(tmp_path / "b.pth") == [tmp_path / "b.pth"]
    (tmp_path / "c.safetensors").touch()
    assert tensor_files(tmp_path) == [tmp_path / "c.safetensors"]
    index = {"weight_map": {"x": "model-2.safetensors", "y": "model-1.safetensors", "z": "model-1.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    shards = [tmp_path / "model-1.safetensors", tmp_path / "model-2.safetensors"]
    for path in (tmp_path, tmp_path / "model.safetensors"):
        assert tensor_files(path) == indexed_files(path) == shards
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": []}')
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json lists no shards"):
        tensor_files(tmp_path)
