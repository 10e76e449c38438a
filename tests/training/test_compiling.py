"""Compiled layers against the same ones as they are: real parts, with a backend that runs torch's own operators."""

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.nn import functional as F
from transformers import AttentionInterface

from prism_deco.bench.records import build_batches, draw_pool
from prism_deco.build import build_model
from prism_deco.config import load_config
from prism_deco.llms import packed_attention as packed
from prism_deco.llms.layers import checkpoint_activations
from prism_deco.training.compiling import compile_layers
from prism_deco.training.nonfinite import diagnose

CPU = torch.device("cpu")
SMALL = ["recipe=prism", "projector=avgpool", "recipe.num_tokens=4", "backbone=mini_siglip", "backbone.image_size=32",
         "backbone.pretrained=false", "llm.pretrained=false"]  # fmt: skip
LORA = ["recipe.lm=lora", "recipe.lora_r=4", "recipe.lora_dropout=0"]


@pytest.fixture(autouse=True)
def _nothing_compiled_before():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def _model(*settings: str, pack: bool = False, steps: int = 2, longest: int = 60):
    torch.manual_seed(0)
    vlm, _ = build_model(load_config([*SMALL, *settings]))
    if pack:
        packed.use_packed_attention(vlm.lm)
    groups = draw_pool(vlm, batch_size=3, steps=steps, max_text_tokens=longest, seed=1)
    return vlm.train(), build_batches(vlm, groups, CPU, pack=pack)


def _losses(vlm, batches) -> list[float]:
    """The loss and the gradients' norm of every batch."""
    found = []
    for batch in batches:
        vlm.zero_grad()
        loss = vlm(batch).total
        loss.backward()
        gradients = [p.grad for p in vlm.parameters() if p.grad is not None]
        found += [float(loss.detach()), float(nn.utils.get_total_norm(gradients))]
    return found


QUICK = """
from functools import partial
from prism_deco.training import trainer
trainer.compile_layers = partial(trainer.compile_layers, backend="aot_eager")
"""


@pytest.mark.slow
def test_a_sharded_run_with_compiled_layers_trains_and_stores_the_same(start, trained_weights, tmp_path):
    (tmp_path / "quick.py").write_text(QUICK)
    settings = ["recipe.epochs=1", "llm.architecture.num_hidden_layers=2"]
    runs = {
        "plain": start(*settings, run="plain"),
        "compiled": start(
            *settings, "trainer.compile=true", "plugins=[quick]", ranks=2, run="compiled", PLUGINS=str(tmp_path)
        ),
    }
    for job in runs.values():
        assert set(job.wait(600)) == {0}, job.log.read_text()[-3000:]
    plain, compiled = (trained_weights(job.folder) for job in runs.values())
    assert plain.keys() == compiled.keys()
    for name, weight in plain.items():
        torch.testing.assert_close(compiled[name], weight, atol=2e-5, rtol=1e-3)
    assert "Compiling" in (tmp_path / "compiled" / "train.log").read_text()


@pytest.mark.parametrize(
    "settings, pack, checkpointing",
    [
        (["llm=mini_phi"], False, "full"),
        pytest.param(["llm=mini_llama"], False, "selective", marks=pytest.mark.slow),
        pytest.param(["llm=mini_qwen2"], True, "none", marks=pytest.mark.slow),
        pytest.param([*LORA, "llm=mini_qwen2"], False, "none", marks=pytest.mark.slow),
    ],
)
def test_compiled_layers_compute_the_same_under_the_same_names(settings, pack, checkpointing):
    vlm, batches = _model(*settings, pack=pack)
    checkpoint_activations(vlm.lm, checkpointing)
    names, expected = list(vlm.state_dict()), _losses(vlm, batches)
    compile_layers(vlm, backend="aot_eager")
    assert _losses(vlm, batches) == pytest.approx(expected, rel=1e-5)
    assert list(vlm.state_dict()) == names
    # One graph for a tower's block and one for a layer, without a break; and once more for sizes that vary.
    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 0 if pack else 2 <= graphs <= 4


def test_packed_rows_of_any_lengths_are_compiled_once(monkeypatch):
    """As on a GPU, where one kernel takes all records; here a stand-in of torch's own operators."""

    def varlen_attn(query, key, value, bounds, *_, scale, window_size):
        assert window_size == (-1, 0)
        record = torch.bucketize(torch.arange(query.shape[0]), bounds, right=True)
        mask = (record[:, None] == record[None]).tril()
        q, k, v = (t.transpose(0, 1)[None] for t in (query, key, value))
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scale)[0].transpose(0, 1)

    def on_gpu(module, query, key, value, attention_mask, *, segments, scaling, **_):
        return packed._varlen(query, key, value, segments, scaling), None

    vlm, batches = _model("llm=mini_llama", pack=True, steps=4, longest=400)
    assert len({batch.lengths for batch in batches}) == 4
    expected = _losses(vlm, batches)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    monkeypatch.setitem(AttentionInterface._global_mapping, packed.PACKED, on_gpu)
    compile_layers(vlm, backend="aot_eager")
    assert _losses(vlm, batches[:3]) == pytest.approx(expected[:6], rel=1e-5)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert _losses(vlm, batches[3:]) == pytest.approx(expected[6:], rel=1e-5)


def test_generation_is_not_compiled():
    vlm, batches = _model("llm=mini_qwen2")
    compile_layers(vlm, backend="aot_eager")
    vlm.eval().generate(batches[0], None, max_new_tokens=2, eos_ids=[0], pad_id=0)
    assert not counters["stats"]


def test_what_is_not_finite_is_found_within_compiled_layers():
    vlm, batches = _model("llm=mini_qwen2")
    with torch.no_grad():
        vlm.lm.model.layers[1].mlp.up_proj.weight.fill_(torch.inf)
    expected = diagnose(vlm, batches[:1])
    compile_layers(vlm, backend="aot_eager")
    with torch.no_grad():  # as in a validation, whose compiled layers would be taken
        vlm(batches[0])
    assert diagnose(vlm, batches[:1]) == expected and "layers.1.mlp.up_proj" in expected
