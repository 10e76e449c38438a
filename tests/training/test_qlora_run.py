"""A whole run on four-bit weights: by bitsandbytes' kernels for the CPU, where there is no GPU."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

import prism_deco
from prism_deco.cli import main
from prism_deco.llms import build_llm
from prism_deco.llms.lora import merge_lora

SMALL = [
    "data.train_images=48", "data.val_images=12", "data.test_images=4", "data.val_items=4", "data.test_items=4",
    "data.limit=80", "evaluate.benchmarks=null", "trainer.threads=1", "trainer.checkpoint_every=2",
    "recipe.lm=qlora", "recipe.lora_r=4", "recipe.lora_alpha=8", "recipe.max_steps=4",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.usefixtures("four_bits")
def test_a_qlora_run_trains_resumes_and_is_exported(tmp_path, caplog):
    torch.manual_seed(0)
    base = build_llm("mini_llama", pretrained=False).model
    base.save_pretrained(tmp_path / "weights")
    llm = ["llm=mini_llama", "llm.pretrained=true", f"llm.weights={tmp_path / 'weights'}"]
    run, command = tmp_path / "x", ["train", *llm, *SMALL, f"runs_dir={tmp_path}", "run_id=x"]
    assert main(command) == 0
    trained = {name: load_file(run / "model" / name) for name in _files(run)}
    adapters = trained["adapter/adapter_model.safetensors"]
    assert all(tensor.any() and tensor.dtype == torch.float32 for tensor in adapters.values()), "B began at zero"
    assert not any(name.startswith(("lm.", "backbone.")) for name in trained["model.safetensors"])

    # As it was before the last step.
    before, last = sorted((run / "checkpoints").iterdir())
    for folder in (last, run / "model"):
        shutil.rmtree(folder)
    (run / "manifest.json").unlink()
    (run / "status.json").write_text(json.dumps({"state": "preempted"}))
    caplog.clear()
    assert main(command) == 0
    assert f"training continues from {before.name}" in caplog.text
    for name in trained:
        for key, tensor in load_file(run / "model" / name).items():
            assert torch.equal(tensor, trained[name][key]), key

    model = prism_deco.load(run)
    merge_lora(model.vlm.lm)
    assert main(["export", "--merge", str(run), "--to", str(tmp_path / "merged")]) == 0
    exported = prism_deco.load(tmp_path / "merged").vlm.lm.state_dict()
    moved = {name for name, tensor in base.state_dict().items() if not torch.equal(tensor, exported[name])}
    assert moved == {name for name in exported if "_proj." in name}, "adapters on the weights before they were rounded"
    assert all(torch.equal(tensor, exported[name]) for name, tensor in model.vlm.lm.state_dict().items())


def _files(run):
    return [str(path.relative_to(run / "model")) for path in (run / "model").rglob("*.safetensors")]
