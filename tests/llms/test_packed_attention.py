"""Packed rows against each record by itself, through transformers' own models."""

import inspect
from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, PhiConfig, Qwen2Config

from prism_deco.llms import packed_attention as packed
from prism_deco.llms.packed_attention import Segments, no_mask, use_packed_attention

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LENGTHS = (5, 1, 9)
CPU = torch.device("cpu")


@pytest.fixture(params=[Qwen2Config, LlamaConfig, PhiConfig])
def model(request):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(request.param(**SIZES), attn_implementation="sdpa").double().eval()


def _row(model):
    ids = torch.randint(50, (1, sum(LENGTHS)))
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    return ids, {"input_ids": ids, "position_ids": positions, "use_cache": False}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_each_record_is_computed_as_if_alone(model, checkpointing):
    ids, row = _row(model)
    alone = torch.cat([model(part, use_cache=False).logits for part in ids.split(LENGTHS, dim=1)], dim=1)
    alone.square().sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    use_packed_attention(model)
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    together = model(**row, attention_mask=no_mask(CPU), segments=Segments.of(LENGTHS, CPU)).logits
    torch.testing.assert_close(together, alone)
    together.square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-10, rtol=1e-8)
    # Without the segments the records do see each other.
    model.eval()
    assert not torch.allclose(model(ids, use_cache=False).logits, alone)


def test_a_mask_within_the_records(model):
    _, row = _row(model)
    generator = torch.Generator().manual_seed(0)
    length = sum(LENGTHS)
    allowed = torch.rand(1, 1, length, length, generator=generator) < 0.5
    allowed = allowed.tril() | torch.eye(length, dtype=torch.bool)
    owner = torch.repeat_interleave(torch.arange(3), torch.tensor(LENGTHS))
    whole = model(**row, attention_mask=allowed & (owner[:, None] == owner)).logits
    use_packed_attention(model)
    together = model(**row, attention_mask=allowed, segments=Segments.of(LENGTHS, CPU)).logits
    torch.testing.assert_close(together, whole)


def test_padded_batches_and_generation_stay_as_they_were(model):
    ids = torch.randint(50, (2, 7))
    mask = torch.tensor([[1] * 7, [0] * 3 + [1] * 4])
    before = model(ids, attention_mask=mask).logits
    answer = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
    use_packed_attention(model)
    assert model.config._attn_implementation == packed.PACKED
    torch.testing.assert_close(model(ids, attention_mask=mask).logits, before, rtol=0, atol=0)
    assert model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False).equal(answer)


def test_other_attention_is_refused_and_lost_segments_are_noticed(model):
    _, row = _row(model)
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="packing=true needs llm.attention=sdpa, not eager"):
        use_packed_attention(model)
    model.set_attn_implementation("sdpa")
    use_packed_attention(model)
    with pytest.raises(ValueError, match="does not pass on `segments`"):
        model(**row, attention_mask=no_mask(CPU))


def test_one_kernel_for_all_segments_is_called_as_it_wants_to_be(monkeypatch):
    """The kernel runs on CUDA only: here a slow stand-in takes its place, behind its real signature."""
    from torch.nn.attention import varlen

    signature = inspect.signature(varlen.varlen_attn)

    def stand_in(*args, **kwargs):
        given = signature.bind(*args, **kwargs).arguments
        assert given["window_size"] == (-1, 0) and given["cu_seq_q"].dtype == torch.int32
        assert given["max_q"] == given["max_k"] == max(LENGTHS)
        bounds, out = given["cu_seq_q"].tolist(), []
        for start, end in pairwise(bounds):
            q, k, v = (given[name][start:end].transpose(0, 1) for name in ("query", "key", "value"))
            out.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=given["scale"]).transpose(0, 1))
        return torch.cat(out)

    monkeypatch.setattr(varlen, "varlen_attn", stand_in)
    query, key, value = (torch.randn(1, heads, sum(LENGTHS), 8) for heads in (4, 2, 2))
    segments = Segments.of(LENGTHS, CPU)
    got = packed._varlen(query, key, value, segments, 0.3)
    module = torch.nn.Module()
    expected, _ = packed.packed_attention(module, query, key, value, no_mask(CPU), segments=segments, scaling=0.3)
    torch.testing.assert_close(got, expected)


def test_under_autocast_all_three_have_its_type(monkeypatch):
    """Rotary embeddings leave queries and keys in float32; the kernel for all records takes half precision only."""
    seen = []

    def record(query, key, value, *rest):
        seen.append((query.dtype, key.dtype, value.dtype))
        return query

    monkeypatch.setattr(packed, "_one_by_one", record)
    query, value = torch.randn(1, 4, sum(LENGTHS), 8), torch.randn(1, 4, sum(LENGTHS), 8, dtype=torch.bfloat16)
    segments = Segments.of(LENGTHS, CPU)
    for enabled in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            packed.packed_attention(torch.nn.Module(), query, query, value, no_mask(CPU), segments=segments)
    assert seen == [(torch.bfloat16,) * 3, (torch.float32, torch.float32, torch.bfloat16)]
