"""Four-bit weights: what is said where they cannot be had, and that they reach transformers where they can."""

import importlib.util

import pytest
import torch

from prism_deco.llms import build_llm
from prism_deco.llms.lora import add_lora
from prism_deco.llms.tuning import quantization


@pytest.fixture
def weights(tmp_path):
    """A folder with the weights of a small Llama."""
    torch.manual_seed(0)
    build_llm("mini_llama", pretrained=False).model.save_pretrained(tmp_path / "weights")
    return str(tmp_path / "weights")


def _with_packages(monkeypatch, *names):
    find = importlib.util.find_spec
    found = {"bitsandbytes", "accelerate"}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: (name in names or None) if name in found else find(name)
    )


def test_without_the_packages_or_a_gpu_the_way_out_is_named(monkeypatch, weights):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    _with_packages(monkeypatch)
    with pytest.raises(ValueError, match=r"need bitsandbytes and accelerate: pip install 'prism-deco\[qlora\]'"):
        build_llm("mini_llama", pretrained=True, weights=weights, quantize="nf4")
    _with_packages(monkeypatch, "bitsandbytes", "accelerate")
    with pytest.raises(ValueError, match="need a CUDA GPU.*recipe.lm=lora"):
        build_llm("mini_llama", pretrained=True, weights=weights, quantize="nf4")
    with pytest.raises(ValueError, match="Unknown llm.quantize 'int3'"):
        quantization("int3")
    with pytest.raises(ValueError, match="only pretrained weights can be quantised"):
        build_llm("mini_llama", pretrained=False, quantize="nf4")


def test_each_process_quantises_on_its_own_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    _with_packages(monkeypatch, "bitsandbytes", "accelerate")
    monkeypatch.setenv("LOCAL_RANK", "3")
    options = quantization("nf4")
    assert options["device_map"] == {"": 3}
    config = options["quantization_config"]
    assert (config.load_in_4bit, config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant) == (True, "nf4", True)


@pytest.mark.usefixtures("four_bits")
def test_adapters_learn_on_four_bit_weights(weights):
    model = build_llm("mini_llama", pretrained=True, weights=weights, quantize="nf4").model
    kinds = {type(module).__name__ for name, module in model.named_modules() if name.endswith("_proj")}
    assert kinds == {"Linear4bit"} and type(model.get_output_embeddings()) is torch.nn.Linear
    add_lora(model, r=2, alpha=4, dropout=0.0)
    ids = torch.arange(12, device=next(model.parameters()).device)[None]
    exact = build_llm("mini_llama", pretrained=True, weights=weights).model(input_ids=ids.cpu()).logits
    logits = model(input_ids=ids).logits
    assert 0 < (logits.cpu().float() - exact).abs().max() < exact.abs().max(), "rounded, not something else"
    logits.float().square().sum().backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(".lora_" in name and grad is not None for name, grad in trained.items())
    assert all(grad.isfinite().all() for grad in trained.values())
