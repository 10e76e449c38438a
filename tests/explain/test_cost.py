"""What the maps cost beyond the passes they are made of: operations and elements are counted, no clock is read."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

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


class Cost(TorchDispatchMode):
    """Floating-point operations of products, and elements read and written by all kernels.

    `FlopCounterMode` cannot be used: its hooks refuse `torch.autograd.grad`.
    """

    def __init__(self):
        super().__init__()
        self.operations = self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if count := flop_registry.get(function.overloadpacket):
            self.operations += count(*args, **kwargs, out_val=result)
        if not function.is_view:
            leaves = tree_leaves((args, kwargs, result))
            self.elements += sum(leaf.numel() for leaf in leaves if isinstance(leaf, torch.Tensor))
        return result


def cost(function):
    with Cost() as counted:
        function()
    return counted


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


@pytest.mark.parametrize("architecture", [{}, LARGER], ids=["miniature", "larger"])
@pytest.mark.parametrize("projector", SIZES)
def test_a_call_costs_little_more_than_its_forward_and_backward_passes(small, picture, projector, architecture):
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
            inputs = (recording.inputs[0], *recording.attentions)
            by_input = batched_gradients(recording.logits, inputs, torch.eye(len(ids)))[0]
            through_projector(vlm, features, by_input[:, 0, batch.visual[0]])

    whole, passes = cost(lambda: relevance(vlm, llm, picture, PROMPT, ANSWER)), cost(bare)
    assert 0 < whole.operations <= 1.01 * passes.operations
    assert 0 < whole.elements <= 1.2 * passes.elements


def test_one_row_is_at_least_ten_times_cheaper_than_the_matrices():
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
    assert cost(matrices).operations >= 10 * cost(vectors).operations > 0
