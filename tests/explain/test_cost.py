"""What the maps cost beyond the passes they are made of, measured."""

import time

import pytest
import torch

from prism_deco.explain.attention import batched_gradients, eager_attention, frozen, record
from prism_deco.explain.gae import image_pixels, relevance
from prism_deco.explain.propagate import propagate_row
from prism_deco.explain.words import encode_answer
from prism_deco.projectors.c_abstractor import CAbstractor
from prism_deco.sequence import build_batch

LARGER = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 8}
SIZES = {  # the miniature's
    "linear": {},
    "avgpool": {},
    "maxpool": {},
    "qformer": {"hidden_dim": 96, "heads": 4, "ffn_dim": 384, "depth": 2},
    "c_abstractor": {"hidden_dim": 96, "depth": 3},
    "d_abstractor": {"hidden_dim": 96, "heads": 4, "ffn_dim": 96, "points": 4},
}
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


def through_projector(vlm, features, gradients):
    """The passes backwards through the projector that a map is defined by, and no map: none where the geometry fixes
    it, one per target for attention, one per target and visual token for input x gradient (C-Abstractor)."""
    if vlm.projector.query_to_patch() is not None:
        return
    leaf = features.clone().requires_grad_()
    tokens = vlm.project(leaf)
    if not isinstance(vlm.projector, CAbstractor):
        batched_gradients(tokens, [leaf], gradients[:, None])
        return
    for target in gradients:
        copies = features.expand(len(target), -1, -1).clone().requires_grad_()
        diagonal = torch.arange(len(target))
        torch.autograd.grad(vlm.project(copies)[diagonal, diagonal], copies, target)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [{}, LARGER], ids=["miniature", "larger"])
@pytest.mark.parametrize("projector", SIZES)
def test_a_call_costs_little_more_than_its_forward_and_backward_passes(
    small, picture, one_thread, projector, architecture
):
    """Beside one forward pass of the model and a pass backwards per target through the language model."""
    vlm, llm = small("mini_llama", projector=projector, architecture=architecture, **SIZES[projector])
    vlm.float()
    encoded, ids = encode_answer(llm, PROMPT, ANSWER, vlm.projector.num_tokens)
    batch = build_batch([encoded], vlm.projector.num_tokens)

    def bare():
        with frozen(vlm), eager_attention(vlm.lm):
            features = vlm.features(image_pixels(vlm, picture))
            with torch.no_grad():
                visual = vlm.project(features)
            recording = record(vlm, batch, visual, targets=len(ids))
            inputs = (recording.inputs, *recording.attentions)
            by_input = batched_gradients(recording.logits, inputs, torch.eye(len(ids)))[0]
            through_projector(vlm, features, by_input[:, 0, batch.visual[0]])

    whole, passes = fastest(lambda: relevance(vlm, llm, picture, PROMPT, ANSWER), bare)
    assert whole <= 1.3 * passes, f"{whole / passes:.2f} of its passes"


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
