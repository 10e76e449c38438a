"""What the maps cost beyond the passes they are made of, measured."""

import time

import pytest
import torch

from prism_deco.explain.attention import batched_gradients, eager_attention, frozen, record
from prism_deco.explain.gae import image_pixels, relevance
from prism_deco.explain.propagate import propagate_row
from prism_deco.explain.words import encode_answer
from prism_deco.sequence import build_batch

LARGER = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 8}
PROMPT, ANSWER = "What color is the circle? " * 6, "a red circle and a blue cross"


def fastest(*functions, repeats=5):
    """CPU seconds of the fastest of several runs of each function, taken in turn: other processes do not count."""
    best = [float("inf")] * len(functions)
    for _ in range(repeats):
        for k, function in enumerate(functions):
            start = time.process_time()
            function()
            best[k] = min(best[k], time.process_time() - start)
    return best


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.parametrize("projector", ["linear", "avgpool"])
def test_a_call_costs_little_more_than_its_forward_and_backward_passes(small, picture, one_thread, projector):
    vlm, llm = small("mini_llama", projector=projector, architecture=LARGER)
    vlm.float()
    encoded, ids = encode_answer(llm, PROMPT, ANSWER, vlm.projector.num_tokens)
    batch = build_batch([encoded], vlm.projector.num_tokens)

    def bare():
        with frozen(vlm), eager_attention(vlm.lm):
            visual = vlm.visual_tokens(image_pixels(vlm, picture))
            recording = record(vlm, batch, visual, targets=len(ids))
            inputs = (recording.inputs, *recording.attentions)
            batched_gradients(recording.logits, inputs, torch.eye(len(ids)))

    def one_by_one():
        with frozen(vlm), eager_attention(vlm.lm):
            recording = record(vlm, batch, vlm.visual_tokens(image_pixels(vlm, picture)), targets=len(ids))
            for target in recording.logits:
                torch.autograd.grad(target, (recording.inputs, *recording.attentions), retain_graph=True)

    whole, passes, single = fastest(lambda: relevance(vlm, llm, picture, PROMPT, ANSWER), bare, one_by_one)
    assert whole <= 1.3 * passes, f"{whole / passes:.2f} of the batched passes ({whole / single:.2f} of single ones)"


@pytest.mark.slow
def test_one_row_is_at_least_ten_times_cheaper_than_the_matrices(one_thread):
    length, layers, targets = 480, 8, 4
    weighed = torch.rand(layers, targets, length, length) / length
    position = length - 5

    def vectors():
        row = torch.eye(length)[position].expand(targets, -1)
        for layer in list(weighed)[::-1]:
            row = propagate_row(row, layer)
        return row

    def matrices():
        relevance = torch.eye(length).expand(targets, -1, -1)
        for layer in weighed:
            relevance = relevance + layer @ relevance
        return relevance[:, position]

    torch.testing.assert_close(vectors(), matrices())
    fast, slow = fastest(vectors, matrices, repeats=3)
    assert slow >= 10 * fast, f"only {slow / fast:.1f} times"
