"""Adapters: where they are, what they train, and that peft itself reads what is saved."""

import builtins
import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from prism_deco.llms import build_llm, lora
from prism_deco.llms.lora import add_lora, load_lora, merge_lora, save_lora
from prism_deco.llms.tuning import tuning

MINIS = ["mini_qwen2", "mini_llama", "mini_phi"]


def _adapted(choice: str, seed: int = 0, **options):
    """A model in float64 whose adapters are far from zero."""
    torch.manual_seed(seed)
    model = build_llm(choice, pretrained=False).model.double()
    add_lora(model, **{"r": 4, "alpha": 8, "dropout": 0.0} | options)
    torch.manual_seed(seed + 1)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=0.05)
    return model.eval()


def _logits(model):
    ids = torch.arange(40).reshape(2, 20) * 7 % 500
    with torch.no_grad():
        return model(input_ids=ids).logits


def test_the_published_count_on_vicuna():
    model = build_llm("vicuna_7b_v1_5", pretrained=False, device="meta").model
    tuning("lora").apply(model, r=128, alpha=256, dropout=0.05)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    # By hand: per layer q, k, v, o (4096 -> 4096), gate and up (4096 -> 11008), down (11008 -> 4096).
    by_hand = 32 * 128 * (4 * (4096 + 4096) + 3 * (4096 + 11008))
    assert sum(p.numel() for p in trained.values()) == by_hand == 319_815_680
    assert all(".lora_" in name for name in trained)


@pytest.mark.parametrize("choice", MINIS)
def test_every_linear_layer_but_the_head_is_adapted(choice):
    plain = build_llm(choice, pretrained=False).model
    expected = {name for name, m in plain.named_modules() if isinstance(m, nn.Linear)} - {"lm_head"}
    kind = type(plain)
    model = _adapted(choice)
    adapted = {name.rpartition(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A." in name}
    assert adapted == expected and len(expected) >= 18
    assert type(model) is kind and model.get_output_embeddings().weight.shape == (model.config.vocab_size, 128)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, _ in model.named_parameters() if ".lora_" in name
    }


@pytest.mark.parametrize("choice", MINIS)
def test_new_adapters_change_nothing_and_trained_ones_do_what_the_paper_says(choice):
    torch.manual_seed(0)
    model = build_llm(choice, pretrained=False).model.double().eval()
    before = _logits(model)
    add_lora(model, r=4, alpha=8, dropout=0.5)
    assert torch.equal(_logits(model.eval()), before)
    layer = _adapted(choice).get_submodule("model.layers.1.self_attn.q_proj")
    x = torch.randn(3, 128, dtype=torch.float64)
    a, b = layer.lora_A.default.weight, layer.lora_B.default.weight
    by_hand = x @ layer.base_layer.weight.T + 8 / 4 * (x @ a.T) @ b.T
    if layer.base_layer.bias is not None:
        by_hand = by_hand + layer.base_layer.bias
    torch.testing.assert_close(layer(x), by_hand, rtol=1e-12, atol=1e-12)


def test_adapters_start_as_in_peft_whatever_was_drawn_before():
    def start(seed, draws):
        torch.manual_seed(seed)
        model = build_llm("mini_llama", device="meta").model.to_empty(device="cpu")
        torch.randn(draws)
        add_lora(model, r=4, alpha=8, dropout=0.0)
        return {name: p for name, p in model.named_parameters() if ".lora_" in name}

    first, again, other = start(1, 0), start(1, 99), start(2, 0)
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    for name, tensor in first.items():
        if ".lora_B." in name:
            assert not tensor.any()
            continue
        # Kaiming's uniform rule with slope sqrt(5): bounded by 1 / sqrt(inputs).
        bound = tensor.shape[1] ** -0.5
        assert 0.9 * bound < tensor.abs().max() <= bound and not torch.equal(tensor, other[name])
    assert len({tensor.sum().item() for name, tensor in first.items() if ".lora_A." in name}) == len(first) / 2


@pytest.mark.parametrize("choice", MINIS)
def test_merged_and_unmerged_logits_agree(choice):
    model = _adapted(choice)
    names = list(build_llm(choice, pretrained=False).model.state_dict())
    expected = _logits(model)
    merge_lora(model)
    assert list(model.state_dict()) == names, "nothing of the adapters is left"
    torch.testing.assert_close(_logits(model), expected, rtol=1e-10, atol=1e-10)
    torch.manual_seed(0)
    plain = build_llm(choice, pretrained=False).model.double().eval()
    assert (_logits(plain) - expected).abs().max() > 0.1, "the adapters matter"


def test_saved_adapters_load_here_and_in_peft(tmp_path):
    model = _adapted("mini_llama")
    save_lora(model, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"], config["bias"]) == (4, 8, "LORA", "none")
    # Random weights of the base come from the same seed; the adapters' draw does not matter.
    torch.manual_seed(0)
    base = build_llm("mini_llama", pretrained=False).model.double().eval()
    load_lora(base, tmp_path)
    assert torch.equal(_logits(base.eval()), _logits(model))
    torch.manual_seed(0)
    base = build_llm("mini_llama", pretrained=False).model.double()
    wrapped = peft.PeftModel.from_pretrained(base, tmp_path, autocast_adapter_dtype=False).eval()
    assert torch.equal(_logits(wrapped), _logits(model))


def test_adapters_that_do_not_fit_are_refused(tmp_path):
    save_lora(_adapted("mini_llama"), tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    name = next(iter(tensors))

    def load(changed):
        save_file(changed, tmp_path / "adapter_model.safetensors")
        load_lora(build_llm("mini_llama", pretrained=False).model, tmp_path)

    with pytest.raises(ValueError, match=r"do not fit the model: missing .*lora_A.*\(1 in all\)"):
        load({key: tensor for key, tensor in tensors.items() if key != name})
    with pytest.raises(ValueError, match="unexpected .*strange"):
        load(tensors | {"base_model.model.strange.lora_A.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="do not fit the model"):
        load(tensors | {name: torch.zeros(4, 7)})
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors cannot be read"):
        load_lora(build_llm("mini_llama", pretrained=False).model, tmp_path)
    file.unlink()
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors is missing"):
        load_lora(build_llm("mini_llama", pretrained=False).model, tmp_path)


def test_adapters_of_a_half_precision_base_are_float32():
    model = build_llm("mini_llama", pretrained=False, dtype="bfloat16").model
    add_lora(model, r=2, alpha=4, dropout=0.0)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    model(input_ids=torch.arange(8)[None]).logits.float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_mistakes_have_a_hint(monkeypatch):
    model = build_llm("mini_llama", pretrained=False).model
    with pytest.raises(ValueError, match="recipe.lora_r=0 must be at least 1"):
        add_lora(model, r=0, alpha=1, dropout=0.0)
    with pytest.raises(ValueError, match="Unknown recipe.lm 'lorra'.*Did you mean 'lora'.*frozen, full, lora, qlora"):
        tuning("lorra")
    original = builtins.__import__

    def without_peft(name, *args, **kwargs):
        if name == "peft":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_peft)
    with pytest.raises(ValueError, match=r"pip install 'prism-deco\[lora\]'"):
        lora.add_lora(model, r=1, alpha=1, dropout=0.0)
