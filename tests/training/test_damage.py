"""What changed or broke on the disk is found when it is read, and named with the way out."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import prism_deco
from prism_deco.cli import main
from prism_deco.commands.scoring import _score
from prism_deco.errors import UsageError
from prism_deco.tensors import indexed_files
from prism_deco.training.checkpoints import newest_checkpoint

OPTIONS = ["trainer.checkpoint_every=2", "recipe.epochs=4"]


@pytest.fixture
def stopped(start, tmp_path):
    """Run name, options -> its folder: killed after its first checkpoint, before its end."""

    def make(run: str = "run", *options: str):
        job = start(*OPTIONS, *options, run=run)
        job.until(lambda folder: newest_checkpoint(folder / "checkpoints"))
        job.kill()
        return tmp_path / run

    return make


def _flip(file):
    """Changes one bit in the values of the last tensor."""
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


def test_a_damaged_checkpoint_stops_the_run_until_it_is_removed(start, stopped):
    folder = stopped()
    checkpoint = newest_checkpoint(folder / "checkpoints")
    _flip(checkpoint / "rank_00000.safetensors")
    job = start(*OPTIONS)
    assert job.wait() == [2]
    said = job.log.read_text()
    assert f"{checkpoint}/rank_00000.safetensors was damaged" in said and "Remove this checkpoint's folder" in said
    assert "Traceback" not in said
    shutil.rmtree(checkpoint)
    assert start(*OPTIONS).wait() == [0]


def test_a_checkpoint_of_another_run_is_refused(start, stopped):
    """Its tensors have the same names and shapes."""
    mine, other = stopped("mine"), stopped("other", "seed=8")
    shutil.rmtree(mine / "checkpoints")
    shutil.copytree(other / "checkpoints", mine / "checkpoints")
    job = start(*OPTIONS, run="mine")
    assert job.wait() == [2]
    assert "belongs to run other (" in job.log.read_text() and "-s8), not to mine (" in job.log.read_text()


@pytest.mark.parametrize("part", ["train", "val"])
def test_data_that_changed_between_two_starts_are_refused_unless_accepted(start, tmp_path, colors, part):
    """A record that was mended, added or lost would also move the learning rate's schedule."""
    for name in ("train", "val"):
        shutil.copy(colors / "train.json", tmp_path / f"{name}.json")
    (tmp_path / "parts.py").write_text(
        "from pathlib import Path\n"
        "from prism_deco.data.base import SOURCES, Source\n"
        "@SOURCES.register('parts')\n"
        "def parts(json, root, image_root):\n"
        "    return Source(Path(root) / 'train.json', Path(image_root), val=Path(root) / 'val.json')\n"
    )
    (tmp_path / "parts.yaml").write_text(f"family: parts\nroot: {tmp_path}\njson: unused\nimage_root: null\n")
    options = [*OPTIONS, f"data={tmp_path / 'parts.yaml'}", "plugins=[parts]", "data.num_workers=0"]

    def attempt(*more):
        return start(*options, *more, PLUGINS=str(tmp_path))

    job = attempt()
    job.until(lambda folder: newest_checkpoint(folder / "checkpoints"))
    job.kill()
    step = int(newest_checkpoint(tmp_path / "run/checkpoints").name[5:])
    records = json.loads((tmp_path / f"{part}.json").read_text())
    (tmp_path / f"{part}.json").write_text(json.dumps(records[:-1]))
    job = attempt()
    assert job.wait() == [2]
    said = f"The {'training' if part == 'train' else 'validation'} records changed since step_{step:06d} of this run"
    assert said in job.log.read_text() and "trainer.accept_changed_inputs=true" in job.log.read_text()
    assert attempt("trainer.accept_changed_inputs=true").wait() == [0], job.log.read_text()
    [change] = json.loads((tmp_path / "run/manifest.json").read_text())["input_changes"]
    assert (change["step"], change["input"]) == (step, part) and change["before"] != change["after"]


