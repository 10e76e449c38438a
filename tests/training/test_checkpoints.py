import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from prism_deco.exits import CheckpointFailed
from prism_deco.tensors import write_safetensors
from prism_deco.training.checkpoint_callback import checkpoint_tensors, restore_tensors
from prism_deco.training.checkpoints import (
    Checkpoint,
    checkpoint_name,
    list_checkpoints,
    newest_checkpoint,
    prune_checkpoints,
    remove_leftovers,
    save_checkpoint,
)


@pytest.fixture
def tensors():
    torch.manual_seed(0)
    return {
        "model.weight": torch.randn(5, 3),
        "model.bias": torch.randn(3).bfloat16(),
        "optimizer.step.weight": torch.tensor(7.0),
        "optimizer.exp_avg.weight": torch.randn(5, 3, dtype=torch.float64),
    }


@pytest.mark.parametrize("metadata", [{}, {"format": "pt", "a": "1"}])
def test_streamed_files_are_those_of_safetensors_byte_for_byte(tmp_path, metadata):
    tensors = {
        "b": torch.randn(3, 5), "a": torch.arange(7), "c.ö": torch.randn(3).bfloat16(), "scalar": torch.tensor(2.0),
        "flags": torch.tensor([True, False]), "empty": torch.zeros(0, 3), "half": torch.randn(2, 2).half(),
        "strided": torch.randn(4, 6).T, "wide": torch.randn(2, dtype=torch.float64),
    }  # fmt: skip
    write_safetensors(tmp_path / "ours", tensors, metadata=dict(list(metadata.items())[:1]))
    expected = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(expected, tmp_path / "theirs", metadata=dict(list(metadata.items())[:1]) or None)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_what_is_saved_is_read_and_nothing_is_pickled(tmp_path, tensors):
    folder = save_checkpoint(tmp_path, 12, tensors, {"counts": {"bad": 1}})
    assert folder.name == "step_000012"
    assert sorted(path.name for path in folder.iterdir()) == ["index.json", "rank_00000.safetensors"]
    checkpoint = Checkpoint(folder)
    assert checkpoint.step == 12 and checkpoint.content["counts"] == {"bad": 1}
    for name, tensor in tensors.items():
        read = checkpoint.read(name)
        assert read.dtype == tensor.dtype and torch.equal(read, tensor)
    assert checkpoint.names("model.") == ["model.bias", "model.weight"]


def test_any_block_is_put_together_from_the_pieces_of_other_processes(tmp_path):
    whole = torch.arange(70).reshape(7, 10)
    rows = {0: (0, 3), 1: (3, 5), 2: (5, 7)}  # uneven, as three processes hold them
    for rank, (low, high) in rows.items():
        place = json.dumps([[7, 10], [low, 0]])
        save_file(
            {"model.w": whole[low:high].contiguous()},
            tmp_path / f"rank_{rank:05d}.safetensors",
            metadata={"model.w": place},
        )
    index = {"format": 1, "step": 1, "files": [f"rank_{rank:05d}.safetensors" for rank in rows]}
    (tmp_path / "index.json").write_text(json.dumps(index))
    checkpoint = Checkpoint(tmp_path)
    for low in range(7):
        for high in range(low + 1, 8):
            assert torch.equal(checkpoint.read("model.w", (high - low, 10), (low, 0)), whole[low:high])
    assert torch.equal(checkpoint.read("model.w", (4, 3), (2, 6)), whole[2:6, 6:9])
    assert torch.equal(checkpoint.read("model.w"), whole)


def test_an_optimizers_state_is_read_to_where_its_parameters_are(tmp_path, tiny):
    """A fused kernel on a GPU takes no count of steps that lies on the host; `meta` stands in for the GPU."""
    vlm, _ = tiny("mini_llama")  # no tied weights, which `meta` would part
    parameters = [p for p in vlm.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, fused=True)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    folder = save_checkpoint(tmp_path, 1, checkpoint_tensors(vlm, optimizer), {})
    vlm.to("meta")
    again = torch.optim.AdamW([p for p in vlm.parameters() if p.requires_grad])
    restore_tensors(Checkpoint(folder), vlm, again)
    assert len(again.state) == len(parameters)
    assert {tensor.device.type for state in again.state.values() for tensor in state.values()} == {"meta"}


def test_half_a_checkpoint_has_no_valid_name(tmp_path, tensors):
    save_checkpoint(tmp_path, 4, tensors, {})
    for name in (".building-step_000008", ".removing-step_000002", "step_000010"):
        (tmp_path / name).mkdir()  # what a kill leaves; the last one was never written by us
    assert newest_checkpoint(tmp_path) == tmp_path / "step_000004"
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000004", "step_000010"]
    with pytest.raises(ValueError, match=r"step_000010 is not a checkpoint \(no index\.json\)"):
        Checkpoint(tmp_path / "step_000010")


