"""What a run with adapters, or with a frozen LLM, keeps and gives back; and runs that start from another."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import prism_deco
from prism_deco.build import build_model
from prism_deco.cli import main
from prism_deco.config import load_config
from prism_deco.llms import build_llm
from prism_deco.llms.build import weight_map
from prism_deco.llms.lora import merge_lora
from prism_deco.sequence import build_batch
from prism_deco.training.init_from import find_start, start_from
from prism_deco.training.model_folder import load_model, save_model
from prism_deco.training.sharding import read_weights

SMALL = ["llm=mini_llama", "llm.pretrained=false", "recipe=mini_finetune", "recipe.lora_r=4", "backbone=mini_clip"]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    """The weights of a mini_llama, as if they had been downloaded; fewer rows than the tokenizer needs."""
    folder = tmp_path_factory.mktemp("base") / "weights"
    torch.manual_seed(5)
    build_llm("mini_llama", pretrained=False).model.save_pretrained(folder)
    return str(folder)


def _config(*overrides: str) -> DictConfig:
    return load_config([*SMALL, *overrides])


def _named(base: str, *overrides: str) -> DictConfig:
    return _config("llm.pretrained=true", f"llm.weights={base}", "llm.pad_to_multiple_of=128", *overrides)


def _trained(folder: Path, config: DictConfig, seed: int = 3) -> nn.Module:
    """Saves a model whose trained parts are anything but their start."""
    torch.manual_seed(seed)
    vlm, llm = build_model(config)
    with torch.no_grad():
        for parameter in vlm.parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn_like(parameter)
    save_model(folder, config, vlm, llm)
    return vlm.eval()


@torch.no_grad()
def _logits(vlm, llm) -> torch.Tensor:
    talk = [{"role": "user", "content": "<image>\nWhat color is it?"}, {"role": "assistant", "content": "red"}]
    pixels = {"mini_clip": torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))}
    batch = build_batch([llm.encode(talk, num_images=1)], vlm.projector.num_tokens, pixels=pixels)
    return vlm.logits(vlm.hidden_states(batch))


def _names(file: Path) -> set[str]:
    with safe_open(file, "pt") as tensors:
        return set(tensors.keys())


def test_a_base_that_can_be_had_again_is_named_not_stored(tmp_path, base):
    vlm = _trained(tmp_path / "model", _named(base))
    assert {name.partition(".")[0] for name in _names(tmp_path / "model" / "model.safetensors")} == {
        "projector", "feature_mean", "feature_std",
    }  # fmt: skip
    record = json.loads((tmp_path / "model" / "base.json").read_text())
    assert record["path"] == base and len(record["sha256"]) == 64
    weights = sum(file.stat().st_size for file in (tmp_path / "model").rglob("*.safetensors"))
    trained = sum(p.numel() for p in vlm.parameters() if p.requires_grad)
    assert weights < 4 * trained + 20_000, "what was trained, in float32, and nothing else"
    loaded, llm, config = load_model(tmp_path / "model")
    assert config.recipe.lm == "lora" and config.llm.weights == base
    assert torch.equal(_logits(loaded, llm), _logits(vlm, llm))


def test_adapters_are_stored_in_what_training_multiplied_by(tmp_path, base):
    """A bf16-mixed step never saw their other bits: under autocast, nothing changes to the last bit."""
    vlm = _trained(tmp_path / "model", _named(base, "trainer.precision=bf16-mixed"))
    stored = load_file(tmp_path / "model" / "adapter" / "adapter_model.safetensors")
    trained = {name: p for name, p in vlm.named_parameters() if ".lora_" in name}
    assert len(stored) == len(trained) > 0 and {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    loaded, llm, _ = load_model(tmp_path / "model")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(_logits(loaded, llm), _logits(vlm, llm))
    assert not torch.equal(_logits(loaded, llm), _logits(vlm, llm))


def test_a_random_base_is_stored_whole(tmp_path):
    vlm = _trained(tmp_path / "model", _config())
    assert not (tmp_path / "model" / "base.json").exists()
    names = _names(tmp_path / "model" / "model.safetensors")
    plain = {f"lm.{name}" for name in build_llm("mini_llama", device="meta").model.state_dict()}
    assert {name for name in names if name.startswith("lm.")} == plain, "under their plain names"
    loaded, llm, _ = load_model(tmp_path / "model")
    assert torch.equal(_logits(loaded, llm), _logits(vlm, llm))


def test_a_frozen_llm_is_named_as_well(tmp_path, base):
    vlm = _trained(tmp_path / "model", _named(base, "recipe=mini_align"))
    assert not any(p.requires_grad for p in vlm.lm.parameters()) and not (tmp_path / "model" / "adapter").exists()
    loaded, llm, _ = load_model(tmp_path / "model")
    assert torch.equal(_logits(loaded, llm), _logits(vlm, llm))


def test_another_base_is_not_taken_in_silence(tmp_path, base):
    copy = shutil.copytree(base, tmp_path / "weights")
    _trained(tmp_path / "model", _named(str(copy)))
    torch.manual_seed(6)
    build_llm("mini_llama", pretrained=False).model.save_pretrained(copy)
    with pytest.raises(ValueError, match=r"with SHA-256 .{12}…, those found here differ. Set llm\.weights"):
        load_model(tmp_path / "model")
    shutil.rmtree(copy)
    with pytest.raises(ValueError, match=r"does not hold its language model.*there is no such file or folder"):
        load_model(tmp_path / "model")


def test_an_export_is_merged_and_computes_the_same(tmp_path, base):
    _trained(tmp_path / "run" / "model", _named(base))
    unmerged = prism_deco.load(tmp_path / "run")
    expected = _logits(unmerged.vlm, unmerged.llm)
    assert main(["export", "--merge", str(tmp_path / "run"), "--to", str(tmp_path / "merged")]) == 0
    assert not (tmp_path / "merged" / "adapter").exists() and not (tmp_path / "merged" / "base.json").exists()
    merged = prism_deco.load(tmp_path / "merged")
    found = _logits(merged.vlm, merged.llm)
    # float32: the sum of two products against the product of a sum.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.equal(found, expected)


def test_adapters_are_merged_when_that_is_asked_for_and_before_rounding(tmp_path, base, capsys):
    _trained(tmp_path / "run" / "model", _named(base))
    run, half = str(tmp_path / "run"), ["--to", str(tmp_path / "half"), "--dtype", "bfloat16"]
    assert main(["export", run, *half]) == 2
    assert "has LoRA adapters, and an export is a whole model: add --merge" in capsys.readouterr().err
    assert not (tmp_path / "half").exists()
    assert main(["export", run, "--merge", *half]) == 0
    vlm = prism_deco.load(run).vlm
    merge_lora(vlm.lm)
    exact, written = vlm.lm.state_dict(), prism_deco.load(tmp_path / "half").vlm.lm.state_dict()
    assert exact.keys() == written.keys()
    assert all(torch.equal(written[name], tensor.to(torch.bfloat16)) for name, tensor in exact.items())
    assert main(["export", str(tmp_path / "half"), "--merge", "--to", str(tmp_path / "again")]) == 2
    assert "has no LoRA adapters to merge" in capsys.readouterr().err


def test_generation_and_relevance_work_on_adapters(tmp_path):
    from PIL import Image

    _trained(tmp_path / "model", _config())
    model = prism_deco.load(tmp_path / "model")
    image = Image.new("RGB", (64, 64), (200, 30, 30))
    [text] = model.generate([image], ["What color is it?"], max_new_tokens=4)
    relevance = model.relevance(image, "What color is it?", "red")
    merge_lora(model.vlm.lm)
    assert model.generate([image], ["What color is it?"], max_new_tokens=4) == [text]
    again = model.relevance(image, "What color is it?", "red")
    assert relevance.text_to_query.abs().sum() > 0
    torch.testing.assert_close(again.text_to_query, relevance.text_to_query, rtol=1e-3, atol=1e-5)


def test_a_model_whose_weights_are_read_in_pieces_begins_as_the_whole_one_does(base):
    config = _named(base)
    torch.manual_seed(1)
    whole, _ = build_model(config)
    torch.manual_seed(1)
    vlm, llm = build_model(config, defer_llm=True)
    files = weight_map(llm.spec)
    assert files is not None and all(p.is_meta for p in vlm.lm.parameters())
    read_weights(vlm.lm, files, torch.device("cpu"))
    expected = dict(whole.named_parameters())
    for name, parameter in vlm.named_parameters():
        assert torch.equal(parameter, expected[name]) and parameter.requires_grad == expected[name].requires_grad, name
    assert torch.equal(_logits(vlm.eval(), llm), _logits(whole.eval(), llm))


def _start(run: Path, config: DictConfig, seed: int = 9):
    torch.manual_seed(seed)
    vlm, llm = build_model(config)
    before = {name: tensor.clone() for name, tensor in vlm.state_dict().items()}
    start_from(find_start(run, config), config, vlm, llm)
    return vlm, before


def test_a_run_takes_over_the_projector_and_nothing_else(tmp_path, base):
    earlier = _trained(tmp_path / "align" / "model", _named(base, "recipe=mini_align"))
    vlm, before = _start(tmp_path / "align", _named(base))
    for name, tensor in vlm.state_dict().items():
        if name.startswith(("projector.", "feature_")):
            assert torch.equal(tensor, earlier.state_dict()[name]), name
        else:
            assert torch.equal(tensor, before[name]), name
    assert any(not torch.equal(before[n], t) for n, t in vlm.state_dict().items() if n.startswith("projector."))


@pytest.mark.parametrize("llm", ["mini_llama", "mini_qwen2"])
def test_a_random_llm_goes_along_with_its_projector(tmp_path, llm):
    overrides = [f"llm={llm}", "backbone.pretrained=false"]
    earlier = _trained(tmp_path / "model", _config(*overrides, "recipe=mini"))
    vlm, before = _start(tmp_path, _config(*overrides))
    taken = {name.replace(".base_layer.", "."): t for name, t in vlm.state_dict().items() if ".lora_" not in name}
    assert taken.keys() == earlier.state_dict().keys()
    assert all(torch.equal(tensor, earlier.state_dict()[name]) for name, tensor in taken.items())
    assert all(torch.equal(t, before[n]) for n, t in vlm.state_dict().items() if ".lora_" in n)


def test_a_fine_tuned_model_goes_on_whole(tmp_path, base):
    """On other data, say: what was trained of the LLM is taken over, not read from its first weights again."""
    earlier = _trained(tmp_path / "full" / "model", _named(base, "recipe.lm=full"))
    vlm, before = _start(tmp_path / "full", _named(base, "recipe.lm=full"))
    state = earlier.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in vlm.state_dict().items())
    assert any(not torch.equal(before[name], tensor) for name, tensor in state.items() if name.startswith("lm."))


def test_trained_adapters_go_on(tmp_path, base):
    earlier = _trained(tmp_path / "lora" / "model", _named(base))
    vlm, before = _start(tmp_path / "lora", _named(base))
    state = earlier.state_dict()
    assert state.keys() == vlm.state_dict().keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in vlm.state_dict().items())
    assert any(not torch.equal(before[name], tensor) for name, tensor in state.items() if ".lora_B." in name)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["projector=maxpool"], "projector.name is 'avgpool' there and 'maxpool' here"),
        (["projector.num_tokens=4"], "projector.num_tokens is 16 there and 4 here"),
        (["backbone=mini_siglip"], "backbone.name is 'mini_clip' there and 'mini_siglip' here"),
        (["backbone.layer=-1"], "backbone.layer is -2 there and -1 here"),
        (["llm=mini_phi", "llm.weights=null", "llm.pretrained=false"], "llm.name is 'mini_llama' there and 'mini_phi'"),
        (["llm.pretrained=false"], "llm.pretrained is True there and False here"),
        (["recipe.token_scale=null"], "recipe.token_scale is 0.5 there and None here"),
    ],
)
def test_a_run_of_another_model_is_refused(tmp_path, base, overrides, message):
    _trained(tmp_path / "model", _named(base, "recipe=mini_align"))
    with pytest.raises(ValueError, match=f"recipe.start_from=.* is a run of another model: {message}"):
        _start(tmp_path, _named(base, *overrides))


def test_the_command_says_so_before_it_reads_the_llm(colors, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("prism_deco.training.trainer.build_model", None)
    data = ["data=llava", f"data.json={colors / 'train.json'}", f"data.image_root={colors / 'images'}"]
    command = ["train", *SMALL, *data, f"runs_dir={tmp_path}", "recipe.start_from=nowhere", "evaluate.benchmarks=null"]
    assert main(command) == 2
    assert "recipe.start_from=nowhere holds no finished model: train that run first" in capsys.readouterr().err


def test_how_images_are_cropped_and_where_weights_lie_may_differ(tmp_path, base):
    _trained(tmp_path / "model", _named(base, "recipe=mini_align", "recipe.resize=resize-crop"))
    moved = shutil.copytree(base, tmp_path / "moved")
    _start(tmp_path, _named(str(moved), "recipe.resize=pad"))


def test_what_else_cannot_be_started_from(tmp_path, base):
    with pytest.raises(ValueError, match="holds no finished model: train that run first"):
        _start(tmp_path / "nowhere", _named(base))
    _trained(tmp_path / "lora" / "model", _named(base))
    with pytest.raises(ValueError, match="trains adapters: only a run with recipe.lm=lora recipe.lora_r=.* can contin"):
        _start(tmp_path / "lora", _named(base, "recipe.lora_r=3"))
    _trained(tmp_path / "full" / "model", _named(base, "recipe.lm=full"))
    with pytest.raises(ValueError, match="trains the whole LLM"):
        _start(tmp_path / "full", _named(base))
    copy = shutil.copytree(base, tmp_path / "weights")
    _trained(tmp_path / "align" / "model", _named(str(copy), "recipe=mini_align"))
    torch.manual_seed(6)
    build_llm("mini_llama", pretrained=False).model.save_pretrained(copy)
    with pytest.raises(ValueError, match="was trained with weights of SHA-256 .*point llm.weights at the same files"):
        _start(tmp_path / "align", _named(str(copy)))
