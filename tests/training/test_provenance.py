"""What a run may not find changed when it continues."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from prism_deco.config import load_config
from prism_deco.errors import UsageError
from prism_deco.llms import build_llm
from prism_deco.llms.hub import ASSETS
from prism_deco.training.manifest import check_owner, provenance


@pytest.fixture
def found(tmp_path):
    """(`recipe.lm`, checkpoint, overrides) -> provenance of a run on the LLM in `tmp_path`."""
    vlm = SimpleNamespace(backbone=SimpleNamespace(sha256=lambda: "tower"))
    data = SimpleNamespace(data_hash="a", val_hash="b")

    def find(lm, checkpoint=None, *overrides, tokenizer="asset:llama"):
        options = ["llm=mini_llama", "llm.pretrained=true", f"llm.weights={tmp_path}", "run_id=x", *overrides]
        llm = build_llm("mini_llama", weights=str(tmp_path), tokenizer=tokenizer, device="meta")
        return provenance(load_config([*options, f"recipe.lm={lm}"]), vlm, llm, data, None, checkpoint)

    return find


def _write_base(folder):
    build_llm("mini_llama", pretrained=False).model.save_pretrained(folder)


@pytest.mark.parametrize("lm", ["frozen", "lora"])
def test_a_replaced_base_llm_is_refused_unless_accepted(lm, found, tmp_path):
    _write_base(tmp_path)
    before = found(lm)
    checkpoint = SimpleNamespace(content=before, step=7, folder=Path("step_000007"))
    assert found(lm, checkpoint) == before
    _write_base(tmp_path)
    with pytest.raises(ValueError, match="The weights of the language model changed since step_000007"):
        found(lm, checkpoint)
    [change] = found(lm, checkpoint, "trainer.accept_changed_inputs=true")["input_changes"]
    assert (change["step"], change["input"], change["before"]) == (7, "llm", before["inputs"]["llm"])
    # Checkpoints of earlier versions do not name it.
    del checkpoint.content["inputs"]["llm"]
    assert found(lm, checkpoint)["input_changes"] == []


def test_another_tokenizer_of_that_name_is_refused_unless_accepted(found, tmp_path):
    """Files of a folder are replaced, or the hub's."""
    folder = shutil.copytree(ASSETS / "llama", tmp_path / "own")
    before = found("full", tokenizer=str(folder))
    assert before == found("full")
    checkpoint = SimpleNamespace(content=before, step=7, folder=Path("step_000007"))
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    first, second = list(content["model"]["vocab"])[-2:]
    vocabulary = content["model"]["vocab"]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="The tokenizer changed since step_000007"):
        found("full", checkpoint, tokenizer=str(folder))
    accepted = found("full", checkpoint, "trainer.accept_changed_inputs=true", tokenizer=str(folder))
    assert [change["input"] for change in accepted["input_changes"]] == ["tokenizer"]
    del checkpoint.content["inputs"]["tokenizer"]  # of an earlier version
    assert found("full", checkpoint, tokenizer=str(folder))["input_changes"] == []


def test_an_llm_that_is_trained_is_in_the_checkpoint_itself(found):
    assert "llm" not in found("full")["inputs"]


def test_a_run_may_move_and_compute_otherwise_but_not_learn_otherwise(found):
    checkpoint = SimpleNamespace(content=found("full"), folder=Path("step_000007"))
    options = ["llm=mini_llama", "llm.pretrained=true", "recipe.lm=full", "run_id=x"]
    elsewhere = ["llm.weights=/elsewhere", "runs_dir=/elsewhere", "trainer.devices=4", "recipe.micro_batch_size=1"]
    check_owner(checkpoint, load_config([*options, *elsewhere]))
    with pytest.raises(UsageError, match=r"another run named x: recipe\.lr is .* there and 0\.5 here\. Remove"):
        check_owner(checkpoint, load_config([*options, "recipe.lr=0.5"]))
    checkpoint.content["run"] = {key: checkpoint.content["run"][key] for key in ("run_id", "choices")}
    check_owner(checkpoint, load_config([*options, "recipe.lr=0.5"]))  # of an earlier version