@pytest.fixture(scope="module")
def trained(colors, tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    source = ["data=llava", f"data.json={colors / 'train.json'}", f"data.image_root={colors / 'images'}"]
    fast = ["data.val_fraction=0", "evaluate.benchmarks=null", "recipe.max_steps=1", "backbone.pretrained=false",
            "recipe.global_batch_size=4", "trainer.threads=1"]  # fmt: skip
    assert main(["train", *source, *fast, f"runs_dir={runs}", "run_id=run"]) == 0
    return runs / "run"


@pytest.fixture
def copied(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


@pytest.mark.parametrize(
    "name", ["model.safetensors", "backbone.safetensors", "llm.json", "tokenizer/tokenizer.json", "backbone.json"]
)
def test_a_damaged_file_of_a_model_is_named(copied, name):
    file = copied / "model" / name
    if name.endswith(".json"):
        file.write_text(file.read_text().replace("e", "E", 1))
    else:
        _flip(file)
    with pytest.raises(ValueError, match="was damaged|was trained with backbone weights") as found:
        prism_deco.load(copied)
    assert str(file) in str(found.value) or name == "backbone.safetensors"


def test_the_model_of_another_run_is_refused(copied):
    manifest = json.loads((copied / "manifest.json").read_text())
    (copied / "manifest.json").write_text(json.dumps(manifest | {"model_sha256": "0" * 64}))
    with pytest.raises(ValueError, match="is not the model that the run trained"):
        prism_deco.load(copied)


@pytest.mark.parametrize("name", ["projector.mlp.0.weight", "feature_mean"])
def test_weights_full_of_nan_are_refused(copied, name):
    """Also without checksums, as a run of an earlier version left them."""
    (copied / "model" / "SHA256SUMS").unlink()
    file = copied / "model" / "model.safetensors"
    weights = load_file(file)
    weights[name][:] = torch.nan
    save_file(weights, file)
    with pytest.raises(ValueError, match=rf"run/model: {name} holds NaN or infinite numbers"):
        prism_deco.load(copied)


@pytest.mark.parametrize("name", ["manifest.json", "model/backbone.json"])
def test_a_damaged_record_of_a_run_is_one_line(copied, capsys, name):
    (copied / name).write_text("{")
    if name != "manifest.json":
        (copied / "model" / "SHA256SUMS").unlink()
    questions = [["evaluate", "benchmark=mini"], ["explain", "benchmark=mini_refcoco"]]
    for command, *settings in [["chat"], *(questions if name == "manifest.json" else [])]:
        assert main([command, str(copied), *settings]) == 2
        said = capsys.readouterr().err
        assert f"{copied / name} is damaged (" in said and "Traceback" not in said


def test_damaged_scores_are_named_with_the_hint(tmp_path):
    (tmp_path / "metrics.json").write_text("{")
    with pytest.raises(UsageError, match=rf"{tmp_path}/metrics\.json is damaged .* Remove it, and run"):
        _score(tmp_path)


def test_a_damaged_model_to_start_from_is_found_before_it_is_needed(copied, colors, tmp_path, capsys):
    _flip(copied / "model" / "model.safetensors")
    source = ["data=llava", f"data.json={colors / 'train.json'}", f"data.image_root={colors / 'images'}"]
    line = [*source, "evaluate.benchmarks=null", "backbone.pretrained=false", f"runs_dir={tmp_path}", "run_id=next"]
    assert main(["train", "--check", *line, f"recipe.start_from={copied}"]) == 2
    assert "model.safetensors was damaged or replaced" in capsys.readouterr().err


def test_a_model_of_an_earlier_version_loads_with_one_line(copied, caplog):
    caplog.set_level("INFO")
    (copied / "model" / "SHA256SUMS").unlink()
    assert prism_deco.load(copied)
    assert caplog.text.count("has no checksums") == 1


def test_settings_of_a_model_may_be_edited(copied):
    """`load` tells a user to point `backbone.weights` at another copy there."""
    config = copied / "model" / "config.yaml"
    config.write_text(config.read_text() + "# moved\n")
    assert prism_deco.load(copied)


def test_checksums_are_those_of_sha256sum(trained):
    import subprocess

    done = subprocess.run(["sha256sum", "-c", "--strict", "SHA256SUMS"], cwd=trained / "model", capture_output=True)
    assert done.returncode == 0 and done.stdout.count(b"OK") >= 6


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/secret.safetensors"])
def test_an_index_of_shards_names_no_file_outside_its_folder(tmp_path, name):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json names .*, a file outside its folder"):
        indexed_files(tmp_path)