def test_the_newest_and_the_best_stay(tmp_path, tensors):
    for step in (1, 5, 9, 1000000):
        save_checkpoint(tmp_path, step, tensors, {})
    prune_checkpoints(tmp_path, keep=2, best=1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_000001", "step_000009", "step_1000000"]
    prune_checkpoints(tmp_path, keep=1, best=9)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_000009", "step_1000000"]


def test_a_checkpoint_that_is_there_is_not_written_again(tmp_path, tensors):
    before = (save_checkpoint(tmp_path, 3, tensors, {}) / "index.json").stat().st_mtime_ns
    folder = save_checkpoint(tmp_path, 3, {"model.weight": torch.zeros(1)}, {})
    assert (folder / "index.json").stat().st_mtime_ns == before


FULL_DISK = """
import resource, sys, torch
from pathlib import Path
from prism_deco.training.checkpoints import Checkpoint, newest_checkpoint, save_checkpoint
from prism_deco.exits import CheckpointFailed
folder = Path(sys.argv[1])
save_checkpoint(folder, 1, {"model.w": torch.ones(100)}, {})
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
try:
    save_checkpoint(folder, 2, {"model.w": torch.ones(100_000)}, {})
except CheckpointFailed as error:
    print(error)
assert [path.name for path in folder.iterdir()] == ["step_000001"], list(folder.iterdir())
assert Checkpoint(newest_checkpoint(folder)).read("model.w").sum() == 100
"""


def test_a_file_that_cannot_grow_leaves_the_last_checkpoint(tmp_path):
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "step_000002 could not be written (OSError: [Errno 27] File too large)" in done.stdout
    assert "it needs 0.4 MB" in done.stdout and "training continues from step_000001" in done.stdout


def test_a_folder_that_cannot_be_written_is_named(tmp_path, tensors):
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(
        CheckpointFailed, match="checkpoints/step_000002 could not be written.*continues from the start"
    ):
        save_checkpoint(tmp_path / "checkpoints", 2, tensors, {})


MEMORY = """
import resource, sys, torch
from pathlib import Path
from safetensors.torch import save_file
from prism_deco.training.checkpoints import Checkpoint, save_checkpoint

def peak():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) / 1024

def anonymous():
    return int(next(l for l in open("/proc/self/status") if l.startswith("RssAnon")).split()[1]) / 1024

tensors = {f"model.{i}": torch.full((2, 2**20), float(i)) for i in range(32)}  # 256 MiB
before = peak()
folder = save_checkpoint(Path(sys.argv[1]), 1, tensors, {})
saving = peak() - before
tensors.clear()
low = anonymous()
checkpoint = Checkpoint(folder)
high = max(anonymous() - low for i in range(32) if checkpoint.read(f"model.{i}").sum() >= 0)
print(saving, high)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads Linux's figures")
def test_saving_and_reading_hold_a_few_tensors_at_a_time(tmp_path):
    done = subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True, text=True, check=True)
    saving, reading = map(float, done.stdout.split())
    assert saving < 32 and reading < 80  # MiB, of 256 in tensors of 8
    assert load_file(tmp_path / checkpoint_name(1) / "rank_00000.safetensors")["model.31"][0, 0] == 31


def test_a_damaged_checkpoint_is_named_with_the_hint(tmp_path, tensors):
    folder = save_checkpoint(tmp_path, 3, tensors, {})
    file = folder / "rank_00000.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"step_000003/rank_00000\.safetensors cannot be read.*Remove this checkpoint"):
        Checkpoint(folder)
    (folder / "index.json").write_text('{"format": 1')
    with pytest.raises(ValueError, match=r"step_000003/index\.json is damaged.*Remove this checkpoint"):
        Checkpoint(folder)


def _flip(file: Path, place: int) -> None:
    """Changes one bit of a byte, counted from the end: of a tensor's values, not of the file's header."""
    content = bytearray(file.read_bytes())
    content[-place] ^= 1
    file.write_bytes(content)


def test_a_flipped_bit_is_found(tmp_path, tensors):
    folder = save_checkpoint(tmp_path, 3, tensors, {})
    file = folder / "rank_00000.safetensors"
    recorded = json.loads((folder / "index.json").read_text())["sha256"]
    assert recorded == {file.name: hashlib.sha256(file.read_bytes()).hexdigest()}
    Checkpoint(folder).verify()
    _flip(file, 5)
    with pytest.raises(ValueError, match=r"step_000003/rank_00000\.safetensors was damaged.*Remove this checkpoint"):
        Checkpoint(folder).verify()


def test_a_checkpoint_of_an_earlier_version_is_used_without_checksums(tmp_path, tensors, caplog):
    caplog.set_level("INFO")
    folder = save_checkpoint(tmp_path, 3, tensors, {})
    index = json.loads((folder / "index.json").read_text())
    del index["sha256"]
    (folder / "index.json").write_text(json.dumps(index))
    checkpoint = Checkpoint(folder)
    checkpoint.verify()
    assert torch.equal(checkpoint.read("model.weight"), tensors["model.weight"])
    assert caplog.text.count("has no checksums") == 1


@pytest.mark.parametrize("name", ["../step_000001/rank_00000.safetensors", "/etc/passwd"])
def test_an_index_names_no_file_outside_its_folder(tmp_path, tensors, name):
    save_checkpoint(tmp_path, 1, tensors, {})
    folder = save_checkpoint(tmp_path, 3, tensors, {})
    index = json.loads((folder / "index.json").read_text()) | {"files": [name]}
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"step_000003/index\.json names .*, a file outside its folder"):
        Checkpoint(folder)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_numbers_are_refused(tmp_path, tiny, value):
    vlm, _ = tiny()
    optimizer = torch.optim.AdamW([p for p in vlm.parameters() if p.requires_grad])
    tensors = checkpoint_tensors(vlm, optimizer)
    name = "model.projector.mlp.0.weight"
    tensors[name] = tensors[name].detach().clone()
    tensors[name][0, 0] = value
    checkpoint = Checkpoint(save_checkpoint(tmp_path, 2, tensors, {}))
    with pytest.raises(ValueError, match=rf"step_000002: {name} holds NaN or infinite numbers\. Remove"):
        restore_tensors(checkpoint, vlm, optimizer)
