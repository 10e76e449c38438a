"""Text-to-Query against a literal implementation: one backward per token, full matrices, the rules as printed."""

import pytest
import torch

from prism_deco.explain import text_to_query
from prism_deco.explain.gae import relevance
from prism_deco.explain.memory import estimate, tokens_at_once
from prism_deco.sequence import build_batch

PROMPT, ANSWER = "What color is the circle?", "a red circle"

MODELS = {
    "qwen2 tied": ("mini_qwen2", {}),
    "qwen2 untied, grouped": ("mini_qwen2", {"tie_word_embeddings": False, "num_key_value_heads": 2}),
    "phi untied": ("mini_phi", {}),
    "phi tied": ("mini_phi", {"tie_word_embeddings": True}),
    "llama untied, grouped": ("mini_llama", {}),
    "llama tied, one key head": ("mini_llama", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
}


def forward(vlm, llm, visual, attention):
    """The whole output of the causal LM for question and answer, the supervised positions, the visual ones."""
    messages = [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": ANSWER}]
    batch = build_batch([llm.encode(messages, num_images=1)], vlm.projector.num_tokens)
    vlm.lm.set_attn_implementation(attention)
    output = vlm.lm(inputs_embeds=vlm.embed(batch, visual), output_attentions=attention == "eager", use_cache=False)
    vlm.lm.set_attn_implementation("sdpa")
    end = llm.eos_ids
    predicted = [k for k, label in enumerate(batch.labels[0].tolist()) if label != -100 and label not in end]
    return output, [(k - 1, int(batch.labels[0, k])) for k in predicted], batch.visual[0]


def literal_text_to_query(vlm, llm, image):
    """float[T, M]: R = I; R <- R + mean_h(relu(grad * A)) R for all layers; row of the predicting position."""
    pixels = {tower: x[None].double() for tower, x in vlm.backbone.transform(image).items()}
    visual = vlm.visual_tokens(pixels).detach().requires_grad_()
    output, targets, columns = forward(vlm, llm, visual, "eager")
    rows = []
    for position, token in targets:
        gradients = torch.autograd.grad(output.logits[0, position, token], output.attentions, retain_graph=True)
        relevance = torch.eye(len(columns), dtype=torch.float64)
        for attention, gradient in zip(output.attentions, gradients, strict=True):
            weighed = sum(torch.relu(g * a) for g, a in zip(gradient[0], attention[0], strict=True))
            relevance = relevance + weighed.detach() / attention.shape[1] @ relevance
        rows.append((relevance - torch.eye(len(columns), dtype=torch.float64))[position, columns])
    return torch.stack(rows)


@pytest.mark.parametrize("model", MODELS)
def test_vector_rule_is_the_row_of_the_full_matrices(small, picture, model):
    name, architecture = MODELS[model]
    vlm, llm = small(name, architecture=architecture)
    expected = literal_text_to_query(vlm, llm, picture)
    result = relevance(vlm, llm, picture, PROMPT, ANSWER)
    assert len(result.tokens) == len(expected) and expected.max() > 1e-4
    torch.testing.assert_close(result.text_to_query, expected, rtol=1e-9, atol=1e-15)
    single = relevance(vlm.float(), llm, picture, PROMPT, ANSWER).text_to_query
    assert (single - expected).abs().max() < 1e-5


def test_a_caption_s_first_token_is_not_about_the_patch_before_it(small, picture):
    """Under `prompt: plain` the last visual token predicts it: its own identity says nothing about the image."""
    vlm, llm = small(prompt="plain")
    expected = literal_text_to_query(vlm, llm, picture)
    result = relevance(vlm, llm, picture, PROMPT, ANSWER)
    # The line break that ends a caption is supervised, but not about the image.
    torch.testing.assert_close(result.text_to_query, expected[:-1], rtol=1e-9, atol=1e-15)
    assert result.text_to_query[0].max() < 0.5


def test_text_to_patch_is_the_product_of_the_two_maps(small, picture):
    for projector in ("avgpool", "maxpool"):  # a map that is fixed, and one per token
        result = relevance(*small(projector=projector), picture, PROMPT, ANSWER)
        for t, row in enumerate(result.text_to_query):
            one = result.query_to_patch if result.query_to_patch.ndim == 2 else result.query_to_patch[t]
            torch.testing.assert_close(result.text_to_patch[t], row @ one)
        torch.testing.assert_close(result.sentence_text_to_patch, sum(result.text_to_patch) / len(result.tokens))


@pytest.mark.parametrize("chunk", [1, 2])
def test_chunks_do_not_change_the_result(small, picture, chunk, monkeypatch):
    vlm, llm = small()
    whole = relevance(vlm, llm, picture, PROMPT, ANSWER)
    monkeypatch.setattr("prism_deco.explain.gae.tokens_at_once", lambda *_: chunk)
    parts = relevance(vlm, llm, picture, PROMPT, ANSWER)
    torch.testing.assert_close(whole.text_to_query, parts.text_to_query, rtol=1e-10, atol=1e-16)


def test_running_out_of_memory_halves_the_chunk(small, picture, monkeypatch, caplog):
    vlm, llm = small()
    expected = relevance(vlm, llm, picture, PROMPT, ANSWER).text_to_query
    real, asked = text_to_query._rows, []

    def scarce(recording, chosen):
        asked.append(chosen.stop - chosen.start)
        if asked[-1] > 1:
            raise torch.OutOfMemoryError
        return real(recording, chosen)

    monkeypatch.setattr(text_to_query, "_rows", scarce)
    result = relevance(vlm, llm, picture, PROMPT, ANSWER)
    assert asked[0] > 1 and asked[-1] == 1 and "Out of memory" in caplog.text
    torch.testing.assert_close(result.text_to_query, expected, rtol=1e-10, atol=1e-16)


def test_raw_attention_is_the_mean_over_heads_and_layers(small, picture):
    vlm, llm = small("mini_llama")
    pixels = {tower: x[None].double() for tower, x in vlm.backbone.transform(picture).items()}
    output, targets, columns = forward(vlm, llm, vlm.visual_tokens(pixels), "eager")
    result = relevance(vlm, llm, picture, PROMPT, ANSWER, method="attention")
    for row, (position, _) in zip(result.text_to_query, targets, strict=True):
        maps = [layer[0, head, position, columns] for layer in output.attentions for head in range(layer.shape[1])]
        torch.testing.assert_close(row, sum(maps) / len(maps))


@pytest.mark.parametrize("name", ["mini_qwen2", "mini_phi", "mini_llama"])
def test_eager_and_fused_attention_agree(small, picture, name):
    vlm, llm = small(name)
    pixels = {tower: x[None].double() for tower, x in vlm.backbone.transform(picture).items()}
    logits = [forward(vlm, llm, vlm.visual_tokens(pixels), kind)[0].logits for kind in ("eager", "sdpa")]
    # transformers' own softmax is in float32, whatever the weights are.
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5 * float(logits[1].detach().abs().max()))


def test_the_model_is_left_as_it_was(small, picture):
    vlm, llm = small(projector="qformer")
    vlm.train()
    vlm.lm.model.layers[0].requires_grad_(False)
    state = [(p.requires_grad, p.grad) for p in vlm.parameters()], [m.training for m in vlm.modules()]
    hooks = [len(m._forward_hooks) for m in vlm.projector.modules()]
    relevance(vlm, llm, picture, PROMPT, ANSWER)
    assert state == ([(p.requires_grad, p.grad) for p in vlm.parameters()], [m.training for m in vlm.modules()])
    assert hooks == [len(m._forward_hooks) for m in vlm.projector.modules()]
    assert vlm.lm.config._attn_implementation == "sdpa"
    assert vlm.projector.body.config._attn_implementation == "sdpa"


def test_own_answer_is_explained_where_none_is_given(small, picture, monkeypatch):
    vlm, llm = small()
    monkeypatch.setattr("prism_deco.explain.gae.generate_answer", lambda *_, **__: ["a blue cross"])
    assert relevance(vlm, llm, picture, PROMPT).answer == "a blue cross"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"answer": "  "}, "answer is empty"),
        ({"answer": "red " * 3000}, "positions"),
        ({"method": "r-gea"}, "Did you mean 'r-gae'"),
    ],
)
def test_mistakes_are_named(small, picture, options, message):
    vlm, llm = small()
    with pytest.raises(ValueError, match=message):
        relevance(vlm, llm, picture, PROMPT, **{"answer": ANSWER} | options)


def test_too_little_memory_is_said_before_it_is_taken(small, picture, monkeypatch):
    vlm, llm = small()
    monkeypatch.setattr("prism_deco.explain.memory.free_memory", lambda _: 10_000)
    with pytest.raises(ValueError, match="smaller dtype"):
        relevance(vlm, llm, picture, PROMPT, ANSWER)


def test_as_many_tokens_go_at_once_as_fit(small, monkeypatch):
    _, llm = small()
    cpu = torch.device("cpu")

    def chunk(room):
        monkeypatch.setattr("prism_deco.explain.memory.free_memory", lambda _: room)
        return tokens_at_once(llm.model.config, 700, 20, torch.float32, cpu)

    graph, per_token = estimate(llm.model.config, 700, torch.float32)
    # 3 layers of 4 heads keep 700 x 700 probabilities each, in float32.
    assert graph > 3 * 4 * 700 * 700 * 4 and per_token > 4 * 700 * 700 * 4
    assert chunk(None) == 20
    assert chunk(graph + 3 * per_token) == 2  # a third is left to others
